"""From SHARDS and a teacher to latents that can be trained on; `bkd data cache` and `bkd train` take the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bkd.data.cache import cache_latents
from bkd.data.captions import CaptionSource
from bkd.data.filters import parse_filters
from bkd.data.latent_encoder import encoder_of, latent_settings
from bkd.data.latent_set import LatentSet
from bkd.data.latent_shards import (
    LatentDescription,
    LatentSettings,
    is_cached,
    read_description,
    require_same_settings,
)
from bkd.data.shapes_shards import find_sources
from bkd.data.survey import DataWish, SurveyedShard, survey
from bkd.errors import DataError

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class Caching:
    """Latents that are to be made, or that are there.

    Attributes:
        settings: What they depend on besides the samples.
        wish: Which samples.
        shards: As surveyed; empty when the latents are there.
        folder: Where the latents are or will be.
    """

    settings: LatentSettings
    wish: DataWish
    shards: tuple[SurveyedShard, ...]
    folder: Path

    @property
    def num_samples(self) -> int | None:
        """Wanted samples; None where shards are remote and not counted yet."""
        if not self.shards:
            return len(LatentSet(self.folder, self.wish.cache))
        counts = [shard.num_selected for shard in self.shards]
        return None if None in counts else sum(count or 0 for count in counts)


def plan_caching(
    spec: str,
    teacher: Path,
    *,
    resolution: int,
    cache: Path,
    caption: str = "txt",
    filters: Mapping[str, str] | None = None,
    mirrored: bool = False,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Caching:
    """Find everything that can be wrong with the data, before a model is loaded or anything is written.

    Args:
        spec: SHARDS; a folder of cached latents is taken as it is.
        teacher: Pipeline folder.
        resolution: Side of the training images, in pixels.
        cache: Folder for things that can be made again.
        caption: `txt` or `json:FIELD`.
        filters: Field -> comparison; see `bkd.data.filters`.
        mirrored: Whether mirrored images are wanted, too.
        folder: For the latents; a folder of the cache, named by their fingerprint, when not given.
        progress: Called after each shard.

    Raises:
        DataError: If the shards, the filters or the cached latents cannot be used.
    """
    wish = DataWish(CaptionSource.parse(caption), parse_filters(filters or {}), cache)
    settings = latent_settings(
        teacher, resolution=resolution, mirrored=mirrored, caption=caption, filters=sorted(map(str, wish.filters))
    )
    path = Path(spec).expanduser()
    if is_cached(path):
        _check_cached(path, settings, asks=bool(filters) or caption != "txt")
        return Caching(settings, wish, (), path)
    shards = survey(find_sources(spec, cache), wish, progress)
    description = LatentDescription(settings, tuple(shard.described() for shard in shards))
    return Caching(settings, wish, shards, folder or cache / "latents" / description.fingerprint[:16])


def _check_cached(path: Path, wanted: LatentSettings, *, asks: bool) -> None:
    """Cached latents bring their own captions and filters; only a recipe that asks for others is refused."""
    there = read_description(path).settings
    if not asks:
        wanted = replace(wanted, caption=there.caption, filters=there.filters)
    if not wanted.mirrored:
        wanted = replace(wanted, mirrored=there.mirrored)
    require_same_settings(there, wanted, path)


def ensure_latents(
    caching: Caching,
    pipe: Any,
    *,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Encode what has not been encoded yet.

    Args:
        caching: As planned.
        pipe: The teacher, loaded and frozen.
        rank: Of this process.
        world_size: Processes that share the work.
        overwrite: Whether other latents in the folder may be replaced.
        progress: Called with (done, total) samples.
    """
    if caching.shards:
        encoder = encoder_of(pipe, caching.settings)
        cache_latents(
            caching.shards,
            caching.wish,
            encoder,
            caching.folder,
            rank=rank,
            world_size=world_size,
            overwrite=overwrite,
            progress=progress,
        )


def refuse_cached(spec: str) -> None:
    """For verbs that work on images.

    Raises:
        DataError: If SHARDS is a folder of cached latents.
    """
    if is_cached(Path(spec).expanduser()):
        raise DataError(
            "these shards hold cached latents, not images", where=spec, remedy="give the shards they were made from"
        )
