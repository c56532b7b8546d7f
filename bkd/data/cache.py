"""Encode a data set once: latents and token ids in cached shards, one for each source shard.

The autoencoder costs about a third of a distillation step at 512 px, so its output is stored: mean and
deviation, not a sample, so that every epoch can draw a fresh one. Text encoding is cheap and stays in the loop.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bkd.data.captions import CaptionSource
from bkd.data.filters import Selection
from bkd.data.images import images_at_once
from bkd.data.indexing import index_shard
from bkd.data.latent_encoder import LatentEncoder
from bkd.data.latent_shards import MADE_BY, LatentDescription, LatentSettings, to_record
from bkd.data.metadata import parse_metadata
from bkd.data.output_set import ALONE, OutputSet, open_output_set
from bkd.data.reading import MAX_BAD_FRACTION, DecodedSample, check_bad_fraction, decoded_samples
from bkd.data.shards import Record, sample_key
from bkd.data.survey import DataWish, SurveyedShard
from bkd.environment import Place
from bkd.errors import DataError
from bkd.progress import Progress, part_of, silent

MAX_BATCH = 64
SMALL_MEMBERS = 6 << 10
"""Bytes of a cached sample besides its moments, tar headers included."""


def cache_latents(
    shards: Sequence[SurveyedShard],
    wish: DataWish,
    settings: LatentSettings,
    load_encoder: Callable[[], LatentEncoder],
    folder: Path,
    *,
    place: Place = ALONE,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Encode every wanted sample that has not been encoded yet.

    Shard n becomes `folder/<n>.tar`, whole or not at all, and is left alone when it is there: an interrupted pass
    continues, and a second one does nothing. The same shards give the same bytes.

    Args:
        shards: As surveyed.
        wish: With which they were.
        settings: What the latents depend on besides.
        load_encoder: Of the teacher that is to be distilled; called only when there is something to encode.
        folder: Output; may hold an unfinished pass over the same samples.
        place: Of this process among those that share the work.
        overwrite: Whether latents of other samples or settings may be replaced.
        progress: Called with samples of this process's share; the total is an estimate where shards are remote.

    Raises:
        DataError: If too many samples of a shard are bad, or the disk is too small.
        OutputError: If the folder holds something else.
    """
    description = LatentDescription(settings, tuple(shard.described() for shard in shards))
    output = open_output_set(folder, MADE_BY, len(shards), description.facts(), place=place, overwrite=overwrite)
    counts = {number: shards[number].num_selected for number in output.share(place)}
    todo = output.unfinished(place)
    done = sum(counts[number] or 0 for number in counts if number not in todo)
    if not todo:
        progress(done, done)
        return
    encoder = load_encoder()
    _check_space(folder, encoder, sum(counts[number] or 0 for number in todo))
    for number in todo:
        with shards[number].source.hold() as held:
            selection = wish.select(held)
            counts[number] = len(selection)
            report = part_of(progress, done, _estimate(list(counts.values())))
            _cache_shard(output, number, selection, wish.caption, encoder, report)
        done += len(selection)
        index_shard(output.path(number), wish.cache)  # now, while its bytes are in memory
    progress(done, done)


def _estimate(counts: Sequence[int | None]) -> int:
    """Samples in all shards; those that are not here yet are taken to be like the others."""
    known = [count for count in counts if count is not None]
    return round(sum(known) / len(known) * len(counts))


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
    output: OutputSet,
    number: int,
    selection: Selection,
    caption: CaptionSource,
    encoder: LatentEncoder,
    report: Callable[[int], None],
) -> None:
    bad: Counter[str] = Counter()
    records = _records(number, selection, caption, encoder, bad, report)
    output.write(number, records, count=len(selection.index), left_out=dict(selection.reasons), bad=bad)


def _records(
    number: int,
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
            yield to_record(sample_key(number, row), arrays, _metadata(item))
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
