"""The index of a shard: where every sample's members lie, their checksums, and the fields that filters ask for.

Arrays, not objects: a sample takes about a hundred bytes in memory, half of it on disk.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bkd.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LATENT_EXTENSIONS = ("moments.npy", "mirrored.npy", "ids.npy", "ids_2.npy", "sizes.npy")
"""What cached shards hold; `bkd.data.latent_shards` says what each is."""
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", *LATENT_EXTENSIONS)
"""Members that are read; all others are counted and left alone, whatever they hold."""
NO_MEMBER = np.iinfo(np.uint32).max
"""As a size: this sample has no member of that extension."""


class Extent(NamedTuple):
    """A member's place: first byte, number of bytes, and their CRC-32."""

    offset: int
    size: int
    checksum: int


@dataclass(frozen=True)
class Extents:
    """The places of all members of one extension, in three arrays of a row per sample.

    Attributes:
        offsets: (N,), uint64, bytes from the start of the shard.
        sizes: (N,), uint32, bytes; `NO_MEMBER` where a sample has none.
        checksums: (N,), uint32, CRC-32.
    """

    offsets: NDArray[np.uint64]
    sizes: NDArray[np.uint32]
    checksums: NDArray[np.uint32]

    def present(self) -> NDArray[np.bool_]:
        """(N,): which samples have such a member."""
        return np.asarray(self.sizes != NO_MEMBER)

    def at(self, row: int) -> Extent:
        return Extent(int(self.offsets[row]), int(self.sizes[row]), int(self.checksums[row]))


@dataclass(frozen=True)
class Sample:
    """One sample of a shard.

    Attributes:
        shard: The tar file.
        key: The members' common name.
        members: Extension -> place.
    """

    shard: Path
    key: str
    members: Mapping[str, Extent]

    @property
    def image_extension(self) -> str | None:
        return next((ext for ext in IMAGE_EXTENSIONS if ext in self.members), None)

    def read(self, extension: str) -> bytes:
        """A member's bytes.

        Raises:
            DataError: If they are not the bytes that were indexed.
        """
        return read_member(self.shard, self.members[extension])

    def read_if_present(self, extension: str) -> bytes | None:
        return self.read(extension) if extension in self.members else None


@dataclass(frozen=True)
class Contents:
    """What a shard holds besides what is read.

    Attributes:
        num_metadata: KEY.json that could be read.
        metadata_fields: Names in them, and in how many samples each has a value.
        foreign: Extensions that are left alone, and how many members have each.
    """

    num_metadata: int
    metadata_fields: Mapping[str, int]
    foreign: Mapping[str, int]


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one shard, in the order of the archive.

    Attributes:
        path: The tar file.
        keys: (N,), UTF-8 bytes, of one width.
        members: Extension -> places; only extensions that occur.
        fields: Numeric metadata by our names (`bkd.data.metadata.ALIASES`), (N,), float32, NaN where missing.
        languages: (N,), uint8, numbers into `language_names`.
        language_names: Lower case; empty for "not said".
        caption_lengths: (N,), int32, characters of KEY.txt; -1 where missing, empty or not UTF-8.
        contents: Of the shard as a whole.
    """

    path: Path
    keys: NDArray[np.bytes_]
    members: Mapping[str, Extents]
    fields: Mapping[str, NDArray[np.float32]]
    languages: NDArray[np.uint8]
    language_names: tuple[str, ...]
    caption_lengths: NDArray[np.int32]
    contents: Contents

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, *extensions: str) -> NDArray[np.bool_]:
        """(N,): which samples have a member of any of these extensions."""
        found = np.zeros(len(self), bool)
        for extension in extensions:
            if extension in self.members:
                found |= self.members[extension].present()
        return found

    def sample(self, row: int) -> Sample:
        members = {name: places.at(row) for name, places in self.members.items() if places.sizes[row] != NO_MEMBER}
        return Sample(self.path, self.keys[row].decode("utf-8", "surrogateescape"), members)

    def samples(self, rows: Iterable[int] | None = None) -> Iterator[Sample]:
        return map(self.sample, range(len(self)) if rows is None else rows)


def read_member(shard: Path, place: Extent) -> bytes:
    """Bytes of a shard by their place, checked.

    Raises:
        DataError: If the shard has gone, or holds other bytes there than when it was indexed.
    """
    try:
        opened = _open(shard)  # a name of its own: the file must not close before it is read
        data = os.pread(opened.number, place.size, place.offset)
    except OSError as error:
        raise DataError("shard cannot be read any more", where=shard, got=error.strerror) from error
    if len(data) != place.size or zlib.crc32(data) != place.checksum:
        raise DataError("shard changed since it was indexed", where=shard, remedy="index it again: bkd data check")
    return data


class _OpenFile:
    """A descriptor that closes when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=64)  # a process has few descriptors
def _open(path: Path) -> _OpenFile:
    return _OpenFile(path)


def forget_open_shards() -> None:
    """Close shards that were read, so that replaced ones are opened anew."""
    _open.cache_clear()
