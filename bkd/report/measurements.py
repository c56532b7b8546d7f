"""Evaluations as tables and charts: of one run, or of several that were measured under the same conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.errors import OutputError
from bkd.eval.drawing import Drawing
from bkd.eval.shown import NONE, SPLIT_TITLES, own_samplers, relative, share
from bkd.model_folder import read_json
from bkd.report.rows import Row, RowChart, row_chart
from bkd.report.words import TIMES

Report = Mapping[str, Any]
DISTANCES = (("fid", "FID"), ("kid", "KID"), ("inception_score", "IS"), ("clip_score", "CLIP score"))
SHAPES_NOTE = (
    "95 % Wilson intervals; p: exact McNemar test against the first model; shapes-FID: distance from renders by the "
    "embedded features, with its 95 % interval and what of it so few images cause."
)
PROMPTS_NOTE = "95 % intervals. FID falls as images are added: figures of other numbers of images do not compare."


@dataclass(frozen=True)
class Table:
    """Cells as words, a row for each model.

    Attributes:
        title: What it shows.
        columns: Their heads, the first that of the model.
        rows: The cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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


def read_evaluation(path: Path) -> Report:
    """What an evaluation wrote.

    Raises:
        OutputError: If another version, or something else, wrote it.
    """
    found = read_json(path)
    try:
        tuple(_measurements(found))
        if "num_inference_steps" not in found["models"][0]:
            raise LookupError("num_inference_steps")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise OutputError(
            "this measurement is of another version",
            where=path,
            got=f"{type(error).__name__}: {error}",
            remedy=f"bkd eval {path.parent.parent} --overwrite",
        ) from None
    return found


def measurements(reports: Sequence[Report]) -> tuple[Measurement, ...]:
    """Of all reports; those of the same conditions and the same first model together, that one once."""
    merged: list[dict[str, Any]] = []
    for report in reports:
        same = next((known for known in merged if _comparable(known) == _comparable(report)), None)
        if same is None:
            merged.append(dict(report))
            continue
        known = set(same["digests"].values())
        fresh = [row for row in report["models"] if report["digests"].get(row["name"]) not in known]
        same["models"] = [*same["models"], *fresh]
        same["digests"] = {**same["digests"], **report["digests"]}
    return tuple(measurement for report in merged for measurement in _measurements(report))


def _comparable(report: Report) -> tuple[Any, Any]:
    """Conditions, and the model that the others are compared with."""
    return report["settings"], report["digests"].get(report["models"][0]["name"])


def headline(report: Report) -> Headline | None:
    """The first figure that first model and last both have."""
    teacher, student = report["models"][0], report["models"][-1]
    if report["settings"]["suite"] == "shapes":
        split = report["settings"]["splits"][0]
        pair = [share(model["splits"][split]["accuracy"]) for model in (student, teacher)]
        return Headline(f"Correct, {SPLIT_TITLES.get(split, split)}", *pair)
    for key, name in DISTANCES:
        if "skipped" not in teacher[key] and "skipped" not in student[key]:
            return Headline(name, *(f"{model[key]['value']:.4g}" for model in (student, teacher)))
    return None


def _measurements(report: Report) -> Iterator[Measurement]:
    settings, models = report["settings"], report["models"]
    own = own_samplers(report)
    further = f" {own[0].upper()}{own[1:]}." if own else ""
    versions = report["environment"]["versions"]
    environment = f"{report['environment']['device']} · torch {versions['torch']} · diffusers {versions['diffusers']}"
    how = f"{settings['num_prompts']:,} prompts, {Drawing(**settings['drawing'])}, the same noise for every model"
    if settings["suite"] != "shapes":
        charts = (_distance_chart(models, key, name) for key, name in DISTANCES)
        found = tuple(chart for chart in charts if chart)
        title = {"coco30k": "Captions of COCO", "prompts": "Your prompts"}.get(settings["suite"], settings["suite"])
        named = [(name, model[key]) for model in models for key, name in DISTANCES]
        named += [(f"closeness of {model['name']}", model["closeness"]) for model in models[1:]]
        yield Measurement(
            title, how, PROMPTS_NOTE + further, _skipped(named), found, (_prompts_table(models),), environment
        )
        return
    for split in settings["splits"]:
        title = f"Caption accuracy, {SPLIT_TITLES.get(split, 'split ' + split)}"
        found = tuple(chart for chart in (_accuracy_chart(models, split), _fid_chart(models, split)) if chart)
        tables = (_shapes_table(models, split), _attributes_table(models, split))
        named = [("shapes-FID", model["splits"][split]["shapes_fid"]) for model in models]
        yield Measurement(
            title, f"split {split}: {how}", SHAPES_NOTE + further, _skipped(named), found, tables, environment
        )


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


def _distance_chart(models: Sequence[Report], key: str, name: str) -> RowChart | None:
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


def _shapes_table(models: Sequence[Report], split: str) -> Table:
    first = models[0]["name"]
    columns = ("model", "right", "95 % interval", f"of {first}", "p", "one object", "two objects", "shapes-FID", "bias")
    rows = []
    for number, model in enumerate(models):
        found = model["splits"][split]
        accuracy = found["accuracy"]
        cells = (
            model["name"],
            share(accuracy),
            f"{accuracy['low']:.1%} to {accuracy['high']:.1%}",
            relative(found["relative"]),
            f"{found['mcnemar_p']:.2g}" if number else NONE,
            share(found["by_objects"]["one"]),
            share(found["by_objects"]["two"]),
            _estimate(found["shapes_fid"]),
            _number(found["shapes_fid"].get("bias")),
        )
        rows.append((*cells, *_cost(model)))
    return Table("All figures", (*columns, *COST_COLUMNS), tuple(rows))


def _attributes_table(models: Sequence[Report], split: str) -> Table:
    names = tuple(models[0]["splits"][split]["attributes"])
    rows = ((m["name"], *(share(m["splits"][split]["attributes"].get(name)) for name in names)) for m in models)
    return Table("Agrees with the caption in", ("model", *names), tuple(rows))


def _prompts_table(models: Sequence[Report]) -> Table:
    columns = ("model", "FID", "its bias", "KID", "IS", "CLIP score", f"PSNR to {models[0]['name']}", "SSIM")
    rows = []
    for model in models:
        close = model["closeness"]
        figures = [model["kid"], model["inception_score"], model["clip_score"]]
        figures += [close.get("psnr_db", close), close.get("ssim", close)]
        fid, bias = _estimate(model["fid"]), _number(model["fid"].get("bias"))
        rows.append((model["name"], fid, bias, *map(_estimate, figures), *_cost(model)))
    return Table("All figures", (*columns, *COST_COLUMNS), tuple(rows))


COST_COLUMNS = ("UNet parameters", "UNet calls", "UNet MACs an image")


def _cost(model: Report) -> tuple[str, str, str]:
    macs = model["unet_macs"] * model["num_inference_steps"] * model["passes_a_step"] / 1e6
    return f"{model['unet_parameters']:,}", calls_of(model), f"{macs:,.0f} M"


def calls_of(model: Report) -> str:
    """UNet calls of an image: steps times passes."""
    return f"{model['num_inference_steps']} {TIMES} {model['passes_a_step']}"


def _estimate(metric: Report) -> str:
    """A value, with its interval where it has one; `_skipped` says why there is none."""
    if "skipped" in metric:
        return "skipped"
    interval = "" if metric["low"] is None else f" ({metric['low']:.4g} to {metric['high']:.4g})"
    return f"{metric['value']:.4g}{interval}"


def _skipped(named: Sequence[tuple[str, Report]]) -> tuple[str, ...]:
    """Each reason once."""
    return tuple(dict.fromkeys(f"{name}: {metric['skipped']}" for name, metric in named if "skipped" in metric))


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else NONE
