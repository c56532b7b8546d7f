"""Evaluations as tables and charts: of one run, or of several that were measured under the same conditions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bkd.eval.shown import (
    METRIC_TITLES,
    SPLIT_TITLES,
    SUITE_TITLES,
    conditions,
    device_and_versions,
    measured_against,
    own_samplers,
    share,
)
from bkd.eval.tables import Table, attributes_table, prompts_table, shapes_table, skipped
from bkd.report.reports import Report, read_report
from bkd.report.rows import Row, RowChart, row_chart
from bkd.runs.folder import RunFolder
from bkd.runs.measuring import again, eval_command

SHAPES_NOTE = (
    "95 % Wilson intervals; p: exact McNemar test against the first model; shapes-FID: distance from renders by the "
    "embedded features, with its 95 % interval and what of it so few images cause."
)
PROMPTS_NOTE = "95 % intervals. FID falls as images are added: figures of other numbers of images do not compare."


@dataclass(frozen=True)
class Measurement:
    """One kind of measurement under one set of conditions.

    Attributes:
        title: What was measured.
        conditions: On what, and how.
        note: How to read it; and which models were drawn otherwise.
        charts: Values with their intervals.
        tables: All figures.
        skipped: What could not be measured, and why.
        environment: Device and versions.
    """

    title: str
    conditions: str
    note: str
    skipped: tuple[str, ...]
    charts: tuple[RowChart, ...]
    tables: tuple[Table, ...]
    environment: str


@dataclass(frozen=True)
class Headline:
    """A run's first figure, beside its teacher's."""

    name: str
    student: str
    teacher: str


def read_evaluation(run: RunFolder, path: Path) -> Report:
    """What an evaluation of a run wrote.

    Raises:
        OutputError: If another version, or something else, wrote it.
    """
    remedy = again(eval_command(run, path.stem))
    return read_report(path, _require_complete, otherwise="this measurement is of another version", remedy=remedy)


def _require_complete(report: Report) -> None:
    measurements([report])
    if "num_inference_steps" not in report["models"][0]:
        raise LookupError("num_inference_steps")


def measurements(reports: Iterable[Report]) -> tuple[Measurement, ...]:
    """Of all reports, one after another."""
    return tuple(measurement for report in reports for measurement in _measurements(report))


def headline(report: Report) -> Headline | None:
    """The first figure that first model and last both have."""
    teacher, student = report["models"][0], report["models"][-1]
    if report["settings"]["suite"] == "shapes":
        split = report["settings"]["splits"][0]
        pair = [share(model["splits"][split]["accuracy"]) for model in (student, teacher)]
        return Headline(f"Correct, {SPLIT_TITLES.get(split, split)}", *pair)
    for key, name in METRIC_TITLES.items():
        if "skipped" not in teacher[key] and "skipped" not in student[key]:
            return Headline(name, *(f"{model[key]['value']:.4g}" for model in (student, teacher)))
    return None


def _measurements(report: Report) -> Iterator[Measurement]:
    settings, models = report["settings"], report["models"]
    own = own_samplers(report)
    further = f" {own[0].upper()}{own[1:]}." if own else ""
    environment = device_and_versions(report["environment"]["device"], report["environment"]["versions"])
    how = f"{conditions(report)}, the same noise for every model"
    if settings["suite"] != "shapes":
        against = measured_against(report)
        yield Measurement(
            title=SUITE_TITLES[settings["suite"]],
            conditions=f"{how}; {against}" if against else how,
            note=PROMPTS_NOTE + further,
            skipped=_skipped(models),
            charts=tuple(chart for key, name in METRIC_TITLES.items() if (chart := _metric_chart(models, key, name))),
            tables=(prompts_table(models),),
            environment=environment,
        )
        return
    for split in settings["splits"]:
        yield Measurement(
            title=f"Caption accuracy, {SPLIT_TITLES.get(split, 'split ' + split)}",
            conditions=f"split {split}: {how}",
            note=SHAPES_NOTE + further,
            skipped=_skipped(models, split),
            charts=tuple(chart for chart in (_accuracy_chart(models, split), _fid_chart(models, split)) if chart),
            tables=(shapes_table(models, split), attributes_table(models, split)),
            environment=environment,
        )


def _skipped(models: Sequence[Report], split: str | None = None) -> tuple[str, ...]:
    return tuple(f"{what}: {reason}" for what, reason in skipped(models, split))


def _accuracy_chart(models: Sequence[Report], split: str) -> RowChart | None:
    rows = []
    for color, model in enumerate(models):
        found = model["splits"][split]["accuracy"]
        value, low, high = (100 * x for x in (found["successes"] / found["total"], found["low"], found["high"]))
        rows.append(Row(model["name"], color, value, low, high, f"{value:.1f}%"))
    return row_chart("Images that show what the caption says, %", "more is better; 95 % interval", rows)


def _fid_chart(models: Sequence[Report], split: str) -> RowChart | None:
    found = ((model["name"], model["splits"][split]["shapes_fid"]) for model in models)
    return row_chart("shapes-FID", "less is better; 95 % interval", list(_estimated(found)))


def _metric_chart(models: Sequence[Report], key: str, name: str) -> RowChart | None:
    better = "less" if key in ("fid", "kid") else "more"
    found = ((model["name"], model[key]) for model in models)
    return row_chart(name, f"{better} is better; 95 % interval", list(_estimated(found)))


def _estimated(found: Iterator[tuple[str, Report]]) -> Iterator[Row]:
    for color, (name, metric) in enumerate(found):
        if "skipped" not in metric:
            value, low, high = metric["value"], metric.get("low"), metric.get("high")
            yield Row(
                name, color, value, value if low is None else low, value if high is None else high, f"{value:.4g}"
            )
