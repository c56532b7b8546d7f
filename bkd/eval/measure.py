"""measure: resolve models, find out whether they were measured before, and if not, measure them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bkd.data.shapes import SIDE
from bkd.errors import DataError
from bkd.eval.candidates import load_candidate, name_candidates
from bkd.eval.run import Settings, evaluate
from bkd.model_folder import native_resolution
from bkd.run_folder import RunFolder


def measure(
    models: Sequence[str],
    teacher: str | None,
    settings: Settings,
    output: Path | None,
    phase: Callable[[str], None],
    progress: Callable[[int, int, str], None],
) -> tuple[Path, dict[str, Any]]:
    """Evaluate models on a suite, or return the report of an identical earlier evaluation.

    Args:
        models: MODEL arguments.
        teacher: Reference, or None where runs name their own.
        settings: See `Settings`.
        output: Folder of the report; `<run>/eval` for a single run, `eval` otherwise.
        phase: Told what begins.
        progress: Called with (done, total, text).

    Returns:
        The folder and the report.
    """
    named = name_candidates(models, teacher)
    single_run = len(models) == 1 and RunFolder(Path(models[0])).facts_file.is_file()
    folder = output or (RunFolder(Path(models[0])).eval if single_run else Path("eval"))
    digests = {candidate.name: candidate.digest for candidate in named}
    known = folder / f"{settings.suite}.json"
    if known.is_file():
        report: dict[str, Any] = json.loads(known.read_text())
        if report.get("digests") == digests and report["settings"] == json.loads(json.dumps(asdict(settings))):
            phase("already measured")
            return folder, report
    for candidate in named:
        if settings.suite == "shapes" and native_resolution(candidate.folder) != SIDE:
            raise DataError(
                "suite shapes measures models of the embedded world",
                where=candidate.name,
                got=f"a model that draws {native_resolution(candidate.folder)} px",
                allowed=f"{SIDE} px",
                remedy="add --suite prompts --prompts FILE",
            )
    candidates = [load_candidate(candidate) for candidate in named]
    report = evaluate(
        candidates,
        settings,
        folder,
        facts={"digests": digests},
        phase=lambda name: phase(f"drawing {len(settings.captions())} prompts with {name}"),
        progress=lambda done, total: progress(done, total, ""),
    )
    return folder, report
