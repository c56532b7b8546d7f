"""Values as rows of a table with a drawing in it: intervals as whiskers, durations and bytes as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bkd.eval.shown import short
from bkd.report.scale import Scale
from bkd.report.words import color_class

WIDTH, HEIGHT, MARGIN = 400, 22, 6


@dataclass(frozen=True)
class Row:
    """One value.

    Attributes:
        label: Whose.
        color: Number of the colour.
        value: The value.
        low: Lower end of its interval.
        high: Upper end.
        text: As written.
    """

    label: str
    color: int
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class RowChart:
    """Rows with one axis.

    Attributes:
        title: What is measured, with its unit.
        note: What the reader should know of it.
        rows: At least one.
        bars: Whether values are lengths from 0; else they are marks on an axis around them.
    """

    title: str
    note: str
    rows: tuple[Row, ...]
    bars: bool = False

    @property
    def scale(self) -> Scale:
        ends = [end for row in self.rows for end in (row.low, row.high, row.value)]
        return Scale.around([0.0, *ends] if self.bars else ends)

    @property
    def ends(self) -> tuple[str, str]:
        """Values at the ends of the axis."""
        return short(self.scale.low), short(self.scale.high)

    def drawing(self, row: Row) -> Markup:
        """An SVG element that stretches with its cell; the cell beside it says the same in words."""
        low, high, value = (_place(self.scale, number) for number in (row.low, row.high, row.value))
        middle, color = HEIGHT / 2, color_class(row.color)
        bar = f'<rect x="{MARGIN}" y="3" width="{value - MARGIN:.1f}" height="16" class="bar {color}"/>'
        mark = f'<path d="M{value:.1f},3V19" class="mark {color}"/>'
        whisker = f'<path d="M{low:.1f},{middle}H{high:.1f}" class="whisker {"" if self.bars else color}"/>'
        parts = bar + whisker if self.bars else whisker + mark
        base = f'<path d="M{MARGIN},0V{HEIGHT}" class="axis"/>' if self.bars else ""
        return Markup(
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{base}{parts}</svg>'
        )


def _place(scale: Scale, value: float) -> float:
    return MARGIN + (WIDTH - 2 * MARGIN) * scale.place(value)


def row_chart(title: str, note: str, rows: Sequence[Row], *, bars: bool = False) -> RowChart | None:
    """A chart; None where there is nothing to draw."""
    return RowChart(title, note, tuple(rows), bars) if rows else None
