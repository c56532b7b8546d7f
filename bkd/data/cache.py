"""Encode a data set once: latents and token ids in cached shards, one for each source shard.

The autoencoder costs about a third of a distillation step at 512 px, so its output is stored: mean and
deviation, not a sample, so that every epoch can draw a fresh one. Text encoding is cheap and stays in the loop.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from bkd.data.captions import CaptionSource
from bkd.data.filters import Selection
from bkd.data.images import images_at_once
from bkd.data.indexing import index_shard
from bkd.data.latent_encoder import LatentEncoder
from bkd.data.latent_shards import (
    DATASET_FILE,
    LatentDescription,
    read_description,
    require_same_settings,
    to_record,
)
from bkd.data.metadata import parse_metadata
from bkd.data.reading import MAX_BAD_FRACTION, DecodedSample, check_bad_fraction, decoded_samples
from bkd.data.shards import Record, sample_key, shard_name, write_shard
from bkd.data.stats import shard_stats
from bkd.data.survey import DataWish, SurveyedShard
from bkd.errors import DataError, OutputError
from bkd.files import write_atomically

MAX_BATCH = 64
SMALL_MEMBERS = 6 << 10
"""Bytes of a cached sample besides its moments, tar headers included."""
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def cache_latents(
    shards: Sequence[SurveyedShard],
    wish: DataWish,
    encoder: LatentEncoder,
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = lambda done, total: None,
) -> LatentDescription:
    """Encode every wanted sample that has not been encoded yet.

    Shard n becomes `folder/<n>.tar`, whole or not at all, and is left alone when it is there: an interrupted pass
    continues, and a second one does nothing. The same shards give the same bytes.

    Args:
        shards: As surveyed.
        wish: With which they were.
        encoder: Of the teacher that is to be distilled.
        folder: Output; may hold an unfinished pass over the same samples.
        rank: Of this process: it does every `world_size`-th shard.
        world_size: Processes that share the work.
        progress: Called with samples of this process's share; the total is an estimate where shards are remote.

    Raises:
        DataError: If too many samples of a shard are bad, the disk is too small, or the folder holds other latents.
    """
    description = LatentDescription(encoder.settings, tuple(shard.described() for shard in shards))
    _open_folder(folder, description)
    paths = [folder / shard_name(number) for number in range(len(shards))]
    mine = list(zip(paths, shards, strict=True))[rank::world_size]
    todo = [(path, shard) for path, shard in mine if not is_finished(path, description)]
    _check_space(folder, encoder, sum(shard.num_selected or 0 for _, shard in todo))
    counts = {path: shard.num_selected for path, shard in mine}
    done = sum(counts[path] or 0 for path in counts if is_finished(path, description))
    for path, shard in todo:
        with shard.source.hold() as held:
            selection = wish.select(held)
            counts[path] = len(selection)
            report = partial(_report, progress, done, _estimate(list(counts.values())))
            _cache_shard(path, selection, wish.caption, encoder, description, report)
        done += len(selection)
        index_shard(path, wish.cache)  # now, while its bytes are in memory
    progress(done, done)
    return description


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _estimate(counts: Sequence[int | None]) -> int:
    """Samples in all shards; those that are not here yet are taken to be like the others."""
    known = [count for count in counts if count is not None]
    return round(sum(known) / len(known) * len(counts))


def is_finished(path: Path, description: LatentDescription) -> bool:
    """Whether a cached shard is there, whole, and of this data set."""
    stats = shard_stats(path)
    return path.is_file() and stats.get("fingerprint") == description.fingerprint


def _open_folder(folder: Path, description: LatentDescription) -> None:
    if (folder / DATASET_FILE).is_file():
        there = read_description(folder)
        require_same_settings(there.settings, description.settings, folder)
        if there != description:
            raise OutputError(
                "the folder holds latents of other shards",
                where=folder,
                got=f"{len(there.sources)} shards, the first {there.sources[0].name}",
                allowed=f"{len(description.sources)} shards, the first {description.sources[0].name}",
                remedy="choose another -o, or add --overwrite",
            )
    write_atomically(folder / DATASET_FILE, description.to_json())


def _check_space(folder: Path, encoder: LatentEncoder, num_samples: int) -> None:
    """Refuse a pass that the disk cannot hold, before it begins."""
    factor = 2 ** (len(encoder.vae.config.block_out_channels) - 1)
    side = encoder.settings.resolution // factor
    moments = 2 * encoder.vae.config.latent_channels * side * side * 2
    each = moments * (2 if encoder.settings.mirrored else 1) + SMALL_MEMBERS
    free = shutil.disk_usage(folder).free
    if each * num_samples > free:
        raise DataError(
            "the disk is too small for these latents",
            where=folder,
            got=f"{free / 1e9:,.1f} GB free",
            allowed=f"{num_samples:,} samples of {each / 1024:,.0f} KiB: {each * num_samples / 1e9:,.1f} GB",
            remedy="choose another disk, fewer samples (filters), or no mirrored images",
        )


def _cache_shard(
    path: Path,
    selection: Selection,
    caption: CaptionSource,
    encoder: LatentEncoder,
    description: LatentDescription,
    report: Callable[[int], None],
) -> None:
    bad: Counter[str] = Counter()
    write_shard(
        path,
        _records(path.stem, selection, caption, encoder, bad, report),
        fingerprint=description.fingerprint,
        count=len(selection.index),
        left_out=dict(selection.reasons),
        bad=bad,
    )


def _records(
    stem: str,
    selection: Selection,
    caption: CaptionSource,
    encoder: LatentEncoder,
    bad: Counter[str],
    report: Callable[[int], None],
) -> Iterator[Record]:
    """Encoded samples in their order, keyed by shard and row; ends in an error when too many are bad."""
    resolution = encoder.settings.resolution
    samples = selection.index.samples(selection.rows.tolist())
    decoded = decoded_samples(samples, resolution, caption, bad)
    row = 0
    while chunk := list(islice(decoded, images_at_once(resolution, MAX_BATCH))):
        encoded = encoder.encode([item.image for item in chunk], [item.caption for item in chunk])
        for item, arrays in zip(chunk, encoded, strict=True):
            if arrays is None:
                bad["latents not finite"] += 1
                continue
            yield to_record(sample_key(int(stem), row), arrays, _metadata(item))
            row += 1
        report(row + bad.total())
    if bad["latents not finite"]:
        _refuse_many_infinite(bad["latents not finite"], len(selection), selection.index.path)
    check_bad_fraction(bad, len(selection), selection.index.path)


def _refuse_many_infinite(count: int, total: int, where: Path) -> None:
    if count > MAX_BAD_FRACTION * total:
        raise DataError(
            "the autoencoder returned values that are not finite",
            where=where,
            got=f"{count:,} of {total:,} latents",
            remedy="use an autoencoder that is not overflowing: SDXL's own needs float32 weights",
        )


def _metadata(item: DecodedSample) -> dict[str, Any]:
    known = parse_metadata(item.sample.read_if_present("json")) or {}
    return {**known, "caption": item.caption, "source_key": item.sample.key}
