"""Numbers as the page writes them."""

from __future__ import annotations

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
