"""From a teacher and a plan to a student: construct, load strictly, read back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bkd.errors import SurgeryError
from bkd.surgery.plan import RemovalPlan


def build_student(
    teacher: UNet2DConditionModel, plan: RemovalPlan, *, share_base: bool = False
) -> UNet2DConditionModel:
    """A stock UNet with the plan's architecture and the teacher's remaining weights.

    Args:
        teacher: Not changed.
        plan: Made for a teacher of this configuration.
        share_base: Make the student's parameters the teacher's own, frozen, instead of copies.

    Returns:
        On the teacher's device and in its dtype; every tensor equals its mapped teacher tensor bit for bit, or is one
        of `plan.added` and zero.

    Raises:
        SurgeryError: If the built model does not have the planned configuration, or a tensor has no source.
    """
    with torch.device("meta"):
        # Edits must be keyword arguments: from_config drops edited keys that the checkpoint itself did not set.
        student = UNet2DConditionModel.from_config(teacher.config, **plan.overrides)
    _read_back(student, plan)
    # Sharing means the same Parameter objects: with these, and only these, it survives casts and moves.
    theirs = teacher.state_dict(keep_vars=share_base)
    state = {}
    for key, planned in student.state_dict().items():
        if key in plan.added:
            state[key] = torch.zeros(planned.shape, dtype=teacher.dtype, device=teacher.device)
            continue
        source = plan.source_of(key)
        if source not in theirs or theirs[source].shape != planned.shape:
            found = f"shape {tuple(theirs[source].shape)}" if source in theirs else "no such tensor"
            raise SurgeryError(
                f"plan '{plan.name}' does not fit this teacher",
                where=f"{key} <- {source}",
                got=found,
                allowed=f"shape {tuple(planned.shape)}",
                remedy="make the plan from this teacher's own configuration",
            )
        state[key] = theirs[source] if share_base else theirs[source].detach().clone()
    student.load_state_dict(state, strict=True, assign=True)
    student.requires_grad_(not share_base)
    for key in plan.added:  # they are the student's own, whatever is shared
        student.get_parameter(key).requires_grad_(True)
    return student.eval()


def build_empty(config: dict[str, Any], plan: RemovalPlan | None = None) -> UNet2DConditionModel:
    """The network of a configuration, changed by a plan, on the meta device: exact shapes, no memory.

    Raises:
        SurgeryError: If the built model does not have the planned configuration.
    """
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config, **(plan.overrides if plan else {}))
    if plan:
        _read_back(model, plan)
    return model


def _read_back(student: UNet2DConditionModel, plan: RemovalPlan) -> None:
    for key, wanted in plan.overrides.items():
        built = student.config[key]
        if _plain(built) != _plain(wanted):
            raise SurgeryError(
                f"the built model ignored an override of plan '{plan.name}'", where=key, got=built, allowed=wanted
            )


def _plain(value: object) -> object:
    """Lists come back from JSON where tuples went in."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
