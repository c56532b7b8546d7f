"""What a student cannot do elsewhere that its teacher can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bkd.surgery.anatomy import Anatomy, read_anatomy
from bkd.surgery.plan import RemovalPlan


def compatibility_notes(config: Mapping[str, Any], plan: RemovalPlan) -> tuple[str, ...]:
    """One note for each thing that users of the student should know; none where nothing is removed.

    Args:
        config: The teacher UNet's configuration.
        plan: What is done to it.
    """
    if not plan.removed:
        return ()
    notes = []
    teacher, student = read_anatomy(config), read_anatomy({**config, **plan.overrides})
    ours, theirs = _skips(student), _skips(teacher)
    if ours == theirs:
        notes += ["The teacher's ControlNets fit: all skip connections are still there."]
    elif ours == theirs[: len(ours)] and student.num_levels == teacher.num_levels:
        notes += [
            "The teacher's ControlNets run without an error on this student, and wrongly: some of their residuals have "
            "no skip connection left. Do not use them."
        ]
    else:
        notes += ["The teacher's ControlNets do not fit: the skip connections differ. Train one on the student."]
    if student.whole.mid is None and teacher.whole.mid is not None:
        notes += [
            "There is no mid block: ControlNetModel.from_unet and trainers that build on it stop with 'unknown "
            "mid_block_type'. Pipelines, LoRA and fine-tuning in diffusers work."
        ]
    notes += ["LoRA files of the teacher: carry them over with `bkd remap`."]
    return tuple(notes)


def _skips(anatomy: Anatomy) -> list[tuple[int, int]]:
    """(channels, level of resolution) of every skip connection, as the down path makes them."""
    skips = [(anatomy.channels[0], 0)]
    for level, block in enumerate(anatomy.whole.down):
        skips += [(anatomy.channels[level], level)] * len(block.layers)
        if level + 1 < anatomy.num_levels:
            skips.append((anatomy.channels[level], level + 1))
    return skips
