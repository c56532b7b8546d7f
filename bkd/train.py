"""fit: the one training loop. It optimises a method's loss and knows nothing of what the method does."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from bkd.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from bkd.data.ahead import map_ahead
from bkd.data.latent_set import CachedBatch, LatentSet
from bkd.data.order import share
from bkd.errors import TrainingError
from bkd.losses import LossTerms
from bkd.methods.base import Method
from bkd.models import best_device
from bkd.recipe.schema import Train
from bkd.rng import StepRng

PASSES_AHEAD = 4
"""Batches read while earlier ones are trained on."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        step: Steps done, 1-based.
        max_steps: Steps of the stage.
        parts: Unweighted loss terms, averaged over the global batch.
        total: The weighted sum that was minimised.
        lr: Learning rate of the step.
        grad_norm: Norm of the gradient before clipping.
        seconds: Wall time of the step.
    """

    step: int
    max_steps: int
    parts: Mapping[str, float]
    total: float
    lr: float
    grad_norm: float
    seconds: float


class Interrupted(Exception):
    """The user asked to stop; a checkpoint has been written."""


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a second one stops at once."""

    def __enter__(self) -> StopSignal:
        self.requested = False
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then the schedule; a pure function, so there is no state."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return train.lr * factor[train.lr_schedule]


class Fit:
    """One stage's optimisation, from its newest checkpoint to its last step.

    Args:
        method: What to learn.
        data: Cached samples.
        train: Settings.
        seed: Of data order and every random draw.
        mirror: Whether every other draw of an image is mirrored.
        checkpoints: Folder of this stage's checkpoints.
        on_step: Called after each optimizer step, on the main process.
        on_resume: Called once with the number of steps already done, before the first new one.
    """

    def __init__(
        self,
        method: Method,
        data: LatentSet,
        train: Train,
        *,
        seed: int,
        mirror: bool = False,
        checkpoints: Path,
        on_step: Callable[[StepReport], None],
        on_resume: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._method, self._data, self._train, self._seed = method, data, train, seed
        self._order, self._mirror = data.order(seed), mirror
        self._checkpoints, self._on_step, self._on_resume = checkpoints, on_step, on_resume
        cpu = best_device().type == "cpu"
        self._accelerator = Accelerator(mixed_precision=train.mixed_precision, cpu=cpu)
        self._parameters = {name: p for name, p in method.trainable.named_parameters() if p.requires_grad}
        weights = list(self._parameters.values())
        optimizer = torch.optim.AdamW(
            weights, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )
        wrapped, self._optimizer = self._accelerator.prepare(method.trainable, optimizer)
        method.forward = wrapped
        self._ema = EMAModel(weights, decay=train.ema) if train.ema else None

    def run(self) -> None:
        """Train to the last step; afterwards the trainable module holds the averaged weights.

        Raises:
            Interrupted: After a request to stop; run the same again to continue.
        """
        first = self._resume()
        self._on_resume(first)
        self._method.trainable.train()
        passes = ((step, n) for step in range(first, self._train.max_steps) for n in range(self._train.grad_accum))
        with StopSignal() as stop, closing(map_ahead(self._load, passes, workers=1, ahead=PASSES_AHEAD)) as loaded:
            for step in range(first, self._train.max_steps):
                report = self._step(step, loaded)
                done = step + 1
                if self._accelerator.is_main_process:
                    self._on_step(report)
                if done % self._train.checkpoint_every == 0 or done == self._train.max_steps or stop.requested:
                    self._save(done)
                if stop.requested and done < self._train.max_steps:
                    raise Interrupted
        if self._ema is not None:
            self._ema.copy_to(self._parameters.values())
        # prepare() made the module's own forward autocast; the finished student computes plainly again.
        self._accelerator.unwrap_model(self._method.trainable, keep_fp32_wrapper=False)
        self._method.trainable.eval()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """For as long as the context lasts, the trainable module holds the averaged weights."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters.values())
        self._ema.copy_to(self._parameters.values())
        try:
            yield
        finally:
            self._ema.restore(self._parameters.values())

    def _step(self, step: int, loaded: Iterator[tuple[CachedBatch, StepRng]]) -> StepReport:
        started = time.perf_counter()
        lr = learning_rate(self._train, step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        num_passes = self._train.grad_accum
        losses = []
        for cached, rng in islice(loaded, num_passes):
            with self._accelerator.autocast():
                terms = self._method.loss(cached.to(self._accelerator.device), rng)
            self._accelerator.backward(terms.total / num_passes)
            losses.append(terms)
        clip = self._train.max_grad_norm or math.inf
        grad_norm = float(self._accelerator.clip_grad_norm_(self._parameters.values(), clip))
        self._require_finite(step, grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._ema is not None:
            self._ema.step(self._parameters.values())
        parts, total = self._mean(losses)
        seconds = time.perf_counter() - started
        return StepReport(step + 1, self._train.max_steps, parts, total, lr, grad_norm, seconds)

    def _require_finite(self, step: int, grad_norm: float) -> None:
        """One NaN would reach every weight; a float16 scaler skips such steps by itself."""
        if self._accelerator.scaler is None and not math.isfinite(grad_norm):
            raise TrainingError(
                "training diverged: the gradient is not finite",
                where=f"step {step + 1}",
                got=grad_norm,
                remedy="lower train.lr or raise train.warmup_steps; checkpoints up to here are kept",
            )

    def _load(self, place: tuple[int, int]) -> tuple[CachedBatch, StepRng]:
        """This process's share of one pass of a step's global batch, and its random numbers."""
        step, number = place
        train, world = self._train, self._accelerator.num_processes
        indices = self._order.batch(step, train.batch)
        self._data.expect(self._order.shards_from(step, train.batch))
        part = number * world + self._accelerator.process_index
        positions = share(train.batch, parts=train.grad_accum * world, part=part)
        rng = StepRng(self._seed, step, positions.tolist())
        mirror = (rng.uniform("mirror") < 0.5).tolist() if self._mirror else None
        return self._data.gather(indices[positions], mirror), rng

    def _mean(self, losses: list[LossTerms]) -> tuple[dict[str, float], float]:
        names = list(losses[0].parts)
        device = self._accelerator.device
        rows = [
            torch.stack([value.to(device) for value in (*terms.parts.values(), terms.total.detach())])
            for terms in losses
        ]
        row = self._accelerator.reduce(torch.stack(rows).mean(0), reduction="mean").tolist()
        return dict(zip(names, row[:-1], strict=True)), row[-1]

    def _save(self, step: int) -> None:
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        checkpoint = Checkpoint(
            step=step,
            trainable=self._parameters,
            ema=self._ema_by_name(),
            optimizer=self._optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else {},
        )
        save_checkpoint(self._checkpoints, checkpoint, keep=self._train.keep_checkpoints)

    def _resume(self) -> int:
        found = load_newest_checkpoint(self._checkpoints, self._accelerator.device)
        if found is None:
            return 0
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(found.trainable[name])
        self._optimizer.load_state_dict(dict(found.optimizer))
        if self._ema is not None:
            self._ema.shadow_params = [found.ema[name] for name in self._parameters]
            self._ema.optimization_step = found.step
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(dict(found.scaler))
        return found.step

    def _ema_by_name(self) -> dict[str, Tensor]:
        if self._ema is None:
            return {}
        return dict(zip(self._parameters, self._ema.shadow_params, strict=True))
