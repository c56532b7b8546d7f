"""Students that others pruned: a plan inferred from the two configurations.

A configuration says how many layers were kept, not which. Where a preset has the same numbers, it is taken to be that
preset (segmind/small-sd, nota-ai/bk-sdm-*, etri-vilab/koala-* are); otherwise the default removal with these numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bkd.errors import SurgeryError
from bkd.surgery.anatomy import Anatomy, Block, Layout, Mid, read_anatomy
from bkd.surgery.options import level_choices
from bkd.surgery.overrides import sizes
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.presets import PRESETS, preset_layout
from bkd.surgery.unet import fits, plan_layout

UNCHANGED = {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "norm_num_groups": 32,
}
"""Keys that pruning never changes, with diffusers' defaults."""


def recognise(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> RemovalPlan:
    """The plan by which a student of this configuration comes from a teacher of that one.

    Raises:
        SurgeryError: If no removal leads from the one to the other.
    """
    whole, found = read_anatomy(teacher), read_anatomy(student)
    for key, default in UNCHANGED.items():
        got, wanted = student.get(key, default), teacher.get(key, default)
        if isinstance(wanted, (list, tuple)):
            got, wanted = list(got) if isinstance(got, (list, tuple)) else got, list(wanted)[: found.num_levels]
        if got != wanted:
            raise _not_a_student(key, got=got, wanted=wanted)
    if found.channels != whole.channels[: found.num_levels]:
        raise _not_a_student("block_out_channels", got=list(found.channels), wanted=list(whole.channels))
    layouts = [preset_layout(whole, name) for name in PRESETS if fits(whole, name)]
    for layout in (*layouts, _default(whole, found.whole)):
        if sizes(layout) == sizes(found.whole):
            plan, dim = plan_layout(whole, layout), student.get("time_cond_proj_dim")
            return plan.with_guidance_input(dim) if dim and not teacher.get("time_cond_proj_dim") else plan
    raise _not_a_student("layers", got=_described(found.whole), wanted=f"a part of {_described(whole.whole)}")


def _not_a_student(key: str, *, got: object, wanted: object) -> SurgeryError:
    return SurgeryError(
        "this UNet cannot come from that teacher by removing blocks",
        where=key,
        got=got,
        allowed=wanted,
        remedy="name the teacher that this student was pruned from",
    )


def _default(teacher: Anatomy, student: Layout) -> Layout:
    """The default removal that leaves as many levels, layers and transformer layers as the student has."""
    down, up = [], []
    for level in range(student.num_levels):
        count = len(student.down[level].layers)
        choices = level_choices(teacher, level, student.num_levels)
        choice = next((choice for choice in choices if len(choice.down) == count), None)
        if choice is None:
            return teacher.whole
        down.append(_cut(teacher.whole.down[level], choice.down, student.down[level]))
        up.append(_cut(teacher.whole.up[level], choice.up, student.up[level]))
    mid, theirs = student.mid, teacher.whole.mid
    if mid is None or theirs is None:
        mid = None
    elif mid.stack is not None:
        mid = theirs if theirs.stack is None else Mid(theirs.stack[: len(mid.stack)])
    return Layout(tuple(down), tuple(up), mid)


def _cut(teacher: Block, layers: tuple[int, ...], student: Block) -> Block:
    if student.stacks is None or teacher.stacks is None:
        return Block(layers, None)
    depths = map(len, student.stacks)
    return Block(layers, tuple(teacher.stack_of(layer)[:depth] for layer, depth in zip(layers, depths, strict=False)))


def _described(layout: Layout) -> str:
    down = [len(block.layers) for block in layout.down]
    return f"{layout.num_levels} levels of {down} layers, {'with' if layout.mid else 'without'} mid block"
