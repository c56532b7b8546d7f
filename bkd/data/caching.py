"""From SHARDS and a teacher to latents that can be trained on; `bkd data cache` and `bkd train` take the same way."""

from __future__ import annotations

import time
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
from bkd.data.output_set import ALONE, described_set
from bkd.data.sources import find_sources
from bkd.data.survey import DataWish, SurveyedShard, survey
from bkd.environment import Place
from bkd.errors import DataError
from bkd.models.folder import vae_factor
from bkd.progress import Progress, silent


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
    progress: Progress = silent,
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
    _check_resolution(teacher, resolution)
    settings = latent_settings(
        teacher,
        resolution=resolution,
        mirrored=mirrored,
        caption=str(wish.caption),
        filters=sorted(map(str, wish.filters)),
    )
    found = None if folder else find_latents(spec, wish.cache, remote_cache_gib=wish.remote_cache_gib)
    if found is not None:
        _check_cached(found, settings, asks=bool(wish.filters) or wish.caption != CaptionSource())
        return Caching(settings, wish, found=found)
    sources = find_sources(spec, wish.cache, remote_cache_gib=wish.remote_cache_gib)
    shards = survey(sources, wish, progress)
    description = LatentDescription(settings, tuple(shard.described() for shard in shards))
    return Caching(settings, wish, shards, folder or wish.cache / "latents" / description.fingerprint[:16])


def _check_resolution(teacher: Path, resolution: int) -> None:
    factor = vae_factor(teacher)
    if resolution % factor:
        raise DataError(
            "the autoencoder cannot encode images of this size",
            where="resolution",
            got=f"{resolution} px",
            allowed=f"a multiple of {factor}",
            remedy=f"{max(1, round(resolution / factor)) * factor} px",
        )


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
    load_teacher: Callable[[], Any],
    *,
    place: Place = ALONE,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Encode what has not been encoded yet.

    Args:
        caching: As planned.
        load_teacher: Loads its pipeline, frozen; UNet and text encoders are not needed. Called only when there is
            something to encode.
        place: Of this process among those that share the work.
        overwrite: Whether other latents in the folder may be replaced.
        progress: Called with (done, total) samples.
    """
    if caching.found is None:
        cache_latents(
            caching.shards,
            caching.wish,
            caching.settings,
            lambda: encoder_of(load_teacher(), caching.settings),
            caching.folder,
            place=place,
            overwrite=overwrite,
            progress=progress,
        )


def wait_for_latents(caching: Caching, progress: Progress = silent) -> None:
    """Until other processes, perhaps on other machines, have encoded their shares, too.

    Args:
        caching: As planned; this process's share must be done.
        progress: Called with (done, total) shards.
    """
    output = None if caching.found is not None else described_set(caching.folder)
    if output is None:
        return
    missing = output.unfinished()
    while missing:
        progress(output.num_shards - len(missing), output.num_shards)
        time.sleep(1)
        missing = [number for number in missing if not output.is_finished(number)]


def read_latents(caching: Caching, *, window: int = WINDOW) -> LatentSet:
    """The latents, when all of them are there.

    Args:
        caching: As planned; `ensure_latents` must have ended.
        window: Shards that are shuffled together.
    """
    return LatentSet(caching.found or open_latents(caching.folder), caching.wish.cache, window=window)


def counted_images(number: int | None) -> str:
    """`10,000 images`, or what to say where they are not counted yet."""
    return "remote shards" if number is None else f"{number:,} images"
