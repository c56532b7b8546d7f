"""Where a shard comes from: a file here, or an address that is copied whole before it is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from bkd.data.copies import LocalCopies
from bkd.data.latent_shards import holds_latents
from bkd.data.output_set import described_set, require_finished
from bkd.data.remote import expand_remote, is_remote, public_name
from bkd.data.shapes import EMBEDDED, THEME_SHARDS
from bkd.data.shapes_shards import NUM_THEME, ensure_shapes_shards
from bkd.data.shards import expand_shards
from bkd.errors import DataError

REMOTE_CACHE_GIB = 50.0
AT_ONCE = 8
"""Servers are asked for so many files at a time."""


class Source(Protocol):
    """A shard, wherever it is.

    Attributes:
        name: What may be shown and stored of it.
        is_remote: Whether it must be fetched to be read.
    """

    @property
    def name(self) -> str: ...

    @property
    def is_remote(self) -> bool: ...

    def identity(self) -> str:
        """Of a remote shard: changes with its contents, and is known before it is fetched."""
        ...

    @contextmanager
    def hold(self) -> Iterator[Path]:
        """The shard on this machine, for as long as the block lasts."""
        ...


@dataclass(frozen=True)
class LocalShard:
    """A tar on this machine."""

    path: Path
    is_remote = False

    @property
    def name(self) -> str:
        return self.path.name

    def identity(self) -> str:
        raise NotImplementedError("a local shard is known by its index")

    @contextmanager
    def hold(self) -> Iterator[Path]:
        yield self.path


@dataclass(frozen=True)
class RemoteShard:
    """A tar at an address.

    Attributes:
        url: With whatever token it needs; never shown or stored.
        copies: Where its copy is kept.
    """

    url: str
    copies: LocalCopies
    is_remote = True

    @property
    def name(self) -> str:
        return public_name(self.url).rpartition("/")[2]

    def identity(self) -> str:
        found = self.copies.describe(self.url)
        return hashlib.sha256(f"{public_name(self.url)} {found.size} {found.etag}".encode()).hexdigest()

    @contextmanager
    def hold(self) -> Iterator[Path]:
        with self.copies.hold(self.url) as path:
            yield path


def find_sources(spec: str, cache: Path, *, remote_cache_gib: float = REMOTE_CACHE_GIB) -> list[Source]:
    """The shards that SHARDS means; `shapes` is the embedded world, `shapes-theme` its theme.

    Args:
        spec: A tar, a folder, a glob, a brace pattern or an address.
        cache: Folder for things that can be made again.
        remote_cache_gib: Bound of the copies of remote shards.

    Raises:
        DataError: If nothing matches, an address is of another kind, or a folder is still being written by `bkd data`.
    """
    if is_remote(spec) or spec.startswith("pipe:"):
        copies = local_copies(cache, remote_cache_gib)
        return [RemoteShard(url, copies) for url in expand_remote(spec)]
    if spec == EMBEDDED:
        spec = str(ensure_shapes_shards(cache))
    elif spec == THEME_SHARDS:
        spec = str(ensure_shapes_shards(cache, split="theme", num_samples=NUM_THEME))
    paths = expand_shards(spec)
    if holds_latents(Path(spec).expanduser()):
        raise DataError(
            "these shards hold cached latents, not images", where=spec, remedy="give the shards they were made from"
        )
    if (output := described_set(Path(spec).expanduser())) is not None:
        require_finished(output)
    return [LocalShard(path) for path in paths]


@lru_cache(maxsize=8)
def local_copies(cache: Path, remote_cache_gib: float) -> LocalCopies:
    """The copies of remote shards: one bound for all data sets of a cache folder."""
    return LocalCopies(cache / "remote", max_bytes=round(remote_cache_gib * 2**30))


def require_room(shards: Sequence[Source], at_once: int) -> None:
    """Refuse to read remote shards through a cache that cannot hold those that are read together.

    Raises:
        DataError: If the largest `at_once` of them do not fit.
    """
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    if not remote:
        return
    copies = remote[0].copies
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sizes = sorted(
            (found.size for found in pool.map(copies.describe, [shard.url for shard in remote])), reverse=True
        )
    needed = sum(sizes[:at_once])
    if needed > copies.max_bytes:
        raise DataError(
            "the cache for remote shards is too small",
            where="data.remote_cache_gib",
            got=f"{copies.max_bytes / 2**30:.2f} GiB",
            allowed=f"{needed / 2**30:.2f} GiB or more: {min(at_once, len(sizes))} shards are shuffled together",
            remedy=f"data.remote_cache_gib={math.ceil(2 * needed / 2**30)}, so that the next ones fit too, "
            "or fewer data.shuffle_shards",
        )


def expect(shards: Sequence[Source]) -> None:
    """Say which shards will be read next; remote ones are fetched ahead."""
    remote = [shard for shard in shards if isinstance(shard, RemoteShard)]
    if remote:
        remote[0].copies.want([shard.url for shard in remote])
