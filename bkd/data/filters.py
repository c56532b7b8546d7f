"""Filters on LAION's metadata: every sample left out has a reason, and missing values are never an accident."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bkd.data.captions import CaptionSource
from bkd.data.index import IMAGE_EXTENSIONS, ShardIndex
from bkd.data.metadata import ALIASES
from bkd.errors import DataError, one_of, suggest

Missing = Literal["drop", "keep", "error"]
DERIVED = {"size": ("width", "height"), "original_size": ("original_width", "original_height")}
"""The shorter side of the stored and of the downloaded image."""
FIELDS = (*ALIASES, *DERIVED, "caption_length", "language")
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
TERM = re.compile(r"(>=|<=|>|<|=)\s*(\S+)")
FORM = (
    "FIELD: 'OPERATOR VALUE, …, missing drop|keep|error' with >= <= > < or =, such as "
    "aesthetic: '>= 6.5, missing drop'; on the command line --where 'aesthetic >= 6.5, missing drop'"
)
NO_IMAGE = "no image"
NO_CAPTION = ("no txt", "no json", "no text", "caption empty")
"""How the reasons begin for which a sample has no caption."""


@dataclass(frozen=True)
class Filter:
    """What a field must be for a sample to be kept.

    Attributes:
        field: One of `FIELDS`.
        terms: Operator and value of each comparison; all must hold. A language is compared by `=` with `en|de|…`.
        missing: What becomes of samples without a value: null, NaN and infinite count as missing, 0 does not.
    """

    field: str
    terms: tuple[tuple[str, str], ...]
    missing: Missing

    def __str__(self) -> str:
        return ", ".join([f"{self.field} {' and '.join(map(' '.join, self.terms))}", f"missing: {self.missing}"])

    def holds(self, values: NDArray[Any], name: str, value: str) -> NDArray[np.bool_]:
        """(N,): for which samples one of the comparisons holds; never for a missing value."""
        if self.field == "language":
            return np.isin(values, value.lower().split("|"))
        # As float32, like the values: in double precision a stored 0.7 is less than 0.7.
        return np.asarray(OPERATORS[name](values, np.float32(value)))


def parse_filter(field: str, text: str) -> Filter:
    """Read a filter such as `>= 6.5, missing drop`.

    Args:
        field: One of `FIELDS`.
        text: Comparisons and, where values may be missing, what happens then; `error` when not said.

    Raises:
        DataError: If the field is unknown or the text has another form.
    """
    one_of(field, FIELDS, kind="filter field", error=DataError)
    terms: list[tuple[str, str]] = []
    missing: Missing | None = None
    for part in (part.strip() for part in str(text).split(",")):
        match = TERM.fullmatch(part)
        if match and _is_value(field, *match.groups()):
            terms.append((match[1], match[2]))
        elif part.startswith("missing") and missing is None and part[7:].strip(" :") in get_args(Missing):
            missing = part[7:].strip(" :")  # type: ignore[assignment]
        else:
            raise DataError("this is no filter", where=f"filter {field}", got=repr(text), allowed=FORM)
    if not terms:
        raise DataError("a filter needs a comparison", where=f"filter {field}", got=repr(text), allowed=FORM)
    return Filter(field, tuple(terms), missing or "error")


def parse_filters(filters: Mapping[str, str]) -> tuple[Filter, ...]:
    """All filters of a recipe, or of a command line.

    Raises:
        DataError: For the first that cannot be read.
    """
    return tuple(parse_filter(field, text) for field, text in filters.items())


def parse_where(text: str) -> Filter:
    """Read a filter with its field in front, such as `aesthetic >= 6.5, missing drop`."""
    match = re.match(r"\s*(\w+)\s*(.*)", text, re.DOTALL)
    if match is None:
        raise DataError("this is no filter", where="--where", got=repr(text), allowed=FORM)
    return parse_filter(match[1], match[2])


def _is_value(field: str, name: str, value: str) -> bool:
    if field == "language":
        return name == "="
    try:
        return bool(np.isfinite(float(value)))
    except ValueError:
        return False


def field_values(index: ShardIndex, field: str, caption: CaptionSource) -> NDArray[Any]:
    """(N,): a field of every sample: float32 with NaN for missing, or for `language` text with "" for missing."""
    if field == "language":
        return np.array(index.language_names, dtype=np.str_)[index.languages]
    if field in DERIVED:
        one, other = (field_values(index, side, caption) for side in DERIVED[field])
        return np.asarray(np.minimum(one, other))
    if field == "caption_length":
        lengths: NDArray[np.float32] = caption.lengths(index).astype(np.float32)
        lengths[lengths < 0] = np.nan
        return lengths
    missing: NDArray[np.float32] = np.full(len(index), np.nan, np.float32)
    values: NDArray[np.float32] = index.fields.get(field, missing)
    return values


def is_present(values: NDArray[Any]) -> NDArray[np.bool_]:
    """(N,): where `field_values` found something."""
    return np.asarray(values != "" if values.dtype.kind == "U" else ~np.isnan(values))


@dataclass(frozen=True)
class Selection:
    """The samples of one shard that are used.

    Attributes:
        index: Of the shard.
        rows: Their numbers in it, ascending, int64.
        reasons: Why the others are not, and how many for each reason; a sample counts once, for the first.
    """

    index: ShardIndex
    rows: NDArray[np.int64]
    reasons: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.rows)


def select(index: ShardIndex, caption: CaptionSource, filters: Sequence[Filter]) -> Selection:
    """Choose the captioned images of a shard that pass every filter.

    Raises:
        DataError: If a value is missing and its filter does not say what then; names the fields that are there.
    """
    kept = np.ones(len(index), bool)
    reasons: dict[str, int] = {}

    def drop(reason: str, dropped: NDArray[np.bool_]) -> None:
        nonlocal kept
        if count := int((kept & dropped).sum()):
            reasons[reason] = count
        kept = kept & ~dropped

    drop(NO_IMAGE, ~index.has(*IMAGE_EXTENSIONS))
    drop(f"no {caption.extension}", ~index.has(caption.extension))
    drop("caption empty or not UTF-8" if caption.field is None else f"no text in {caption}", caption.lengths(index) < 0)
    for wish in filters:
        values = field_values(index, wish.field, caption)
        present = is_present(values)
        if wish.missing == "error" and (absent := int((kept & ~present).sum())):
            raise _missing_values(index, wish, absent, int(kept.sum()))
        if wish.missing == "drop":
            drop(f"{wish.field} missing", ~present)
        for name, value in wish.terms:
            drop(f"{wish.field} not {name} {value}", present & ~wish.holds(values, name, value))
    return Selection(index, np.flatnonzero(kept), reasons)


def num_bad(reasons: Mapping[str, int]) -> int:
    """How many samples are left out for what they lack, not by a filter."""
    return sum(count for reason, count in reasons.items() if reason == NO_IMAGE or reason.startswith(NO_CAPTION))


def is_about_captions(reasons: Mapping[str, int]) -> bool:
    """Whether most samples are left out because of their captions."""
    return max(reasons, key=lambda reason: reasons[reason], default="").startswith(NO_CAPTION)


def _missing_values(index: ShardIndex, wish: Filter, absent: int, total: int) -> DataError:
    known = sorted(index.contents.metadata_fields)
    names = ALIASES.get(wish.field, DERIVED.get(wish.field, (wish.field,)))
    near = suggest(names[0], known) if absent == total else ""
    return DataError(
        f"a filter asks for '{wish.field}', which samples lack",
        where=index.path,
        got=f"{absent:,} of {total:,} samples without {' | '.join(names)}{near}; KEY.json has: "
        + (", ".join(known) or "nothing that can be read"),
        allowed="missing drop | keep | error after the comparison",
        remedy=f"{wish.field}: '{' '.join(wish.terms[0])}, missing drop'"
        + (", or download with img2dataset --save_additional_columns" if absent == total else ""),
    )
