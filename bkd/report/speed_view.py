"""Speed and memory of a run, as `bkd bench speed RUN -o RUN/eval/speed` measured them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bkd.eval.shown import TIMES, device_and_versions, short, speed_conditions
from bkd.report.reports import Report, read_report
from bkd.report.rows import Row, RowChart, row_chart
from bkd.runs.folder import RunFolder
from bkd.runs.measuring import again, speed_command


@dataclass(frozen=True)
class SpeedView:
    """What the page shows of it.

    Attributes:
        conditions: Device, versions, and what was timed.
        charts: Seconds and peak memory of each kind of call.
    """

    conditions: str
    charts: tuple[RowChart, ...]


def read_speed(run: RunFolder) -> Report | None:
    """What was measured; None where nothing was.

    Raises:
        OutputError: If the file is damaged.
    """
    if not run.speed_file.is_file():
        return None
    remedy = again(speed_command(run))
    return read_report(run.speed_file, view_speed, otherwise="this is no measurement of speed", remedy=remedy)


def view_speed(report: Report) -> SpeedView:
    """Charts of a report of `bench_speed`."""
    models = report["models"]
    cases = list(models[0]["cases"])
    charts = [*(_seconds(models, case) for case in cases), *(_memory(models, case) for case in cases)]
    conditions = f"{device_and_versions(report['device'], report['versions'])} · {speed_conditions(report)}"
    return SpeedView(conditions, tuple(chart for chart in charts if chart))


def _seconds(models: list[Mapping[str, Any]], name: str) -> RowChart | None:
    rows = [
        Row(model["name"], place, case["median_s"], case["median_s"], case["p90_s"], _timed(case, place))
        for place, model, case in _cases(models, name)
        if "median_s" in case
    ]
    return row_chart(f"Seconds: {name}", "median; whisker to the 90th percentile", rows, bars=True)


def _timed(case: Mapping[str, Any], place: int) -> str:
    return f"{short(case['median_s'])} s" + (f" ({case['speed_up']:.2f} {TIMES})" if place else "")


def _memory(models: list[Mapping[str, Any]], name: str) -> RowChart | None:
    rows = []
    for place, model, case in _cases(models, name):
        memory = case.get("memory", {})
        if "peak_bytes" in memory:
            gib = memory["peak_bytes"] / 2**30
            rows.append(Row(model["name"], place, gib, gib, gib, f"{gib:.2f} GiB"))
    return row_chart(f"Peak memory: {name}", "less is better", rows, bars=True)


def _cases(models: list[Mapping[str, Any]], name: str) -> Iterator[tuple[int, Mapping[str, Any], Mapping[str, Any]]]:
    for place, model in enumerate(models):
        if name in model["cases"]:
            yield place, model, model["cases"][name]
