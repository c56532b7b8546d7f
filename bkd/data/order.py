"""Which samples make up batch n: a pure function, so that resuming needs no state and world size changes nothing.

An epoch goes through the shards in a new order, a window of them at a time, and through each window's samples in a
new order. Where shards are fetched from elsewhere, only a window of them (and the next) must be here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bkd.errors import RecipeError
from bkd.rng import StepRng

WINDOW = 16
"""Shards that are shuffled together; 160,000 samples at img2dataset's usual size."""


@dataclass(frozen=True)
class Order:
    """The order of a data set's samples, for ever.

    Attributes:
        counts: Samples in each shard; sample numbers run through the shards.
        seed: Of the run.
        window: Shards that are shuffled together.
    """

    counts: tuple[int, ...]
    seed: int
    window: int = WINDOW

    def batch(self, step: int, batch: int) -> NDArray[np.int64]:
        """(batch,), int64: sample numbers of the global batch of one optimizer step.

        Every epoch holds every sample once; a batch may span two epochs, so no sample is left out and every batch is
        full.

        Args:
            step: 0 or more.
            batch: Size of the global batch: over all processes and accumulation passes.
        """
        positions = np.arange(step * batch, (step + 1) * batch)
        epochs, offsets = np.divmod(positions, sum(self.counts))
        return np.concatenate([self._in_epoch(int(e), offsets[epochs == e]) for e in np.unique(epochs)])

    def shards_from(self, step: int, batch: int) -> list[int]:
        """Numbers of the shards of the window that a step begins in, then of the window after it."""
        epoch, offset = divmod(step * batch, sum(self.counts))
        windows, ends = _windows(self, epoch)
        number = int(np.searchsorted(ends, offset, side="right"))
        after = windows[number + 1] if number + 1 < len(windows) else _windows(self, epoch + 1)[0][0]
        return list(dict.fromkeys([*windows[number], *after]))

    def _in_epoch(self, epoch: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample numbers at some ascending places of an epoch."""
        _, ends = _windows(self, epoch)
        numbers = np.searchsorted(ends, offsets, side="right")
        starts = np.array([0, *ends])[numbers]
        parts = [_window_order(self, epoch, int(w))[(offsets - starts)[numbers == w]] for w in np.unique(numbers)]
        return np.concatenate(parts)


def share(batch: int, *, parts: int, part: int) -> NDArray[np.int64]:
    """Places in the global batch that one part of it holds: parts are runs of equal length, in order.

    A step of `grad_accum` passes on `world_size` processes has their product as parts; process r does parts
    pass * world_size + r. So every process has as many batches as any other, and none waits for one that never comes.

    Raises:
        RecipeError: If the batch cannot be divided so.
    """
    if batch % parts:
        raise RecipeError(
            "the batch cannot be divided evenly",
            where="train.batch",
            got=f"{batch} images for {parts} parts (processes times train.grad_accum)",
            allowed=f"a multiple of {parts}",
            remedy=f"train.batch={-(-batch // parts) * parts}",
        )
    size = batch // parts
    return np.arange(part * size, (part + 1) * size)


def other_places(positions: NDArray[np.int64], batch: int, rng: StepRng) -> NDArray[np.int64]:
    """For each place in the global batch, another one, drawn evenly; it may be another process's.

    Args:
        positions: (B,), places of one pass.
        batch: Size of the global batch, at least 2.
        rng: Of the pass.
    """
    steps: NDArray[np.int64] = rng.integers("other", batch - 1).numpy()
    return (positions + 1 + steps) % batch


@lru_cache(maxsize=4)
def _windows(order: Order, epoch: int) -> tuple[tuple[tuple[int, ...], ...], NDArray[np.int64]]:
    """The windows of an epoch, each the numbers of its shards, and the place where each ends."""
    shards = np.arange(len(order.counts))
    if len(shards) > order.window:
        shards = np.random.Generator(np.random.PCG64([order.seed, epoch])).permutation(shards)
    parts = [shards[start : start + order.window] for start in range(0, len(shards), order.window)]
    counts = np.array(order.counts)
    ends = np.cumsum([counts[part].sum() for part in parts])
    return tuple(tuple(part.tolist()) for part in parts), ends


@lru_cache(maxsize=4)
def _window_order(order: Order, epoch: int, window: int) -> NDArray[np.int64]:
    """The sample numbers of a window in their order."""
    starts = np.cumsum([0, *order.counts])
    windows, _ = _windows(order, epoch)
    samples = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in windows[window]])
    seeds: Sequence[int] = [order.seed, epoch] if len(windows) == 1 else [order.seed, epoch, window]
    return np.random.Generator(np.random.PCG64(list(seeds))).permutation(samples)
