"""What a UNet is made of: its units, what each weighs, what may go, and what the presets would leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bkd.diffusion.guidance import StudentKind
from bkd.errors import SurgeryError
from bkd.models.folder import model_digest, prompt_length, unet_config
from bkd.models.unet_weights import weights_problem
from bkd.surgery.anatomy import Anatomy, read_anatomy
from bkd.surgery.budget import CostMap, amount_within, cost_map
from bkd.surgery.plan import PLAN_FILE, Lineage, load_plan, load_plans
from bkd.surgery.presets import ALIASES, PRESETS
from bkd.surgery.recognise import recognise
from bkd.surgery.unet import fits, plan_removal
from bkd.surgery.units import Unit, all_units, modules_of, parent_of


def inspect_model(folder: Path, teacher: Path | None = None) -> dict[str, Any]:
    """Units and presets of a pipeline folder's UNet, from its configuration alone.

    Args:
        folder: Pipeline folder; weights are not needed.
        teacher: Pipeline folder that the model may be a student of; its plan is inferred where it has none.

    Returns:
        For programs as it stands: `parameters`, `macs`, `macs_without_attention`, `weights_problem` (why the
            weights are not those of the configuration, or None), `student_of`, `drawn_with` (`guidance` and
            `few_steps` of a student that learnt them, else None), `units`, `presets`.
        Each unit has `id`, `parent`, `modules`, `parameters`, `share_of_macs`; its `partners` and what removing it with
        them saves of each measure (`saved`), or why it cannot go (`reason`).

    Raises:
        SurgeryError: If the model cannot come from that teacher.
    """
    config = unet_config(folder)
    anatomy, costs = read_anatomy(config), cost_map(config, num_tokens=prompt_length(folder))
    return {
        **asdict(costs.total()),
        "weights_problem": weights_problem(folder),
        "student_of": _origin(folder, teacher),
        "drawn_with": StudentKind.of(folder).facts(),
        "units": list(_units(anatomy, costs)),
        "presets": [_preset(anatomy, costs, name) for name in PRESETS if name != "none" and fits(anatomy, name)],
    }


def lineage_of(student: Path, teacher: Path | None) -> Lineage:
    """How a student came from a teacher: by its own plan files where they lead there, else inferred.

    Args:
        student: Pipeline folder.
        teacher: Pipeline folder; None for the only teacher that the plan file knows.

    Raises:
        SurgeryError: If it does not say, if there are several teachers, or if it cannot come from that one.
    """
    steps = load_plans(student) if (student / PLAN_FILE).is_file() else []
    if teacher is None and len(steps) == 1:
        return Lineage((steps[0][0],))
    if teacher is None:
        raise SurgeryError(
            "this student was pruned in several steps" if steps else "this student does not say how it was pruned",
            where=student,
            got=f"{len(steps)} plans" if steps else f"no {PLAN_FILE}",
            remedy="--teacher MODEL: the one that is meant",
        )
    if steps and (teacher / "unet").is_dir():
        digest = model_digest(teacher)
        for number, (_, teacher_digest) in enumerate(steps, start=1):
            if teacher_digest == digest:
                return Lineage(tuple(plan for plan, _ in steps[:number]))
    return Lineage((recognise(unet_config(teacher), unet_config(student)),))


def _origin(folder: Path, teacher: Path | None) -> dict[str, Any] | None:
    """The plan that a student came by: its own, or the one inferred from a teacher."""
    if teacher is not None:
        plan = recognise(unet_config(teacher), unet_config(folder))
    elif (folder / PLAN_FILE).is_file():
        plan = load_plan(folder)
    else:
        return None
    return {"plan": plan.name, "removed": list(plan.removed), "inferred": teacher is not None}


def _units(anatomy: Anatomy, costs: CostMap) -> Iterator[dict[str, Any]]:
    for unit in all_units(anatomy):
        yield {
            "id": unit,
            "parent": parent_of(unit, anatomy),
            "modules": modules_of(unit, anatomy),
            "parameters": amount_within(anatomy, [unit], costs.parameters.whole),
            "share_of_macs": amount_within(anatomy, [unit], costs.macs.whole) / costs.macs.total,
            **_removal(anatomy, costs, unit),
        }


def _removal(anatomy: Anatomy, costs: CostMap, unit: Unit) -> dict[str, Any]:
    """The partners of a unit and what goes with them all, or why it cannot go."""
    try:
        plan = plan_removal(anatomy.config, unit)
    except SurgeryError as refused:
        reason = str(refused.got if refused.got and refused.got != unit else refused.what)
        return {"partners": [], "saved": None, "reason": reason}
    return {"partners": list(plan.partners), "saved": asdict(costs.saved(anatomy, plan.removed)), "reason": None}


def _preset(anatomy: Anatomy, costs: CostMap, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "aliases": [alias for alias, known in ALIASES.items() if known == name],
        "summary": PRESETS[name].summary,
        "source": PRESETS[name].source,
        **asdict(costs.without(anatomy, plan_removal(anatomy.config, name).removed)),
    }
