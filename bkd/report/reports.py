"""Reports of measurements, of quality or of speed: a first model and others beside it, each known by its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bkd.errors import ModelError, OutputError
from bkd.models.folder import read_json

Report = Mapping[str, Any]
"""As `bkd eval` or `bkd bench speed` wrote it."""


def read_report(path: Path, view: Callable[[Report], object], *, otherwise: str, remedy: str | None) -> Report:
    """Read one.

    Args:
        path: Its file.
        view: What is made of it: what fails here is damaged.
        otherwise: Said where it does.
        remedy: The command that measures again.

    Raises:
        OutputError: If another version, or something else, wrote it.
    """
    try:
        found = read_json(path)
        view(found)
    except (ModelError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise OutputError(otherwise, where=path, got=f"{type(error).__name__}: {error}", remedy=remedy) from None
    return found


def merged(reports: Iterable[tuple[str, Report]]) -> list[Report]:
    """Those of the same conditions and the same first model as one, with each model once.

    Args:
        reports: Each with the name of its run, which tells models of one name apart.
    """
    tables: list[dict[str, Any]] = []
    for run, report in reports:
        table = next((known for known in tables if _conditions(known) == _conditions(report)), None)
        if table is None:
            tables.append({**report, "models": [*report["models"]], "digests": {**report.get("digests", {})}})
        else:
            _add(table, run, report)
    return list(tables)


def _add(table: dict[str, Any], run: str, report: Report) -> None:
    """The models that a table lacks."""
    for model in report["models"]:
        digest = _digest(report, model)
        if digest in (_digest(table, known) for known in table["models"]):
            continue
        name = model["name"]
        if name in (known["name"] for known in table["models"]):
            name = f"{name} of {run}"
        table["models"].append({**model, "name": name})
        table["digests"][name] = digest


def _digest(report: Report, model: Report) -> str:
    """Of a model's weights; its name, in a measurement of a version that did not look."""
    return str(report.get("digests", {}).get(model["name"], model["name"]))


def _conditions(report: Report) -> tuple[Any, ...]:
    """What must be equal for figures to stand beside each other."""
    how = (report.get(key) for key in ("settings", "environment", "device", "versions"))
    return (*how, _digest(report, report["models"][0]))
