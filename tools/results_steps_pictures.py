"""Pictures of docs/results.md: the same prompts drawn in several ways, and scenes edited in several ways."""

from __future__ import annotations

from pathlib import Path

import torch
from experiment import prompts
from results_steps_measures import images_in
from results_steps_runs import COUNTS, FEW, FULL_STEPS, PRUNED, TOLD, edits, place

from bkd.data.shapes_checker import rendered
from bkd.eval.pictures import side_by_side
from bkd.files import replace_file

SHOWN = (0, 5, 10, 260, 265, 270)
"""Of the prompts: the first of each sort, chosen before anything was drawn."""
EDITS_SHOWN = (0, 1, 2, 3, 4, 5)
FEW_COUNTS = [steps for steps in COUNTS if steps <= FEW]


def save_drawn(path: Path, folder: Path) -> str:
    """Rows: the teacher with many and with few calls, and students of the first seed with few."""
    rows = {f"teacher, {2 * FULL_STEPS} calls": place(folder, None, "ddim", FULL_STEPS)}
    rows |= {f"teacher, {2 * steps} calls": place(folder, None, "ddim", steps) for steps in (FEW, FEW // 2, 1)}
    for name in (TOLD, PRUNED):
        rows |= {f"{name}, {steps}": place(folder, 0, name, steps) for steps in FEW_COUNTS}
    images = {name: images_in(one)[list(SHOWN)] for name, one in rows.items()}
    _save(path, images, [prompts()[index] for index in SHOWN])
    return f"![the teacher with 50, 8, 4 and 2 calls, and students with 4, 2 and 1](images/{path.name})"


def save_edited(path: Path, folder: Path) -> str:
    """Rows: scenes, and their edits by the teacher and by distilled students of the first seed."""
    before, after = ([scenes[index] for index in EDITS_SHOWN] for scenes in edits("color"))
    rows: dict[str, Path] = {
        f"teacher, {FULL_STEPS} steps": place(folder, None, "edit", FULL_STEPS),
        **{f"teacher, {steps}": place(folder, None, "edit", steps) for steps in FEW_COUNTS},
        **{f"distilled, {steps}": place(folder, 0, "edit", steps) for steps in FEW_COUNTS},
    }
    images: dict[str, torch.Tensor] = {"scene": rendered(before)}
    images |= {name: images_in(one)[list(EDITS_SHOWN)] for name, one in rows.items()}
    _save(path, images, [scene.caption for scene in after])
    return f"![scenes, and their edits by the teacher and by distilled students](images/{path.name})"


def _save(path: Path, images: dict[str, torch.Tensor], captions: list[str]) -> None:
    with replace_file(path) as stream:
        side_by_side(images, captions).save(stream, format="png")
