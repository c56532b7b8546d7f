"""`bkd data check`: everything that would spoil a training on some shards, found in seconds and without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bkd.data.captions import CaptionSource
from bkd.data.filters import NO_IMAGE, field_values, is_about_captions, is_present, num_bad, select
from bkd.data.images import open_image
from bkd.data.index import IMAGE_EXTENSIONS, Sample, ShardIndex
from bkd.data.indexing import index_shard, index_shards
from bkd.data.latent_folder import find_latents
from bkd.data.latent_set import LatentSet
from bkd.data.metadata import ALIASES
from bkd.data.reading import MAX_BAD_FRACTION
from bkd.data.remote import shown
from bkd.data.sources import LocalShard, Source
from bkd.data.stats import shard_stats, stats_file
from bkd.data.survey import DataWish
from bkd.errors import DataError
from bkd.progress import Progress, silent

LOOKED_AT = 200
"""Images that are decoded, spread over all shards."""
QUANTILES = (0, 5, 50, 95, 100)
BORDER_LEVEL = 250


@dataclass
class CheckReport:
    """What was found in some shards.

    Attributes:
        num_shards: Asked for.
        num_bytes: Of those that could be read.
        num_samples: In them.
        members: Extension -> how many, of what is read.
        foreign: Extension -> how many, of what is left alone.
        metadata_fields: Name in KEY.json -> samples that have a value.
        quantiles: Field -> its values at `QUANTILES` percent; caption length in characters, sizes in pixels.
        coverage: Field -> samples that have a value.
        decoded: Images that were looked at, and `undecodable`, `bordered` and `smaller` ones among them.
        kept: Samples that training would use.
        reasons: Why it would not use the others.
        missing: Filter that allows no missing values -> samples that lack one.
        num_unreadable: KEY.json that are no JSON mapping.
        num_duplicates: Images whose bytes an earlier one has, too.
        num_repeated_keys: Samples whose key an earlier one has, too.
        problems: Why training could not work; empty when it could.
        notes: What somebody should know.
    """

    num_shards: int
    num_bytes: int = 0
    num_samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    foreign: Counter[str] = field(default_factory=Counter)
    metadata_fields: Counter[str] = field(default_factory=Counter)
    quantiles: dict[str, list[float]] = field(default_factory=dict)
    coverage: dict[str, int] = field(default_factory=dict)
    decoded: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    num_unreadable: int = 0
    num_duplicates: int = 0
    num_repeated_keys: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_shards(
    sources: Sequence[Source],
    wish: DataWish,
    *,
    resolution: int | None,
    progress: Progress = silent,
) -> CheckReport:
    """Look at shards as training would, and at everything around it that goes wrong in practice.

    Args:
        sources: The shards.
        wish: What training would take.
        resolution: Side of the training images in pixels, where it is known.
        progress: Called with (done, total) shards.
    """
    report = CheckReport(len(sources))
    columns = _Columns()
    for number, source in enumerate(sources):
        try:
            with source.hold() as path:
                index = index_shard(path, wish.cache)
                _add_shard(report, index, path)
                columns.add(index, wish.caption)
                _select(report, index, wish)
                for sample in _spread(index, number, len(sources)):
                    _look_at(report, sample, resolution)
        except DataError as error:
            report.problems.append(str(error))
        progress(number + 1, len(sources))
    columns.finish(report)
    report.problems += [_missing(report, wished, count) for wished, count in report.missing.items() if count]
    _conclude(report, resolution)
    return report


def _add_shard(report: CheckReport, index: ShardIndex, path: Path) -> None:
    report.num_samples += len(index)
    report.num_bytes += path.stat().st_size
    report.members.update({name: int(places.present().sum()) for name, places in index.members.items()})
    report.foreign.update(index.contents.foreign)
    report.metadata_fields.update(index.contents.metadata_fields)
    if "json" in index.members:
        report.num_unreadable += int(index.members["json"].present().sum()) - index.contents.num_metadata
    expected = shard_stats(path).get("successes")
    if isinstance(expected, int) and expected != len(index):
        report.notes.append(
            f"{path.name}: {len(index):,} samples, though {stats_file(path).name} says {expected:,}; "
            "download it again if they matter"
        )
    if not len(index):
        report.notes.append(f"{path.name}: holds no samples")


def _select(report: CheckReport, index: ShardIndex, wish: DataWish) -> None:
    """Count what training would use; values that may not be missing are gathered for one problem, not one a shard."""
    for each in wish.filters:
        if each.missing == "error":
            absent = ~is_present(field_values(index, each.field, wish.caption))
            report.missing[str(each)] += int(absent.sum())
    without_error = [replace(each, missing="drop") if each.missing == "error" else each for each in wish.filters]
    selection = select(index, wish.caption, without_error)
    report.kept += len(selection)
    report.reasons.update(selection.reasons)


def _spread(index: ShardIndex, number: int, num_shards: int) -> Iterator[Sample]:
    """A shard's part of `LOOKED_AT` images, spread evenly over all shards and over each."""
    share = (number + 1) * LOOKED_AT // num_shards - number * LOOKED_AT // num_shards
    rows = np.flatnonzero(index.has(*IMAGE_EXTENSIONS))
    if share and len(rows):
        yield from index.samples(rows[np.linspace(0, len(rows) - 1, min(share, len(rows))).astype(int)].tolist())


def _look_at(report: CheckReport, sample: Sample, resolution: int | None) -> None:
    report.decoded["looked at"] += 1
    try:
        image = open_image(sample.read(sample.image_extension or ""))
    except DataError:
        report.decoded["undecodable"] += 1
        return
    if resolution and min(image.size) < resolution:
        report.decoded["smaller"] += 1
    if _has_border(image):
        report.decoded["bordered"] += 1


def _has_border(image: Image.Image) -> bool:
    """Whether two opposite edges are white and the other two are not: what `resize_mode=border` leaves."""
    pixels = np.asarray(image.convert("L"))
    top, bottom, left, right = (
        bool((edge >= BORDER_LEVEL).all()) for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    )
    return top == bottom and left == right and top != left


class _Columns:
    """Values of all samples, for quantiles and duplicates: 20 bytes a sample and field."""

    def __init__(self) -> None:
        self._fields: dict[str, list[NDArray[np.float32]]] = {}
        self._images: list[NDArray[np.uint64]] = []
        self._keys: list[NDArray[np.uint64]] = []

    def add(self, index: ShardIndex, caption: CaptionSource) -> None:
        for name in ("caption_length", *ALIASES):
            values = field_values(index, name, caption)
            self._fields.setdefault(name, []).append(values[is_present(values)])
        for extension in IMAGE_EXTENSIONS:
            if extension in index.members:
                places = index.members[extension]
                sums = (places.sizes.astype(np.uint64) << np.uint64(32)) | places.checksums
                self._images.append(sums[places.present()])
        self._keys.append(np.array([hash(key) & (2**63 - 1) for key in index.keys.tolist()], np.uint64))

    def finish(self, report: CheckReport) -> None:
        for name, parts in self._fields.items():
            values = np.concatenate(parts)
            report.coverage[name] = len(values)
            if len(values):
                report.quantiles[name] = [float(q) for q in np.percentile(values, QUANTILES, method="nearest")]
        report.num_duplicates = _num_repeated(self._images)
        report.num_repeated_keys = _num_repeated(self._keys)


def _num_repeated(parts: list[NDArray[np.uint64]]) -> int:
    values = np.concatenate([np.zeros(0, np.uint64), *parts])
    return len(values) - len(np.unique(values))


def _conclude(report: CheckReport, resolution: int | None) -> None:
    if not report.kept and not report.problems:
        report.problems.append(_nothing_kept(report))
    lacking = num_bad(report.reasons)
    if report.kept and lacking > MAX_BAD_FRACTION * report.num_samples:
        report.problems.append(
            f"{lacking:,} of {report.num_samples:,} samples lack an image or a caption: take captions from elsewhere "
            "(--caption json:FIELD), or say that these may go: filter caption_length by '>= 1, missing drop'"
        )
    looked, bad = report.decoded["looked at"], report.decoded["undecodable"]
    if looked and bad > looked / 10:
        report.problems.append(f"{bad} of {looked} images cannot be decoded: download the shards again")
    elif bad:
        report.notes.append(f"{bad} of {looked} images cannot be decoded; such samples are left out")
    bordered = report.decoded["bordered"]
    if bordered > looked / 20:
        report.notes.append(
            f"{bordered} of {looked} images have white borders: img2dataset's resize_mode=border, its default, adds "
            "them and a student learns them; download with --resize_mode keep_ratio or center_crop"
        )
    if smaller := report.decoded["smaller"]:
        report.notes.append(
            f"{smaller} of {looked} images are smaller than {resolution} px and would be enlarged; "
            f"to leave them out, filter by size: '>= {resolution}, missing drop'"
        )
    if report.num_unreadable:
        report.notes.append(f"{report.num_unreadable:,} KEY.json cannot be read; their fields count as missing")
    if report.num_duplicates:
        report.notes.append(f"{report.num_duplicates:,} images are byte for byte the same as an earlier one")
    if report.num_repeated_keys:
        report.notes.append(
            f"{report.num_repeated_keys:,} keys occur twice; harmless: a sample is known by its shard, too"
        )
    if report.foreign:
        listed = ", ".join(f"{count:,} .{name}" for name, count in report.foreign.most_common(5))
        report.notes.append(f"members that are never read: {listed}")


def _missing(report: CheckReport, wished: str, count: int) -> str:
    known = ", ".join(sorted(report.metadata_fields)) or "nothing that can be read"
    text = f"filter '{wished}': {count:,} of {report.num_samples:,} samples have no value; KEY.json has: {known}"
    return f"{text}; say what becomes of them: missing drop, or missing keep"


def _nothing_kept(report: CheckReport) -> str:
    if not report.num_samples:
        return "no samples: expected KEY.jpg|jpeg|png|webp with KEY.txt and KEY.json, as img2dataset writes them"
    listed = "; ".join(f"{count:,} {reason}" for reason, count in report.reasons.most_common())
    remedy = "loosen the filters"
    if is_about_captions(report.reasons):
        named = [name for name in report.metadata_fields if "caption" in name.lower() or "text" in name.lower()]
        remedy = f"take captions from KEY.json: json:{named[0]} (--caption, in a recipe data.caption)"
        if not named:
            remedy = "captions must lie in KEY.txt, or in a field of KEY.json"
    elif NO_IMAGE in report.reasons and report.reasons.most_common(1)[0][0] == NO_IMAGE:
        found = ", ".join(report.foreign) or "none"
        remedy = f"images must be {', '.join(IMAGE_EXTENSIONS)}; other members: {found}"
    return f"none of {report.num_samples:,} samples can be used: {listed}; {remedy}"


def require_usable(report: CheckReport, spec: str) -> None:
    """Refuse shards that no training could work with.

    Raises:
        DataError: With every problem that was found.
    """
    if report.problems:
        raise DataError("training on these shards could not work", where=shown(spec), got="\n  ".join(report.problems))


def as_json(report: CheckReport) -> Mapping[str, Any]:
    """The report for programs."""
    return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(report).items()}


def check_latents(spec: str, wish: DataWish) -> LatentSet | None:
    """Cached shards, every byte of those on this machine compared with what was written; None where SHARDS is images.

    Raises:
        DataError: If caching has not finished, or a shard is damaged.
    """
    found = find_latents(spec, wish.cache, remote_cache_gib=wish.remote_cache_gib)
    if found is None:
        return None
    index_shards([shard.path for shard in found.shards if isinstance(shard, LocalShard)], wish.cache)
    return LatentSet(found, wish.cache)
