"""How the page colours series, and chooses from many things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
NUM_COLORS = 7


def color_class(number: int) -> str:
    """Of the style sheet's colours for series; they repeat."""
    return f"s{number % NUM_COLORS}"


def every(items: Sequence[T], limit: int) -> list[T]:
    """At most so many of the items, evenly, with the first and the last.

    Args:
        items: In order.
        limit: At least 2.
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(number * (len(items) - 1) / (limit - 1))] for number in range(limit)]
