"""How the pages of `make results` put figures: intervals, paired differences, tables, and a page's own section."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bkd.eval.statistics import CONFIDENCE
from bkd.files import write_atomically

NUM_RESAMPLES = 1000


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Interval:
    """Mean, least and greatest."""
    found = list(values)
    return Interval(sum(found) / len(found), min(found), max(found))


def mean(outcomes: NDArray[np.int64]) -> Interval:
    """Percent of outcomes (seeds, prompts), each -1, 0 or 1. Interval: seeds, and prompts for them all, drawn anew."""
    rng = np.random.default_rng(0)
    seeds, chosen = (rng.multinomial(count, np.full(count, 1 / count), NUM_RESAMPLES) for count in outcomes.shape)
    means = 100 * (seeds @ outcomes * chosen).sum(axis=1) / outcomes.size
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(100 * float(outcomes.mean()), float(low), float(high))


def difference(before: Mapping[int, NDArray[np.bool_]], after: Mapping[int, NDArray[np.bool_]]) -> str:
    """In accuracy, over the seeds that both have; bold where the interval excludes zero."""
    pairs = [(before[seed].astype(np.int64), after[seed].astype(np.int64)) for seed in before if seed in after]
    if not pairs:
        return ""
    found = mean(np.stack([second - first for first, second in pairs]))
    bold = "**" if found.low > 0 or found.high < 0 else ""
    return f"{bold}{shown(found, sign='+')}{bold}"


def shown(found: Interval, digits: int = 1, sign: str = "-") -> str:
    """The value, and the interval where it has any width."""
    value, low, high = (f"{round(part, digits) + 0.0:{sign}.{digits}f}" for part in found)  # + 0.0: no -0.0
    return f"{value} [{low}, {high}]" if found.low < found.high else value


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def page_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of a script that measures what an experiment drew, and writes it into its section of a page."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of results.md")
    parser.add_argument("--seeds", type=int, default=3)
    return parser


class Section:
    """What stands between the lines `<!-- NAME -->` and `<!-- /NAME -->` of a page; nothing else of it changes.

    Args:
        page: A Markdown file that has both lines, once each.
        name: Of the section.
    """

    def __init__(self, page: Path, name: str) -> None:
        begin, end, text = f"<!-- {name} -->", f"<!-- /{name} -->", page.read_text(encoding="utf-8")
        before, _, rest = text.partition(begin)
        if text.count(begin) != 1 or text.count(end) != 1 or end not in rest:
            raise SystemExit(f"{page} needs the lines {begin} and {end}, once each and in this order")
        self._page, self._before, self._after = page, before + begin, end + rest.partition(end)[2]

    def write(self, parts: Sequence[str]) -> None:
        """Paragraphs, tables, headings and pictures, in place of what was there."""
        wrapped = [part if part[0] in "|!#" else textwrap.fill(part, 120, break_on_hyphens=False) for part in parts]
        write_atomically(self._page, "\n\n".join([self._before, *wrapped, self._after]))
