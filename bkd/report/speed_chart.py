"""Latency as a chart: one group of bars for each kind of call, one bar for each model."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bkd.files import replace_file, write_atomically

COLORS = ("#555555", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
"""Okabe & Ito's, which colour-blind readers tell apart."""
BAR = 0.8


def write_speed_report(report: Mapping[str, Any], folder: Path) -> None:
    """`speed.json` and `speed.svg`.

    Args:
        report: As `bench_speed` returned it.
        folder: Made when missing.
    """
    write_speed_chart(report, folder / "speed.svg")
    write_atomically(folder / "speed.json", json.dumps(report, indent=2) + "\n")


def write_speed_chart(report: Mapping[str, Any], path: Path) -> None:
    """Write an SVG: medians as bars, from there to the 90th percentile a whisker, the speed-up as a number.

    Args:
        report: As `bench_speed` returned it.
        path: The file, replaced when it exists.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    models = report["models"]
    cases = [name for name, case in models[0]["cases"].items() if "median_s" in case]
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(5.2 * columns, 0.8 + lines * (0.7 + 0.42 * len(models))), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, name in zip(axes, cases, strict=False):
        _draw_case(axis, name, models)
    for axis in list(axes)[len(cases) :]:
        axis.set_visible(False)
    figure.suptitle(f"Median seconds a call, whisker to the 90th percentile, on {report['device']}", fontsize=10)
    stream = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    with replace_file(path) as file:
        file.write(stream.getvalue())


def _draw_case(axis: Any, name: str, models: list[Mapping[str, Any]]) -> None:
    cases = [model["cases"][name] for model in models]
    medians = [case["median_s"] for case in cases]
    whiskers = [[0.0] * len(cases), [max(0.0, case["p90_s"] - case["median_s"]) for case in cases]]
    places = range(len(models))
    colors = [COLORS[place % len(COLORS)] for place in places]
    axis.barh(places, medians, BAR, xerr=whiskers, color=colors, error_kw={"elinewidth": 1, "ecolor": "#999999"})
    furthest = max(case["p90_s"] for case in cases)
    for place, case in enumerate(cases):
        axis.text(
            max(case["p90_s"], case["median_s"]) + 0.01 * furthest, place, _label(case, place), va="center", fontsize=8
        )
    axis.set_xlim(0, furthest * 1.35)
    axis.set_yticks(places, [model["name"] for model in models], fontsize=8)
    axis.invert_yaxis()
    axis.set_title(name, fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _label(case: Mapping[str, Any], place: int) -> str:
    return f"{case['median_s']:.3g} s" + (f"   {case['speed_up']:.2f} x" if place else "")
