"""Measure a few real steps of a recipe on this device, without its data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from bkd.data.latent_set import CachedBatch, Captions
from bkd.data.order import Order
from bkd.eval.peak_memory import peak_bytes
from bkd.models.folder import native_resolution
from bkd.models.load import describe_device, load_pipeline
from bkd.progress import Progress, silent
from bkd.recipe.schema import Recipe
from bkd.runs.stage_plan import PlannedStage
from bkd.runs.stage_setup import build_method
from bkd.training.checkpoint import Checkpoint, Checkpoints
from bkd.training.fit import READ_EVERY, Events, Fit
from bkd.training.journal import StepReport
from bkd.training.parallel import start_parallel
from bkd.training.stop import StopSignal

NUM_SAMPLES, PER_SHARD = 1_000_000, 10_000
"""Of the simulated data set, in shards of img2dataset's usual size."""


@dataclass(frozen=True)
class TrainingSpeed:
    """What was measured.

    Attributes:
        device: Its name.
        seconds: Of one optimizer step.
        images: In one step, over all processes.
        peak_bytes: On CUDA what the allocator held at most; on a CPU the peak of this process, libraries included.
    """

    device: str
    seconds: float
    images: int
    peak_bytes: int

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


class SimulatedSamples:
    """Random latents and captions of the right shapes, in place of a cached data set.

    Args:
        pipe: The teacher.
        resolution: Side of the training images, in pixels.
        num_samples: How many there are; it must not matter.
    """

    name = "simulated samples"

    def __init__(self, pipe: StableDiffusionPipeline, resolution: int, num_samples: int = NUM_SAMPLES) -> None:
        self._num_samples = num_samples
        side = resolution // pipe.vae_scale_factor
        self._moments = torch.rand(2 * pipe.vae.config.latent_channels, side, side)
        tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
        self._lengths = [tokenizer.model_max_length for tokenizer in tokenizers if tokenizer is not None]
        self._size = torch.tensor([resolution, resolution, 0, 0, resolution, resolution]).float()

    def __len__(self) -> int:
        return self._num_samples

    def order(self, seed: int) -> Order:
        shards, rest = divmod(self._num_samples, PER_SHARD)
        return Order((*[PER_SHARD] * shards, *([rest] if rest else [])), seed)

    def expect(self, shards: Sequence[int]) -> None:
        """Everything is here."""

    def gather(
        self,
        indices: NDArray[np.int64],
        mirror: Sequence[bool] | None = None,
        others: NDArray[np.int64] | None = None,
    ) -> CachedBatch:
        count = len(indices)
        captions = Captions(*(torch.zeros(count, length, dtype=torch.int64) for length in self._lengths))
        sizes = self._size.expand(count, -1) if len(self._lengths) > 1 else None
        moments = self._moments.expand(count, -1, -1, -1)
        return CachedBatch(moments, captions, sizes, None if others is None else captions)


class Unsaved(Checkpoints):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__(Path())

    def save(self, checkpoint: Checkpoint) -> None:
        """Nothing."""

    def newest(self) -> None:
        """There is none."""


def bench_train(
    recipe: Recipe, teacher: Path, planned: PlannedStage, *, steps: int = READ_EVERY, progress: Progress = silent
) -> TrainingSpeed:
    """Time optimizer steps of a stage, after as many that warm up.

    Args:
        recipe: As validated.
        teacher: Pipeline folder of the stage's teacher.
        planned: The stage.
        steps: To measure, at most `READ_EVERY`; they are timed as one stretch.
        progress: Called with (done, total) steps.
    """
    parallel = start_parallel(recipe.train.parallel)
    pipe = load_pipeline(teacher)
    method = build_method(planned, pipe, parallel.device)
    train = replace(
        planned.train, max_steps=2 * steps, log_every=steps, checkpoint_every=2 * steps, samples_every=0, warmup_steps=0
    )
    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        reports.append(report)
        progress(report.step, 2 * steps)
        if report.step == steps and parallel.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(parallel.device)

    Fit(
        method,
        SimulatedSamples(pipe, recipe.data.resolution or native_resolution(teacher)),
        train,
        checkpoints=Unsaved(),
        parallel=parallel,
        seed=planned.seed,
        events=Events(step=on_step),
    ).run(StopSignal())
    return TrainingSpeed(
        device=describe_device(parallel.device),
        seconds=reports[-1].seconds,
        images=train.batch,
        peak_bytes=peak_bytes(parallel.device),
    )
