"""Which of the teacher's modules each of the student's comes from, and which activations of the two belong together."""

from __future__ import annotations

from bkd.surgery.anatomy import Anatomy, Block, Layout, Stack
from bkd.surgery.plan import FeaturePair, Sites


def renamed_modules(anatomy: Anatomy, kept: Layout) -> dict[str, str]:
    """Student prefix -> teacher prefix, for blocks, layers and transformer layers whose number changes."""
    renamed: dict[str, str] = {}
    gone = anatomy.num_levels - kept.num_levels
    for level in range(kept.num_levels):
        theirs, ours = anatomy.up_index(level), anatomy.up_index(level) - gone
        if gone:
            renamed[f"up_blocks.{ours}"] = f"up_blocks.{theirs}"
        renamed |= _renamed_layers(kept.down[level], f"down_blocks.{level}", f"down_blocks.{level}")
        renamed |= _renamed_layers(kept.up[level], f"up_blocks.{ours}", f"up_blocks.{theirs}")
    if kept.mid is not None:
        renamed |= _renamed_stack(kept.mid.stack or (), "mid_block.attentions.0", "mid_block.attentions.0")
    return renamed


def _renamed_layers(block: Block, ours: str, theirs: str) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for place, layer in enumerate(block.layers):
        if place != layer:
            renamed[f"{ours}.resnets.{place}"] = f"{theirs}.resnets.{layer}"
            if block.stacks is not None:
                renamed[f"{ours}.attentions.{place}"] = f"{theirs}.attentions.{layer}"
        attentions = f"{ours}.attentions.{place}", f"{theirs}.attentions.{layer}"
        renamed |= _renamed_stack(block.stack_of(layer), *attentions)
    return renamed


def _renamed_stack(stack: Stack, ours: str, theirs: str) -> dict[str, str]:
    moved = [(place, number) for place, number in enumerate(stack) if place != number]
    return {f"{ours}.transformer_blocks.{place}": f"{theirs}.transformer_blocks.{number}" for place, number in moved}


def feature_pairs(anatomy: Anatomy, kept: Layout) -> dict[Sites, tuple[FeaturePair, ...]]:
    """For each choice of sites, the pairs of modules whose outputs feature KD compares, from input to output."""
    gone = anatomy.num_levels - kept.num_levels
    down = [FeaturePair(f"down_blocks.{level}", f"down_blocks.{level}") for level in range(kept.num_levels)]
    up = [FeaturePair(f"up_blocks.{block + gone}", f"up_blocks.{block}") for block in range(kept.num_levels)]
    mid = [FeaturePair("mid_block", "mid_block")] if kept.mid is not None else []
    if not gone:
        return {"block": (*down, *mid, *up), "bk": (*down, *up)}
    # The student's innermost block has no downsampler; its output has another size than its teacher's namesake.
    outer, last = down[:-1], _last_layer(anatomy, kept)
    joint = last
    if anatomy.channels[kept.num_levels] == anatomy.channels[kept.num_levels - 1]:
        # Segmind: the student's innermost module stands where the teacher's last removed up block hands over, into
        # the same next block.
        handing_over = FeaturePair(f"up_blocks.{gone - 1}", "mid_block" if mid else down[-1].student)
        joint = [*last, handing_over] if mid else [handing_over]
    return {"block": (*outer, *joint, *up), "bk": (*outer, *last, *up)}


def _last_layer(anatomy: Anatomy, kept: Layout) -> list[FeaturePair]:
    """BK-SDM's pair at the innermost level: what its last layers compute, before any downsampler."""
    level = kept.num_levels - 1
    theirs, ours = anatomy.whole.down[level], kept.down[level]
    if not ours.layers:
        return []
    part = "attentions.{}.proj_out" if ours.stacks is not None else "resnets.{}"
    block = f"down_blocks.{level}."
    return [FeaturePair(block + part.format(theirs.layers[-1]), block + part.format(len(ours.layers) - 1))]
