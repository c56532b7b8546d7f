"""Fit: the one training loop. It optimises a method's loss and knows nothing of what the method does."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bkd.data.ahead import read_ahead
from bkd.data.latent_set import TrainingSamples
from bkd.data.order import other_places, share
from bkd.errors import DataError, TrainingError
from bkd.losses import LossTerms
from bkd.methods.base import Method, map_tensors
from bkd.models.load import autocast, training_dtype
from bkd.recipe.schema import Train
from bkd.rng import StepRng, pass_seed
from bkd.training.average import Average
from bkd.training.checkpoint import Checkpoint, Checkpoints, require_fitting
from bkd.training.journal import Journal, StepReport
from bkd.training.optimizer import GuardedOptimizer, learning_rate
from bkd.training.parallel import Parallel, own, split_like
from bkd.training.stop import Interrupted, StopSignal

PASSES_AHEAD = 4
"""Batches read and drawn while earlier ones are trained on."""
READ_EVERY, READ_SECONDS = 10, 10.0
"""Steps, or seconds, after which numbers are read from the device, and all processes hear of requests to stop."""


@dataclass(frozen=True)
class Events:
    """What a loop tells, on every process; all optional.

    Attributes:
        resumed: Once, with the number of steps already done, before the first new one.
        step: After each step, in order, some steps late.
        samples: Every `samples_every` steps, with the loop and the number of steps done.
    """

    resumed: Callable[[int], None] = lambda step: None
    step: Callable[[StepReport], None] = lambda report: None
    samples: Callable[[Fit, int], None] = lambda fit, step: None


class Fit:
    """One stage's optimisation, from its newest checkpoint to its last step.

    Args:
        method: What to learn; its networks are on the device of this process.
        data: Cached samples.
        train: Settings.
        checkpoints: Of this stage.
        parallel: This process among the others.
        seed: Of data order and every random draw.
        mirror: Whether every other draw of an image is mirrored.
        events: Told what happens.

    Raises:
        DataError: If there are fewer samples than a step takes.
    """

    def __init__(
        self,
        method: Method,
        data: TrainingSamples,
        train: Train,
        *,
        checkpoints: Checkpoints,
        parallel: Parallel,
        seed: int,
        mirror: bool = False,
        events: Events | None = None,
    ) -> None:
        require_enough(len(data), train.batch, data.name)
        self._method, self._data, self._train, self._seed = method, data, train, seed
        self._order, self._mirror = data.order(seed), mirror
        self._dtype = training_dtype(train.mixed_precision)
        self._checkpoints, self._parallel, self._events = checkpoints, parallel, events or Events()
        if train.gradient_checkpointing:
            method.trainable.enable_gradient_checkpointing()  # type: ignore[operator]
        if not method.reaches_all:
            self._freeze_unreached()
        if method.teacher is not None:
            parallel.shard(method.teacher)
        self._wrapped = parallel.wrap(method.trainable)
        method.forward = compiled(self._wrapped) if train.compile else self._wrapped
        if method.teacher is not None:
            method.forward_teacher = compiled(method.teacher) if train.compile else method.teacher
        self._parameters = {name: p for name, p in method.trainable.named_parameters() if p.requires_grad}
        self._optimizer = GuardedOptimizer(train, self._parameters, parallel)
        self._average = Average(self._parameters, train.ema)
        self._journal = Journal(train.max_steps, parallel)
        self._skipped_in_a_row = 0
        self._read_at, self._saved_at, self._read_every = 0, 0, 1

    def run(self, stop: StopSignal) -> None:
        """Train to the last step; afterwards the trainable module holds the averaged weights.

        Args:
            stop: Heard between steps.

        Raises:
            Interrupted: After a request to stop; run the same again to continue.
            TrainingError: If too many steps in a row were not finite, or memory ran out.
        """
        first = self._read_at = self._saved_at = self._resume()
        self._events.resumed(first)
        self._method.trainable.train()
        self._journal.start()
        batches = self.batches(first, lambda: self._give_up_waiting(stop))
        with stop.waiting(), self._method.watching(), closing(batches):
            for step in range(first, self._train.max_steps):
                try:
                    self.update(step, batches)
                except (Interrupted, DataError, OSError):
                    self._keep(step)
                    raise
                if self._reads_after(step + 1, stop):
                    self._pause(step + 1, stop)
        self._average.apply()
        self._method.trainable.eval()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The trainable module with the averaged weights in it, for as long as the context lasts."""
        module = self._method.trainable
        with self._average.applied(), torch.no_grad():
            module.eval()
            try:
                yield module
            finally:
                module.train()

    def average_in_full(self) -> dict[str, Tensor] | None:
        """The averaged weights by name, on the CPU; None on all processes but the main one, which all must ask."""
        weights = {name: self._parallel.collected(tensor) for name, tensor in self._average.tensors.items()}
        return weights if self._parallel.is_main else None

    def update(self, step: int, batches: Iterator[Any]) -> None:
        """One optimizer step, 0-based. Nothing in here waits for the device.

        Args:
            step: Which.
            batches: From `batches`, one item for each pass.
        """
        lr = learning_rate(self._train, step)
        passes: list[LossTerms] = []
        with running_out_of_memory(self._train):
            for number in range(self._train.grad_accum):
                drawn = map_tensors(next(batches), self._to_device)
                torch.manual_seed(pass_seed(self._seed, step, self._part(number)))
                last = number == self._train.grad_accum - 1
                with self._parallel.gathering(self._wrapped, last=last):
                    with autocast(self._dtype, self._parallel.device):
                        terms = self._method.loss(drawn)
                    self._optimizer.backward(terms.total / self._train.grad_accum)
                passes.append(terms)
            gradient = self._optimizer.step(lr)
        self._average.update(step + 1)
        self._journal.add(step + 1, lr, passes, gradient)

    def _freeze_unreached(self) -> None:
        """Parameters that no loss term depends on do not train, and their optimizer does not decay them."""
        with self._method.watching(), autocast(self._dtype, self._parallel.device):
            terms = self._method.loss(map_tensors(self._draw((0, 0)), self._to_device))
        terms.total.backward()  # type: ignore[no-untyped-call]
        for parameter in self._method.trainable.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def _reads_after(self, done: int, stop: StopSignal) -> bool:
        train = self._train
        due = any(every and done % every == 0 for every in (train.checkpoint_every, train.samples_every))
        alone = self._parallel.kind == "alone"  # others would wait for steps that this process no longer does
        due = due or done == train.max_steps or (stop.requested and alone)
        return due or done - self._read_at >= self._read_every

    def _pause(self, done: int, stop: StopSignal) -> None:
        train, stopping = self._train, self._read(done, stop=stop.requested)
        if train.samples_every and done % train.samples_every == 0:
            self._events.samples(self, done)
        # Among skipped steps the weights may be what is wrong: the checkpoints from before them are kept.
        due = done % train.checkpoint_every == 0 and not self._skipped_in_a_row
        if due or done == train.max_steps or stopping:
            self._save(done)
        if stopping and done < train.max_steps:
            raise Interrupted
        self._journal.start()

    def _read(self, done: int, *, stop: bool) -> bool:
        """Tell of the steps since the last time; whether any process was asked to stop."""
        reports, stopping = self._journal.read(stop=stop)
        # All processes know the same seconds, so they read after the same step again.
        seconds, log_every = max(reports[-1].seconds, 1e-6), self._train.log_every
        self._read_at, self._read_every = done, max(1, min(log_every, READ_EVERY, int(READ_SECONDS / seconds)))
        for report in reports:
            self._events.step(report)
            self._count_skipped(report)
        return stopping

    def _give_up_waiting(self, stop: StopSignal) -> None:
        """Samples may never come: one process alone leaves them; others would wait for this one's steps."""
        if stop.requested and self._parallel.kind == "alone":
            raise Interrupted

    def _keep(self, done: int) -> None:
        """Save what was done before a step whose samples did not come; others cannot know that they should, too."""
        if self._parallel.kind != "alone":
            return
        if done > self._read_at:
            self._read(done, stop=False)
        if done > self._saved_at:
            self._save(done)

    def _count_skipped(self, report: StepReport) -> None:
        """Skipped steps changed nothing; too many of them in a row will not end by themselves."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if report.trouble else 0
        if self._skipped_in_a_row >= self._train.max_skipped_steps:
            raise TrainingError(
                f"training diverged: {report.trouble}",
                where=f"step {report.step}",
                got=f"{self._skipped_in_a_row} steps in a row",
                remedy="lower train.lr, raise train.warmup_steps or train in bf16; with --force the run goes on with"
                " other settings from its newest checkpoint, which is from before these steps, or from the start",
            )

    def batches(self, first: int, while_waiting: Callable[[], None] = lambda: None) -> Generator[Any, None, None]:
        """This process's passes from step `first` on, drawn ahead in a thread; to be closed."""
        places = ((step, n) for step in range(first, self._train.max_steps) for n in range(self._train.grad_accum))
        return read_ahead(self._draw, places, ahead=PASSES_AHEAD, while_waiting=while_waiting)

    def _draw(self, place: tuple[int, int]) -> Any:
        """This process's share of one pass of a step's global batch, with all that is random in it."""
        step, number = place
        train, world = self._train, self._parallel.place.world_size
        indices = self._order.batch(step, train.batch)
        self._data.expect(self._order.shards_from(step, train.batch))
        positions = share(train.batch, parts=train.grad_accum * world, part=self._part(number))
        rng = StepRng(self._seed, step, positions.tolist())
        mirror = (rng.uniform("mirror") < 0.5).tolist() if self._mirror else None
        others = indices[other_places(positions, train.batch, rng)] if self._method.needs_others else None
        drawn = self._method.draw(self._data.gather(indices[positions], mirror, others), rng)
        return map_tensors(drawn, Tensor.pin_memory) if self._parallel.device.type == "cuda" else drawn

    def _part(self, number: int) -> int:
        """Which part of a step's global batch this process's pass `number` is."""
        return number * self._parallel.place.world_size + self._parallel.place.rank

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._parallel.device, non_blocking=True)

    def _save(self, step: int) -> None:
        checkpoint = Checkpoint(
            step=step,
            trainable={name: self._parallel.collected(parameter) for name, parameter in self._parameters.items()},
            ema=(self.average_in_full() or {}) if self._train.ema else {},
            optimizer=self._optimizer.state(),
            scaler=self._optimizer.scaler_state(),
        )
        if self._parallel.is_main:
            self._checkpoints.save(checkpoint)
        self._saved_at = step

    def _resume(self) -> int:
        newest = self._checkpoints.newest() if self._parallel.is_main else None
        step = self._parallel.agree(newest or 0)
        if not step:
            return 0
        found = self._checkpoints.load(step)
        theirs = {name: tuple(tensor.shape) for name, tensor in found.trainable.items()}
        ours = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        require_fitting(theirs, ours, f"step {step}")
        with torch.no_grad():
            for tensors, saved in ((self._parameters, found.trainable), (self._average.tensors, found.ema)):
                for name in saved:
                    own(tensors[name]).copy_(own(split_like(saved[name], tensors[name])))
        self._optimizer.load(found.optimizer, found.scaler)
        return step


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile`, but modules with hooks never share code with modules of other hooks.

    By default they do, and the hooks are then left out without a word. Convolutions keep the memory format that
    `train.channels_last` chose; the compiler's own choice is the slower one on a CPU.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    return torch.compile(forward, options={"layout_optimization": False})


def require_enough(num_samples: int, batch: int, name: object) -> None:
    """Refuse a data set that cannot fill a step: images would repeat within it.

    Raises:
        DataError: Naming both numbers.
    """
    if num_samples < batch:
        raise DataError(
            "there are fewer samples than one step takes",
            where=name,
            got=f"{num_samples:,} samples, train.batch={batch}",
            remedy=f"give more shards, or train.batch={num_samples}",
        )


@contextmanager
def running_out_of_memory(train: Train) -> Iterator[None]:
    """Turns the allocator's error into advice.

    Raises:
        TrainingError: If memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            "the device has too little memory for a pass",
            where="train.batch",
            got=f"{train.batch} images in {train.grad_accum} passes: {str(error).splitlines()[0]}",
            remedy=f"train.grad_accum={train.grad_accum * 2} (the result stays the same), then "
            "train.gradient_checkpointing=true, train.mixed_precision=bf16, train.optimizer=adamw-8bit, adapters, "
            "or, for guided, method.joint_teacher_passes=false",
        ) from error
