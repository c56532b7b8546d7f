"""What a UNet is made of: its units, what each weighs, what may go, and what the presets would leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bkd.cost import UNetCost, count_flops, unet_cost
from bkd.errors import SurgeryError
from bkd.model_folder import prompt_length, unet_config
from bkd.surgery.anatomy import Anatomy, read_anatomy
from bkd.surgery.build import build_empty
from bkd.surgery.plan import PLAN_FILE, RemovalPlan, load_plan
from bkd.surgery.presets import ALIASES, PRESETS
from bkd.surgery.recognise import recognise
from bkd.surgery.unet import fits, plan_removal
from bkd.surgery.units import Unit, all_units, modules_of


def inspect_model(folder: Path, teacher: Path | None = None) -> dict[str, Any]:
    """Units and presets of a pipeline folder's UNet, from its configuration alone.

    Args:
        folder: Pipeline folder; weights are not needed.
        teacher: Pipeline folder that the model may be a student of; its plan is inferred where it has none.

    Returns:
        For programs as it stands: `parameters`, `macs`, `macs_without_attention`, `student_of`, `units`, `presets`.
        Each unit has `id`, `modules`, `parameters`, `share_of_macs`, `partners`, and `reason`: why it cannot go.

    Raises:
        SurgeryError: If the model cannot come from that teacher.
    """
    config, tokens = unet_config(folder), prompt_length(folder)
    anatomy = read_anatomy(config)
    cost = unet_cost(config, num_tokens=tokens)
    return {
        **_figures(cost),
        "student_of": _origin(folder, teacher),
        "units": list(_units(anatomy, tokens)),
        "presets": [_preset(config, name, tokens) for name in PRESETS if name != "none" and fits(anatomy, name)],
    }


def _figures(cost: UNetCost) -> dict[str, int]:
    return {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "macs_without_attention": cost.macs_without_attention,
    }


def plan_of(student: Path, teacher: Path | None) -> RemovalPlan:
    """The plan that a student came by: inferred from a teacher where one is given, else its own.

    Raises:
        SurgeryError: If there is neither, or the student cannot come from that teacher.
    """
    if teacher is not None:
        return recognise(unet_config(teacher), unet_config(student))
    if not (student / PLAN_FILE).is_file():
        raise SurgeryError(
            "this student does not say how it was pruned",
            where=student,
            got=f"no {PLAN_FILE}",
            remedy="--teacher MODEL: the teacher it came from; the plan is then inferred",
        )
    return load_plan(student)


def _origin(folder: Path, teacher: Path | None) -> dict[str, Any] | None:
    if teacher is None and not (folder / PLAN_FILE).is_file():
        return None
    plan = plan_of(folder, teacher)
    return {"plan": plan.name, "removed": list(plan.removed), "inferred": teacher is not None}


def _units(anatomy: Anatomy, tokens: int) -> Iterator[dict[str, Any]]:
    unet = build_empty(dict(anatomy.config))
    counts = count_flops(unet, tokens)
    flops = {name.partition(".")[2]: sum(found.values()) for name, found in counts.items()}
    total = sum(counts["Global"].values())
    for unit in all_units(anatomy):
        modules = modules_of(unit, anatomy)
        inner = [name for module in modules for name in _counted(module, flops)]
        partners, reason = _removal(anatomy.config, unit)
        yield {
            "id": unit,
            "modules": modules,
            "parameters": sum(p.numel() for module in modules for p in unet.get_submodule(module).parameters()),
            "share_of_macs": sum(flops[name] for name in inner) / total,
            "partners": partners,
            "reason": reason,
        }


def _counted(module: str, flops: Mapping[str, int]) -> list[str]:
    """The counter knows modules that are called; of a list, which is not, its items."""
    if module in flops:
        return [module]
    return [name for name in flops if name.startswith(f"{module}.") and name.count(".") == module.count(".") + 1]


def _removal(config: Mapping[str, Any], unit: Unit) -> tuple[list[Unit], str | None]:
    """The partners of a unit, or why it cannot go."""
    try:
        return list(plan_removal(config, unit).partners), None
    except SurgeryError as refused:
        return [], str(refused.got if refused.got and refused.got != unit else refused.what)


def _preset(config: dict[str, Any], name: str, tokens: int) -> dict[str, Any]:
    return {
        "name": name,
        "aliases": [alias for alias, known in ALIASES.items() if known == name],
        "summary": PRESETS[name].summary,
        "source": PRESETS[name].source,
        **_figures(unet_cost(config, plan_removal(config, name), num_tokens=tokens)),
    }
