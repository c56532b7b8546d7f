"""How the page writes numbers, colours series, and chooses from many things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
TIMES, MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"

NUM_COLORS = 7


def color_class(number: int) -> str:
    """Of the style sheet's colours for series; they repeat."""
    return f"s{number % NUM_COLORS}"


def short(value: float) -> str:
    """With three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def large(number: float) -> str:
    """A count with a unit."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return short(number)


def every(items: Sequence[T], limit: int) -> list[T]:
    """At most so many of the items, evenly, with the first and the last.

    Args:
        items: In order.
        limit: At least 2.
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(number * (len(items) - 1) / (limit - 1))] for number in range(limit)]
