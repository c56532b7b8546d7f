"""--keep: score every option of a UNet by the output change it causes, and choose under a budget.

Published evidence says that such scores do not tell how well a student recovers in training (TinyFusion,
arXiv:2412.01199), so presets stay the default; docs/surgery.md has our own comparison.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

from bkd.data.sources import find_sources
from bkd.files import cache_folder
from bkd.models.folder import prompt_length, unet_config
from bkd.models.load import best_device, load_pipeline
from bkd.progress import Progress, silent
from bkd.pruning.calibration import calibration_batches, check_calibratable
from bkd.surgery.anatomy import Anatomy, read_anatomy
from bkd.surgery.budget import CostMap, cost_map, parse_budget
from bkd.surgery.choose import choose, scorable_removals
from bkd.surgery.diagram import diagram
from bkd.surgery.options import complete
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.score import OutputChange
from bkd.surgery.unet import plan_layout
from bkd.surgery.units import Unit, modules_of


@dataclass(frozen=True)
class Score:
    """What one removal saves and costs.

    Attributes:
        units: Removed together.
        parameters: That go with them.
        macs: By which the UNet gets cheaper; negative where the mid block gets dearer than what goes.
        change: Relative squared change of the output.
    """

    units: tuple[Unit, ...]
    parameters: int
    macs: int
    change: float


IMPORTANCE_FILE = "bkd_importance.json"
PICTURE_FILE = "bkd_importance.svg"


@dataclass(frozen=True)
class Selection:
    """A choice under a budget.

    Attributes:
        plan: What to remove.
        chosen: The removals that make it up, each with a score of its own.
        scores: Of all options and transformer layers.
        budget: What may be left, in words.
        predicted: Sum of the chosen options' output changes.
        measured: The chosen student's own output change; the two differ because options influence each other.
        num_samples: Calibration samples used.
    """

    plan: RemovalPlan
    chosen: tuple[tuple[Unit, ...], ...]
    scores: tuple[Score, ...]
    budget: str
    predicted: float
    measured: float
    num_samples: int


def select(
    folder: Path,
    keep: str,
    calibration: str,
    *,
    num_samples: int,
    count_macs: bool = False,
    progress: Progress = silent,
) -> Selection:
    """Score every option on calibration samples and choose the least harmful removal under a budget.

    Args:
        folder: The teacher's pipeline folder.
        keep: See `parse_budget`.
        calibration: Shards of captioned images; `shapes` for the embedded world's.
        num_samples: How many of them to use.
        count_macs: Whether `keep` means MACs instead of parameters.
        progress: Called with (scored, total).

    Raises:
        BkdError: If the budget cannot be met or the shards cannot be used.
    """
    check_calibratable(folder)
    config = unet_config(folder)
    anatomy = read_anatomy(config)
    costs = cost_map(config, num_tokens=prompt_length(folder))
    amounts = costs.macs if count_macs else costs.parameters
    limit = parse_budget(keep, amounts)
    removals = scorable_removals(anatomy)
    choose(anatomy, dict.fromkeys(removals, 0.0), amounts, limit)  # can it be met at all?
    shards = find_sources(calibration, cache_folder())
    pipe = load_pipeline(folder, device=best_device())
    change = OutputChange(pipe.unet, calibration_batches(folder, pipe, shards, num_samples))
    scores: dict[tuple[Unit, ...], float] = {}
    for units in removals:
        progress(len(scores), len(removals))
        scores[units] = _output_change(change, anatomy, units)
    progress(len(scores), len(removals))
    chosen = choose(anatomy, scores, amounts, limit)
    plan = plan_layout(anatomy, complete(anatomy, {unit for units in chosen for unit in units}))
    return Selection(
        plan=plan,
        chosen=chosen,
        scores=tuple(_score(anatomy, costs, units, scores[units]) for units in removals),
        budget=f"at most {limit:,} {amounts.name}",
        predicted=sum(scores[units] for units in chosen),
        measured=change.of_plan(plan),
        num_samples=change.num_samples,
    )


def _score(anatomy: Anatomy, costs: CostMap, units: tuple[Unit, ...], change: float) -> Score:
    saved = costs.saved(anatomy, units)
    return Score(units, saved.parameters, saved.macs, change)


def _output_change(change: OutputChange, anatomy: Anatomy, units: tuple[Unit, ...]) -> float:
    if ".t" in units[0]:
        (module,) = modules_of(units[0], anatomy)
        return change.of_skipping(module)
    return change.of_plan(plan_layout(anatomy, complete(anatomy, units)))


def write_importance(folder: Path, teacher: Path, selection: Selection) -> None:
    """Write scores and choice beside a student: a file for programs and a picture.

    Args:
        folder: The student's; must exist.
        teacher: The teacher's pipeline folder.
        selection: What was chosen.
    """
    anatomy = read_anatomy(unet_config(teacher))
    kept = complete(anatomy, selection.plan.removed)
    (folder / IMPORTANCE_FILE).write_text(json.dumps(asdict(selection), indent=2) + "\n")
    title = f"{selection.budget}: {selection.plan.name}"
    subtitle = (
        f"relative output change: {selection.predicted:.2g} predicted, {selection.measured:.2g} measured "
        f"on {selection.num_samples} samples"
    )
    picture = diagram(anatomy, kept, shorten(title, 90), subtitle=subtitle, scores=_unit_scores(selection.scores))
    (folder / PICTURE_FILE).write_text(picture.svg())


def _unit_scores(scores: Sequence[Score]) -> dict[Unit, float]:
    """For each unit, the least change of a removal that takes it with at most one partner; a level with all of them."""
    found: dict[Unit, float] = {}
    for score in scores:
        levels = [unit for unit in score.units if unit.startswith("level.")]
        for unit in levels or (score.units if len(score.units) <= 2 else ()):
            found[unit] = min(score.change, found.get(unit, score.change))
    return found
