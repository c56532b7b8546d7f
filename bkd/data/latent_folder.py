"""A finished folder of cached latents, on this machine or at an address."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.data.copies import LocalCopies
from bkd.data.latent_shards import LatentDescription, holds_latents
from bkd.data.output_set import DATASET_FILE, OutputSet, dataset_facts, require_finished
from bkd.data.remote import is_remote, public_name
from bkd.data.shards import shard_name
from bkd.data.sources import AT_ONCE, LocalShard, RemoteShard, Source, local_copies
from bkd.data.stats import shard_stats, stats_file
from bkd.errors import DataError


@dataclass(frozen=True)
class LatentFolder:
    """What is known of cached latents before they are read.

    Attributes:
        name: What may be shown of the folder.
        description: What the latents were made from and with.
        shards: In order.
        stats: What was recorded beside each.
    """

    name: str
    description: LatentDescription
    shards: tuple[Source, ...]
    stats: tuple[Mapping[str, Any], ...]


def find_latents(spec: str, cache: Path, *, remote_cache_gib: float) -> LatentFolder | None:
    """The cached latents that SHARDS means, or None where it means images.

    Args:
        spec: A folder, or an address that ends with a slash.
        cache: Folder for things that can be made again.
        remote_cache_gib: Bound of the copies of remote shards.

    Raises:
        DataError: If caching has not finished, or the description is damaged.
    """
    if is_remote(spec):
        return _remote_latents(spec, local_copies(cache, remote_cache_gib))
    folder = Path(spec).expanduser()
    return open_latents(folder) if holds_latents(folder) else None


def open_latents(folder: Path) -> LatentFolder:
    """Cached latents on this machine.

    Raises:
        DataError: If caching has not finished, or the description is damaged.
    """
    description = LatentDescription.of(dataset_facts(folder) or {}, folder / DATASET_FILE)
    output = OutputSet(folder, len(description.sources), description.fingerprint)
    require_finished(output)
    paths = [output.path(number) for number in range(output.num_shards)]
    return LatentFolder(str(folder), description, tuple(map(LocalShard, paths)), tuple(map(shard_stats, paths)))


def _remote_latents(url: str, copies: LocalCopies) -> LatentFolder | None:
    if not public_name(url).endswith("/"):
        return None
    try:
        with copies.hold(_inside(url, DATASET_FILE)) as path:
            facts = json.loads(path.read_bytes())
    except (DataError, ValueError):  # a folder of images, or none at all: expanding it will say so
        return None
    description = LatentDescription.of(facts, public_name(url))
    names = [shard_name(number) for number in range(len(description.sources))]

    def stats_of(name: str) -> Mapping[str, Any]:
        with copies.hold(_inside(url, stats_file(Path(name)).name)) as path:
            return dict(json.loads(path.read_bytes()))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        stats = tuple(pool.map(stats_of, names))
    for name, found in zip(names, stats, strict=True):
        if found.get("fingerprint") != description.fingerprint:
            raise DataError(
                "this data set has not been written to its end, or holds parts of two",
                where=public_name(url),
                got=f"{name} is of another data set",
                remedy="copy the finished folder there again",
            )
    shards = tuple(RemoteShard(_inside(url, name), copies) for name in names)
    return LatentFolder(public_name(url), description, shards, stats)


def _inside(url: str, name: str) -> str:
    """The address of a file in a folder, with the folder's token."""
    path, mark, token = url.partition("?")
    return f"{path}{name}{mark}{token}"
