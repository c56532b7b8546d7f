"""Which samples make up batch n: a pure function, so that resuming needs no state and world size changes nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def batch_indices(step: int, *, batch: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    """The sample numbers of the global batch of one optimizer step.

    Every epoch is a new permutation of all samples; a batch may span two epochs, so no sample is left out and every
    batch is full.

    Args:
        step: 0 or more.
        batch: Size of the global batch: over all processes and accumulation passes.
        num_samples: Size of the data set.
        seed: Of the run.
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs, offsets = np.divmod(positions, num_samples)
    return np.array(
        [_permutation(int(e), num_samples, seed)[o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64
    )


@lru_cache(maxsize=2)
def _permutation(epoch: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)
