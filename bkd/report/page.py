"""One self-contained HTML page for one run or several: pictures, curves, tables, and the command that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bkd.errors import OutputError
from bkd.eval.drawing import Drawing
from bkd.eval.shown import NONE, SPLIT_TITLES, own_samplers, relative, share
from bkd.files import write_atomically
from bkd.model_folder import read_json
from bkd.report.stages import StageView, data_url, stage_views
from bkd.run_folder import RunFolder


@dataclass(frozen=True)
class RunView:
    """What the page shows of one run."""

    name: str
    facts: dict[str, Any]
    stages: tuple[StageView, ...]
    recipe: str
    command: str
    pictures: tuple[tuple[str, str], ...]
    evaluations: tuple[dict[str, Any], ...]


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the page.

    Args:
        runs: Run folders; unfinished ones show what they have so far.
        output: The HTML file, replaced when it exists, or a folder for `report.html`.

    Raises:
        OutputError: If a folder is not a run.
    """
    if output.is_dir():
        output = output / "report.html"
    views = [_view(RunFolder(path)) for path in runs]
    environment = Environment(loader=PackageLoader("bkd.report"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"percent": "{:.1%}".format, "share": share, "relative": relative}
    environment.filters |= {"estimate": _estimate, "number": _number}
    page = environment.get_template("report.html").render(runs=views, split_titles=SPLIT_TITLES)
    write_atomically(output, page)
    return output


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else NONE


def _estimate(metric: Mapping[str, Any]) -> str:
    """A value, with its interval where it has one, or why there is none."""
    if "skipped" in metric:
        return f"skipped: {metric['skipped']}"
    interval = "" if metric["low"] is None else f" ({metric['low']:.4g} to {metric['high']:.4g})"
    return f"{metric['value']:.4g}{interval}"


def _view(run: RunFolder) -> RunView:
    if not run.facts_file.is_file():
        raise OutputError(
            "not a run folder", where=run.path, got="no run.json", remedy="name a folder that bkd train made"
        )
    return RunView(
        name=run.path.name,
        facts=run.facts(),
        stages=stage_views(run),
        recipe=run.recipe_file.read_text(),
        command=str(run.facts().get("command", f"bkd train {run.recipe_file.name}")),
        pictures=_pictures(run),
        evaluations=tuple(_evaluation(path) for path in run.evaluations),
    )


def _evaluation(path: Path) -> dict[str, Any]:
    found = read_json(path)
    try:
        how, whole = str(Drawing(**found["settings"]["drawing"])), "num_inference_steps" in found["models"][0]
    except (LookupError, TypeError):
        how, whole = "", False
    if not whole:
        raise OutputError(
            "this measurement is of another version", where=path, remedy=f"bkd eval {path.parent.parent} --overwrite"
        )
    return {**found, "how": how, "own_samplers": own_samplers(found)}


def _pictures(run: RunFolder) -> tuple[tuple[str, str], ...]:
    """Those of evaluations, as data URLs."""
    titles = {
        "shapes": "evaluation prompts, same noise for every model",
        "prompts": "your prompts, same noise",
        "coco30k": "prompts of COCO, same noise",
    }
    return tuple((titles[path.stem], data_url(path)) for path in sorted(run.eval.glob("*.png")) if path.stem in titles)
