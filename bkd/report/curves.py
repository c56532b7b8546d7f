"""Curves as small SVG drawings: raw values faint, a moving mean on top, and what a reader can ask of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from markupsafe import Markup, escape

from bkd.eval.shown import short
from bkd.report.scale import Scale
from bkd.report.words import color_class, every

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 210, 52, 18, 12, 26
WINDOW = 0.05
"""Share of the points that each point of the mean averages."""
MAX_DRAWN, MAX_ASKED = 500, 160
"""Points of a curve that are drawn, and that a reader can ask the value of."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: What it is of.
        color: Number of the colour.
        points: (step, value).
        noisy: Whether a mean is drawn over it.
    """

    label: str
    color: int
    points: tuple[Point, ...]
    noisy: bool = True

    @cached_property
    def mean(self) -> tuple[Point, ...]:
        """Of each point's neighbours on both sides, so that it does not lag behind."""
        if not self.noisy:
            return self.points
        count, reach = len(self.points), max(1, round(len(self.points) * WINDOW / 2))
        sums = [0.0, *accumulate(value for _, value in self.points)]
        ends = [(max(0, index - reach), min(count, index + reach + 1)) for index in range(count)]
        return tuple(
            (step, (sums[after] - sums[first]) / (after - first))
            for (step, _), (first, after) in zip(self.points, ends, strict=True)
        )


@dataclass(frozen=True)
class Chart:
    """Several curves over the same steps.

    Attributes:
        title: What is drawn.
        series: The curves; those with the same label are pieces of one.
        logarithmic: Whether values vary over decades, as losses do.
        end: Where the axis of steps ends.
        stages: Steps at which a stage begins.
    """

    title: str
    series: tuple[Series, ...]
    logarithmic: bool
    end: float
    stages: tuple[float, ...] = ()

    @property
    def legend(self) -> tuple[tuple[str, str], ...]:
        """Class of the colour, and label of each curve."""
        return tuple(dict.fromkeys((color_class(series.color), series.label) for series in self.series))

    @property
    def last(self) -> str:
        """Where each curve ends, for those who cannot see it."""
        ends = {series.label: short(series.mean[-1][1]) for series in self.series}
        return next(iter(ends.values())) if len(ends) == 1 else ", ".join(f"{k} {v}" for k, v in ends.items())


def chart(
    title: str, series: Sequence[Series], *, logarithmic: bool, end: float, stages: Sequence[float] = ()
) -> Chart | None:
    """A chart of what can be drawn: finite values, positive ones on a logarithmic axis; None where nothing can."""
    usable = [
        Series(one.label, one.color, points, one.noisy)
        for one in series
        if (points := tuple((x, y) for x, y in one.points if math.isfinite(y) and (y > 0 or not logarithmic)))
    ]
    return Chart(title, tuple(usable), logarithmic, end, tuple(stages)) if usable else None


@dataclass(frozen=True)
class Plot:
    """A chart's axes, in the drawing's coordinates."""

    across: Scale
    up: Scale

    @classmethod
    def of(cls, chart: Chart) -> Plot:
        points = [point for series in chart.series for point in series.points]
        return cls(
            Scale.around([0.0, chart.end]), Scale.around((value for _, value in points), logarithmic=chart.logarithmic)
        )

    def x(self, step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * self.across.place(step), 1)

    def y(self, value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - self.up.place(value)), 1)

    def line(self, points: Sequence[Point], style: str) -> str:
        places = " ".join(f"{self.x(step)},{self.y(value)}" for step, value in points)
        return f'<polyline points="{places}" class="{style}"/>'


def chart_svg(chart: Chart) -> Markup:
    """An SVG element."""
    plot = Plot.of(chart)
    said = escape(f"{chart.title}: ends at {chart.last}")
    lines = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">',
        *_axes(plot, chart.stages),
    ]
    for series in chart.series:
        if series.noisy:
            lines.append(plot.line(_thinned(series.points), f"raw {color_class(series.color)}"))
        lines.append(plot.line(every(series.mean, MAX_DRAWN), f"mean {color_class(series.color)}"))
    return Markup(
        "".join([*lines, f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'])
    )


def asked(chart: Chart) -> list[dict[str, object]]:
    """What a reader can ask: for each curve its label, and [x in the drawing, step, mean, raw value]."""
    plot = Plot.of(chart)
    found = []
    for series in chart.series:
        both = list(zip(series.points, series.mean, strict=True))
        points = [[plot.x(step), step, short(mean), short(raw)] for (step, raw), (_, mean) in every(both, MAX_ASKED)]
        found.append({"label": series.label, "noisy": series.noisy, "points": points})
    return found


def _axes(plot: Plot, stages: Sequence[float]) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in plot.up.ticks():
        y = plot.y(value)
        yield f'<path d="M{LEFT},{y}H{right}" class="grid"/>'
        yield f'<text x="{LEFT - 7}" y="{y + 4:.1f}" class="tick end">{short(value)}</text>'
    for step in plot.across.ticks(whole=True):
        yield f'<text x="{plot.x(step)}" y="{HEIGHT - 8}" class="tick middle">{step:,.0f}</text>'
    for step in stages:
        yield f'<path d="M{plot.x(step)},{TOP}V{bottom}" class="stage"/>'
    yield f'<path d="M{LEFT},{bottom}H{right}" class="axis"/>'


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most so many points that every peak stays: the least and the greatest of each group of neighbours."""
    if len(points) <= MAX_DRAWN:
        return list(points)
    groups = groupby(enumerate(points), key=lambda pair: pair[0] * (MAX_DRAWN // 2) // len(points))
    kept: list[Point] = []
    for _, group in groups:
        members = [point for _, point in group]
        kept += sorted({min(members, key=_value), max(members, key=_value)})
    return kept


def _value(point: Point) -> float:
    return point[1]
