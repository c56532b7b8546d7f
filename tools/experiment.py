"""What the experiments of `make results` have in common: trainings that draw along the way, many at a time.

Each training is on the CPU and has one thread, so that others beside it change nothing. Those that are done are found
again: stop an experiment at any time and start it anew.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from torch import nn
from transformers.utils import logging as transformers_logging

from bkd.bench.train import Unsaved
from bkd.data.caching import ensure_latents, read_latents
from bkd.data.shapes import scenes
from bkd.diffusion.guidance import StudentKind
from bkd.eval.drawing import Drawing
from bkd.eval.generate import draw
from bkd.eval.pictures import with_unet
from bkd.files import replace_file, write_atomically
from bkd.models.folder import model_digest
from bkd.models.load import load_pipeline
from bkd.models.locate import locate
from bkd.recipe.load import load_recipe
from bkd.runs.run import check_inputs
from bkd.runs.stage_setup import build_method
from bkd.training.fit import Events, Fit
from bkd.training.journal import StepReport
from bkd.training.parallel import start_parallel
from bkd.training.stop import StopSignal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a device; workers inherit it
POINTS = (10, 25, 50, 100, 200, 400)
"""Optimizer steps after which a student draws. The rate is constant: each is the end of a training of that length."""
SETTINGS = {
    "train.batch": 16,
    "train.lr": 1e-3,
    "train.lr_schedule": "constant",
    "train.warmup_steps": 10,
    "train.ema": 0.95,
    "train.samples_every": 5,
}
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 8, 3.0
NUM_PROMPTS = {"test": 250, "novel": 150}
TRIAL_PROMPTS = {"val": 400}
"""What settings are chosen by is not what methods are compared by."""
TRIAL_SEED, TRIAL_STEPS = 1000, 50
"""Of the short trainings that choose settings; no other training has this seed."""


@dataclass(frozen=True)
class Training:
    """One training and what is drawn along it.

    Attributes:
        folder: Where its drawings go.
        recipe: Packaged name.
        overrides: `key=value`, after `SETTINGS`.
        seed: Of the training.
        points: Steps after which to draw.
        splits: Of the prompts, with how many of each.
        scale: Guidance scale to draw with.
        last_scales: Further ones, after the last step.
        random_init: Whether the student starts from random weights.
    """

    folder: Path
    recipe: str
    overrides: tuple[str, ...]
    seed: int = 0
    points: tuple[int, ...] = POINTS
    splits: Mapping[str, int] = field(default_factory=lambda: NUM_PROMPTS)
    scale: float = GUIDANCE_SCALE
    last_scales: tuple[float, ...] = ()
    random_init: bool = False

    def drawn(self, step: int, scale: float | None = None) -> Path:
        """The file of images; with the usual scale if none is given."""
        return self.folder / (f"step-{step:04d}.npz" if scale in (None, self.scale) else f"scale-{scale:g}.npz")

    def scales(self, step: int) -> tuple[float, ...]:
        """Guidance scales to draw with."""
        return (self.scale, *(self.last_scales if step == max(self.points) else ()))

    @property
    def done(self) -> bool:
        return all(self.drawn(step, scale).is_file() for step in self.points for scale in self.scales(step))


def prompts(splits: Mapping[str, int] = NUM_PROMPTS) -> list[str]:
    """Captions of scenes that no training has; of the comparisons, first unseen captions, then unseen combinations."""
    return [scene.caption for split, count in splits.items() for scene in scenes(split, count)]  # type: ignore[arg-type]


def start_worker() -> None:
    """One thread each: as many processes use the machine's cores better, and the result does not depend on how many."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if (parent := parent_process()) is not None:
        Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """A pool whose process was killed has workers that would train on, for nobody."""
    parent.join()
    os._exit(1)


def perform(training: Training) -> float:
    """Train, and draw at each point; returns the seconds it took."""
    started = time.monotonic()
    steps = [f"seed={training.seed}", f"train.max_steps={max(training.points) or 1}"]
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    recipe = load_recipe(training.recipe, [*settings, *steps, *training.overrides])
    inputs = check_inputs(recipe)
    pipe = load_pipeline(inputs.teacher)
    ensure_latents(inputs.caching, lambda: pipe)
    parallel, planned = start_parallel("auto"), inputs.stages[0]
    method = build_method(planned, pipe, parallel.device)
    if training.random_init:
        torch.manual_seed(training.seed)
        method.trainable.load_state_dict(type(pipe.unet).from_config(method.trainable.config).state_dict())
    losses: dict[str, list[float]] = {}

    def on_step(report: StepReport) -> None:
        for name, value in report.parts.items():
            losses.setdefault(name, []).append(value)

    def save(step: int, unet: nn.Module) -> None:
        for scale in training.scales(step):
            save_drawn(training.drawn(step, scale), pipe, unet, scale, training.splits, planned.kind, losses)

    def on_samples(fit: Fit, step: int) -> None:
        if step in training.points:
            with fit.averaged() as unet:
                save(step, unet)

    if 0 in training.points:
        save(0, method.trainable)
    if max(training.points):
        fit = Fit(
            method,
            read_latents(inputs.caching, window=recipe.data.shuffle_shards),
            recipe.train,
            checkpoints=Unsaved(),
            parallel=parallel,
            seed=recipe.seed,
            events=Events(step=on_step, samples=on_samples),
        )
        fit.run(StopSignal())
    return time.monotonic() - started


def draw_teacher(path: Path, scale: float = GUIDANCE_SCALE) -> None:
    """What every student is compared with."""
    pipe = load_pipeline(locate("shapes"))
    save_drawn(path, pipe, pipe.unet, scale, NUM_PROMPTS, StudentKind(), {})


def save_drawn(
    path: Path,
    pipe: StableDiffusionPipeline,
    unet: nn.Module,
    scale: float,
    splits: Mapping[str, int],
    kind: StudentKind,
    losses: Mapping[str, list[float]],
) -> None:
    """Write the images of all prompts, and the losses of the steps before."""
    texts, drawer = prompts(splits), with_unet(pipe, unet.eval(), kind)
    drawing = Drawing(NUM_INFERENCE_STEPS, kind.pipeline_scale(scale, path))
    images = torch.stack([image for _, image in draw(drawer, texts, range(len(texts)), drawing)])
    arrays = {name: np.array(values, np.float32) for name, values in losses.items()}
    with replace_file(path) as stream:
        np.savez_compressed(stream, images=images.numpy(), **arrays)


def perform_all(trainings: Iterable[Training], jobs: int) -> None:
    """Those that are not done, so many at a time."""
    left = {str(training.folder): partial(perform, training) for training in trainings if not training.done}
    if left:
        perform_jobs(left, worker_pool(jobs))


def worker_pool(jobs: int) -> ProcessPoolExecutor:
    """So many processes of one thread each."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start_worker)


def perform_jobs(jobs: Mapping[str, Callable[[], float | None]], pool: Executor) -> None:
    """As many at a time as the pool takes, telling what is done, in how many seconds if it says so, and what is left.

    One that fails ends those that wait.
    """
    started = time.monotonic()
    futures = {pool.submit(job): name for name, job in jobs.items()}
    try:
        for number, future in enumerate(as_completed(futures), 1):
            seconds = future.result()
            taken = futures[future] if seconds is None else f"{futures[future]}: {seconds:.0f} s"
            eta = (time.monotonic() - started) / number * (len(jobs) - number)
            print(f"{number}/{len(jobs)} {taken}, about {eta / 60:.0f} min left", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def start(folder: Path) -> None:
    """Make this process a worker, too, and refuse a folder of drawings that were made otherwise."""
    start_worker()
    drawing = asdict(Drawing(NUM_INFERENCE_STEPS, GUIDANCE_SCALE))
    shared = {"train": SETTINGS, "drawing": drawing, "prompts": NUM_PROMPTS, "trial_prompts": TRIAL_PROMPTS}
    require_same_settings(folder, "settings", {**shared, "teacher": model_digest(locate("shapes"))})


def require_same_settings(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Record what the runs in a folder have in common, or stop where those in it had something else in common."""
    path, text = folder / f"{name}.json", json.dumps(settings, indent=2) + "\n"
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f"{path}: the runs there were made otherwise; choose another -o, or delete them")
    write_atomically(path, text)


def parsed_arguments(description: str | None) -> argparse.Namespace:
    """Of a script that performs an experiment."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()
