"""`bkd data filter`: new shards with the samples that pass, byte for byte as they were."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from bkd.data.filters import Filter, field_values, is_present, select
from bkd.data.images import open_image
from bkd.data.index import IMAGE_EXTENSIONS, Sample, ShardIndex
from bkd.data.indexing import index_shard
from bkd.data.metadata import parse_metadata
from bkd.data.output_set import OutputSet, open_output_set
from bkd.data.shards import Record
from bkd.data.sources import Source
from bkd.data.stats import shard_stats
from bkd.data.survey import DataWish, SurveyedShard, survey
from bkd.errors import DataError
from bkd.progress import Progress, silent

AESTHETIC = "aesthetic"
SCORED_AT_ONCE = 32
COPIED = (*IMAGE_EXTENSIONS, "txt", "json")


class Predictor(Protocol):
    """What `bkd.data.aesthetic.load_predictor` loads."""

    @property
    def version(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def score(self, images: Sequence[Image.Image]) -> list[float]: ...


def survey_to_filter(
    sources: Sequence[Source], wish: DataWish, predictor: Predictor | None, progress: Progress
) -> tuple[SurveyedShard, ...]:
    """See `survey`; where scores will be computed, missing ones are no reason yet."""
    if predictor is not None:
        wish = replace(wish, filters=_others(wish.filters))
    return survey(sources, wish, progress)


def _others(filters: Sequence[Filter]) -> tuple[Filter, ...]:
    return tuple(each for each in filters if each.field != AESTHETIC)


def _without_error(wish: Filter) -> Filter:
    """Once scores are computed, only images that cannot be decoded lack one: no reason to stop."""
    return replace(wish, missing="drop") if wish.missing == "error" else wish


def filter_shards(
    shards: Sequence[SurveyedShard],
    wish: DataWish,
    folder: Path,
    *,
    predictor: Predictor | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Counter[str]:
    """Write the wanted samples of every shard into a shard of their own; finished ones are left alone.

    Args:
        shards: As surveyed.
        wish: With which they were.
        folder: Output.
        predictor: Gives an aesthetic score to samples that have none and pass all other filters.
        overwrite: Whether a data set of other settings may be replaced.
        progress: Called with (done, total) shards.

    Returns:
        Reason -> samples left out for it; `kept` is the number of the others.
    """
    settings = {
        "caption": str(wish.caption),
        "filters": [str(each) for each in wish.filters],
        "predictor": f"{predictor.version} {predictor.digest}" if predictor else None,
        "sources": [[source.name, source.identity] for source in map(SurveyedShard.described, shards)],
    }
    output = open_output_set(folder, "filter", len(shards), settings, overwrite=overwrite)
    totals: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        if not output.is_finished(number):
            with shard.source.hold() as held:
                _filter_shard(output, number, held, wish, predictor)
            index_shard(output.path(number), wish.cache)
        stats = shard_stats(output.path(number))
        totals.update({"kept": stats["successes"], **stats["left_out"]})
        progress(number + 1, len(shards))
    return totals


def _filter_shard(output: OutputSet, number: int, shard: Path, wish: DataWish, predictor: Predictor | None) -> None:
    index = index_shard(shard, wish.cache)
    scores: dict[int, float] = {}
    filters = wish.filters
    if predictor is not None:
        filters = (*_others(filters), *(_without_error(each) for each in filters if each.field == AESTHETIC))
        scores = _missing_scores(index, wish, predictor)
        known = field_values(index, AESTHETIC, wish.caption).copy()
        known[list(scores)] = list(scores.values())
        index = replace(index, fields={**index.fields, AESTHETIC: known})
    selection = select(index, wish.caption, filters)
    about = {} if predictor is None else {"aesthetic_predictor": f"{predictor.version} {predictor.digest}"}
    records = (
        _record(index.sample(row), {AESTHETIC: scores[row], **about} if row in scores else {})
        for row in selection.rows.tolist()
    )
    output.write(number, records, count=len(index), left_out=dict(selection.reasons), scored=len(scores))


def _missing_scores(index: ShardIndex, wish: DataWish, predictor: Predictor) -> dict[int, float]:
    """Row -> score, of the samples that lack one and pass all filters that do not ask for it."""
    lacking = ~is_present(field_values(index, AESTHETIC, wish.caption))
    rows = [row for row in select(index, wish.caption, _others(wish.filters)).rows.tolist() if lacking[row]]
    scores: dict[int, float] = {}
    for start in range(0, len(rows), SCORED_AT_ONCE):
        images = {}
        for row in rows[start : start + SCORED_AT_ONCE]:
            sample = index.sample(row)
            with suppress(DataError):  # an image that cannot be decoded stays without a score
                images[row] = open_image(sample.read(sample.image_extension or ""))
        if images:
            scores |= dict(zip(images, predictor.score(list(images.values())), strict=True))
    return scores


def _record(sample: Sample, more: Mapping[str, Any]) -> Record:
    """A sample's members as they are; `more` goes into its KEY.json."""
    members: dict[str, Any] = {name: sample.read(name) for name in COPIED if name in sample.members}
    if more:
        metadata = parse_metadata(members.get("json")) or {}
        members["json"] = json.dumps({**metadata, **more}).encode()
    return {"__key__": sample.key, **members}
