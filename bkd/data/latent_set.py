"""Read cached shards batch by batch: checked, in any order, with memory that does not grow with the data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkd.data.index import NO_MEMBER, Extents, ShardIndex, read_member
from bkd.data.indexing import index_shard
from bkd.data.latent_folder import LatentFolder
from bkd.data.latent_shards import npy_array
from bkd.data.order import WINDOW, Order
from bkd.data.remote import RemoteError
from bkd.data.sources import expect, require_room
from bkd.errors import DataError

PLAIN, MIRRORED = "moments", "mirrored"
"""Members that hold latents of an image, and of its mirror image."""
MAX_BAD_READS = 0.01
FREE_BAD_READS = 16
"""So many may be bad before a share is computed."""


@dataclass(frozen=True)
class Captions:
    """Tokenised captions.

    Attributes:
        token_ids: (B, L), int64.
        token_ids_2: (B, L), int64, for SDXL's second text encoder.
    """

    token_ids: Tensor
    token_ids_2: Tensor | None = None


@dataclass(frozen=True)
class CachedBatch:
    """Cached samples: one forward pass's worth.

    Attributes:
        moments: (B, 2C, h, w), float32: posterior mean, then deviation, before the scaling factor.
        captions: Of the samples.
        sizes: (B, 6), float32, SDXL's size and crop conditioning, in pixels.
        others: Captions of other samples of the same step; only for random conditioning.
    """

    moments: Tensor
    captions: Captions
    sizes: Tensor | None = None
    others: Captions | None = None


class TrainingSamples(Protocol):
    """What a training loop knows of its data; see `LatentSet`."""

    name: str

    def __len__(self) -> int: ...

    def order(self, seed: int) -> Order: ...

    def expect(self, shards: Sequence[int]) -> None: ...

    def gather(
        self,
        indices: NDArray[np.int64],
        mirror: Sequence[bool] | None = None,
        others: NDArray[np.int64] | None = None,
    ) -> CachedBatch: ...


class LatentSet:
    """A cached data set.

    Args:
        found: Where its shards are, and what is known of them.
        cache: Folder for indexes that cannot lie beside their shard.
        window: Shards that are shuffled together.

    Raises:
        DataError: If there is no sample in it, or its shards are remote and a window of them does not fit the cache.
    """

    def __init__(self, found: LatentFolder, cache: Path, *, window: int = WINDOW) -> None:
        self.name, self.description, self.shards = found.name, found.description, found.shards
        self._cache, self._window = cache, window
        self.counts = tuple(int(stats["successes"]) for stats in found.stats)
        self.left_out = sum((Counter(stats.get("left_out", {})) for stats in found.stats), Counter[str]())
        self.bad = sum((Counter(stats.get("bad", {})) for stats in found.stats), Counter[str]())
        if not sum(self.counts):
            raise DataError("the cached data set is empty", where=self.name, remedy="cache shards with usable samples")
        require_room(self.shards, window)
        self._starts = np.cumsum([0, *self.counts])
        self._reads = 0
        self.replaced: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def fingerprint(self) -> str:
        return self.description.fingerprint

    def order(self, seed: int) -> Order:
        return Order(self.counts, seed, self._window)

    def expect(self, shards: Sequence[int]) -> None:
        """Say which shards will be read next, by number; remote ones are fetched ahead."""
        expect([self.shards[number] for number in shards])

    def gather(
        self,
        indices: NDArray[np.int64],
        mirror: Sequence[bool] | None = None,
        others: NDArray[np.int64] | None = None,
    ) -> CachedBatch:
        """Samples by their numbers. One that cannot be read is replaced by the next that can, and counted.

        Args:
            indices: (B,), int64.
            mirror: (B,): which samples' mirrored images are wanted; those without get the plain one.
            others: (B,), int64: samples whose captions are wanted besides.

        Raises:
            DataError: If more than a hundredth of what was read had to be replaced; with the reasons.
        """
        wanted = mirror if mirror is not None else [False] * len(indices)
        names = ("ids", "ids_2", "sizes") if len(self.description.settings.tokenizers) > 1 else ("ids",)
        samples = [
            self._sample(int(index), (MIRRORED if flip else PLAIN, *names))
            for index, flip in zip(indices, wanted, strict=True)
        ]
        captions = [self._sample(int(index), names[:2]) for index in (others if others is not None else ())]
        return CachedBatch(
            moments=_stack(samples, "moments").float(),
            captions=_captions(samples),
            sizes=_stack(samples, "sizes").float() if "sizes" in names else None,
            others=_captions(captions) if captions else None,
        )

    def _sample(self, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        self._reads += 1
        for offset in range(len(self)):
            try:
                return self._read((index + offset) % len(self), names)
            except RemoteError:  # all samples of the shard are as far away: replacing them would take hours
                raise
            except DataError as error:
                self.replaced[error.what] += 1
                self._check_replaced(error)
        raise AssertionError("unreachable: so many bad reads are an error")

    def _check_replaced(self, last: DataError) -> None:
        count = self.replaced.total()
        if count > max(FREE_BAD_READS, MAX_BAD_READS * self._reads):
            raise DataError(
                "too many cached samples cannot be read",
                where=last.where,
                got=f"{count:,} of {self._reads:,} reads: "
                + "; ".join(f"{count:,} {reason}" for reason, count in self.replaced.items()),
                allowed=f"at most {MAX_BAD_READS:.0%}",
                remedy="restore the shard, or remove its _stats.json and run the same `bkd data cache` again",
            )

    def _read(self, index: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[number])
        with self.shards[number].hold() as path:
            members = _index(path, self._cache).members
            found = {name: self._array(path, members, name, row) for name in names if name != MIRRORED}
            if MIRRORED in names:
                there = _holds(members.get(f"{MIRRORED}.npy"), row)
                found[PLAIN] = self._array(path, members, MIRRORED if there else PLAIN, row)
        return found

    @staticmethod
    def _array(path: Path, members: Any, name: str, row: int) -> NDArray[Any]:
        places = members.get(f"{name}.npy")
        if not _holds(places, row):
            raise DataError(f"a cached sample has no {name}", where=path, remedy="cache the shard again")
        return npy_array(read_member(path, places.at(row)))


def _stack(samples: Sequence[Mapping[str, NDArray[Any]]], name: str) -> Tensor:
    return torch.from_numpy(np.stack([sample[name] for sample in samples]))


def _captions(samples: Sequence[Mapping[str, NDArray[Any]]]) -> Captions:
    second = _stack(samples, "ids_2").long() if "ids_2" in samples[0] else None
    return Captions(_stack(samples, "ids").long(), second)


def _holds(places: Extents | None, row: int) -> bool:
    return places is not None and row < len(places.sizes) and bool(places.sizes[row] != NO_MEMBER)


@lru_cache(maxsize=64)
def _index(path: Path, cache: Path) -> ShardIndex:
    return index_shard(path, cache)
