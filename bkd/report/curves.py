"""Curves as small SVG drawings: raw values faint, a moving mean on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 180, 56, 24, 8
WINDOW = 0.05
"""Share of the points that each point of the mean averages."""


@dataclass(frozen=True)
class Curve:
    """Points (step, value); whether values vary over decades, as losses do; whether they are noisy."""

    points: tuple[tuple[float, float], ...]
    logarithmic: bool
    noisy: bool


def curve_svg(curve: Curve) -> Markup:
    """An SVG element; empty when there is nothing finite to draw."""
    usable = [(x, y) for x, y in curve.points if math.isfinite(y) and (y > 0 or not curve.logarithmic)]
    if not usable:
        return Markup("")
    scale = math.log10 if curve.logarithmic else float
    low, high = min(y for _, y in usable), max(y for _, y in usable)
    bottom, span = scale(low), (scale(high) - scale(low)) or 1.0
    last = max(x for x, _ in usable) or 1.0

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - 8) * x / last
        down = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (scale(y) - bottom) / span)
        return f"{across:.1f},{down:.1f}"

    raw = " ".join(place(x, y) for x, y in usable)
    mean = " ".join(place(x, y) for x, y in (_moving_mean(usable) if curve.noisy else usable))
    axis = HEIGHT - BOTTOM
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f'<path d="M{LEFT},{TOP}V{axis}H{WIDTH - 8}" class="axis"/>'
        f'<text x="{LEFT - 6}" y="{TOP + 8}" class="tick end">{high:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{axis}" class="tick end">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}" class="tick">0</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" class="tick end">step {last:,.0f}</text>'
        f'<polyline points="{raw}" class="raw"/><polyline points="{mean}" class="mean"/></svg>'
    )


def _moving_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of each point's neighbours on both sides, so that it does not lag behind."""
    reach = max(1, round(len(points) * WINDOW / 2))
    return [
        (x, fmean(y for _, y in points[max(0, index - reach) : index + reach + 1]))
        for index, (x, _) in enumerate(points)
    ]
