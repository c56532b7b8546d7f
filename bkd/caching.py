"""From SHARDS and a teacher to latents that can be trained on; `bkd data cache` and `bkd train` take the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bkd.data.cache import cache_latents
from bkd.data.captions import CaptionSource
from bkd.data.latent_encoder import encoder_of, latent_settings
from bkd.data.latent_folder import LatentFolder, find_latents, open_latents
from bkd.data.latent_set import LatentSet
from bkd.data.latent_shards import LatentDescription, LatentSettings, require_same_settings
from bkd.data.order import WINDOW
from bkd.data.sources import find_sources
from bkd.data.survey import DataWish, SurveyedShard, survey
from bkd.errors import DataError
from bkd.model_folder import native_resolution
from bkd.models import best_device, load_pipeline

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class Caching:
    """Latents that are to be made, or that are there.

    Attributes:
        settings: What they depend on besides the samples.
        wish: Which samples.
        shards: As surveyed; empty when the latents are there.
        folder: Where the latents will be.
        found: The latents that are there.
    """

    settings: LatentSettings
    wish: DataWish
    shards: tuple[SurveyedShard, ...] = ()
    folder: Path = Path()
    found: LatentFolder | None = None

    @property
    def num_samples(self) -> int | None:
        """Wanted samples; None where shards are remote and not counted yet."""
        if self.found is not None:
            return sum(int(stats["successes"]) for stats in self.found.stats)
        counts = [shard.num_selected for shard in self.shards]
        return None if None in counts else sum(count or 0 for count in counts)


def plan_caching(
    spec: str,
    teacher: Path,
    wish: DataWish,
    *,
    resolution: int,
    mirrored: bool = False,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Caching:
    """Find everything that can be wrong with the data, before a model is loaded or anything is written.

    Args:
        spec: SHARDS; a folder of cached latents is taken as it is.
        teacher: Pipeline folder.
        wish: Which samples.
        resolution: Side of the training images, in pixels.
        mirrored: Whether mirrored images are wanted, too.
        folder: For the latents; a folder of the cache, named by their fingerprint, when not given.
        progress: Called after each shard.

    Raises:
        DataError: If the shards, the filters or the cached latents cannot be used.
    """
    settings = latent_settings(
        teacher,
        resolution=resolution,
        mirrored=mirrored,
        caption=str(wish.caption),
        filters=sorted(map(str, wish.filters)),
    )
    found = find_latents(spec, wish.cache, remote_cache_gib=wish.remote_cache_gib)
    if found is not None:
        _check_cached(found, settings, asks=bool(wish.filters) or wish.caption != CaptionSource())
        return Caching(settings, wish, found=found)
    sources = find_sources(spec, wish.cache, remote_cache_gib=wish.remote_cache_gib)
    shards = survey(sources, wish, progress)
    description = LatentDescription(settings, tuple(shard.described() for shard in shards))
    return Caching(settings, wish, shards, folder or wish.cache / "latents" / description.fingerprint[:16])


def _check_cached(found: LatentFolder, wanted: LatentSettings, *, asks: bool) -> None:
    """Cached latents bring their own captions and filters; only a recipe that asks for others is refused."""
    there = found.description.settings
    if not asks:
        wanted = replace(wanted, caption=there.caption, filters=there.filters)
    if not wanted.mirrored:
        wanted = replace(wanted, mirrored=there.mirrored)
    require_same_settings(there, wanted, found.name)


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
    if caching.found is None:
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


def read_latents(caching: Caching, *, window: int = WINDOW) -> LatentSet:
    """The latents, when all of them are there.

    Args:
        caching: As planned; `ensure_latents` must have ended.
        window: Shards that are shuffled together.
    """
    return LatentSet(caching.found or open_latents(caching.folder), caching.wish.cache, window=window)


def cache_to_folder(
    spec: str,
    teacher: Path,
    output: Path,
    wish: DataWish,
    *,
    resolution: int | None,
    mirrored: bool,
    overwrite: bool,
    rank: int,
    world_size: int,
    phase: Callable[[str], None],
    progress: Progress,
) -> None:
    """`bkd data cache`: survey the shards, load the teacher, encode.

    Args:
        spec: SHARDS.
        teacher: Pipeline folder.
        output: Folder for the latents.
        wish: Which samples.
        resolution: Side of the images, in pixels; the teacher's own when not given.
        mirrored: Whether mirrored images are encoded, too.
        overwrite: Whether other latents in the folder may be replaced.
        rank: Of this process.
        world_size: Processes that share the work.
        phase: Called with one line when something new begins.
        progress: Called with (done, total).

    Raises:
        BkdError: If the shards, the teacher or the folder cannot be used.
    """
    if find_latents(spec, wish.cache, remote_cache_gib=wish.remote_cache_gib):
        raise DataError(
            "these shards hold cached latents, not images", where=spec, remedy="give the shards they were made from"
        )
    phase("indexing")
    caching = plan_caching(
        spec,
        teacher,
        wish,
        resolution=resolution or native_resolution(teacher),
        mirrored=mirrored,
        folder=output,
        progress=progress,
    )
    phase("loading the teacher")
    pipe = load_pipeline(teacher, device=best_device())
    phase(f"encoding {counted_images(caching.num_samples)}")
    ensure_latents(caching, pipe, rank=rank, world_size=world_size, overwrite=overwrite, progress=progress)


def counted_images(number: int | None) -> str:
    """`10,000 images`, or what to say where they are not counted yet."""
    return "remote shards" if number is None else f"{number:,} images"
