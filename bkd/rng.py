"""StepRng: all randomness of a step, from (seed, step, position in the global batch, purpose).

Nothing else is kept, so a resumed run draws what the uninterrupted one drew, and so does a run on more processes or
with more accumulation passes. Draws are made on the CPU: devices have generators of their own that agree with no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class StepRng:
    """Random numbers for one forward pass.

    Args:
        seed: Of the run.
        step: Optimizer step.
        positions: Place of each sample of this pass in the step's global batch.
    """

    def __init__(self, seed: int, step: int, positions: Sequence[int]) -> None:
        self._seed, self._step, self._positions = seed, step, tuple(positions)
        self._generator = torch.Generator()

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, (B, *shape), float32."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators(purpose)])

    def integers(self, purpose: str, high: int) -> Tensor:
        """Uniform in 0..high-1, (B,), int64."""
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self._generators(purpose)])

    def uniform(self, purpose: str) -> Tensor:
        """Uniform in [0, 1), (B,), float32."""
        return torch.cat([torch.rand(1, generator=g) for g in self._generators(purpose)])

    def _generators(self, purpose: str) -> Iterator[torch.Generator]:
        for position in self._positions:
            yield self._generator.manual_seed(_seed_of(self._seed, self._step, position, purpose))


def pass_seed(seed: int, step: int, part: int) -> int:
    """Of the device's own generator during a pass: dropout inside adapters draws from it, and resumes with it."""
    return _seed_of(seed, step, part, "pass")


def _seed_of(*parts: object) -> int:
    name = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1
