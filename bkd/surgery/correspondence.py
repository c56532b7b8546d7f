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
    mid = _mid_pair(anatomy, kept)
    if not gone:
        return {"block": (*down, *mid, *up), "bk": (*down, *up), **_finer(down, mid, up, kept, anatomy)}
    # The student's innermost block has no downsampler; its output has another size than its teacher's namesake.
    outer, last = down[:-1], _last_layer(anatomy, kept)
    joint = [*last, *mid] if kept.mid is not None else _handing_over(anatomy, kept, down[-1].student) or last
    finer = _finer([*outer, *last], mid, up, kept, anatomy)
    return {"block": (*outer, *joint, *up), "bk": (*outer, *last, *up), **finer}


def _mid_pair(anatomy: Anatomy, kept: Layout) -> list[FeaturePair]:
    """The student's mid block and what stands in its place in the teacher."""
    if kept.mid is None:
        return []
    if anatomy.num_levels == kept.num_levels:
        return [FeaturePair("mid_block", "mid_block")]
    return _handing_over(anatomy, kept, "mid_block")


def _handing_over(anatomy: Anatomy, kept: Layout, student: str) -> list[FeaturePair]:
    """Segmind: the student's innermost module stands where the teacher's last removed up block hands over, into the
    same next block. There is no such pair where their widths differ."""
    if anatomy.channels[kept.num_levels] != anatomy.channels[kept.num_levels - 1]:
        return []
    return [FeaturePair(f"up_blocks.{anatomy.num_levels - kept.num_levels - 1}", student)]


def _finer(
    down: list[FeaturePair], mid: list[FeaturePair], up: list[FeaturePair], kept: Layout, anatomy: Anatomy
) -> dict[Sites, tuple[FeaturePair, ...]]:
    """Sites inside the blocks: every kept layer (SSD-1B), every kept self-attention (KOALA).

    Args:
        down: One pair for each kept down block, to stand for it where it has no attention; so are `mid` and `up`.
    """
    layers: list[FeaturePair] = []
    attentions: list[FeaturePair] = []
    for level, block in enumerate(kept.down):
        name = f"down_blocks.{level}"
        layers += _layer_pairs(block, name, name)
        attentions += _attention_pairs(block, name, name) or down[level : level + 1]
    layers += mid
    stack = kept.mid.stack if kept.mid is not None else None
    same_place = "mid_block.attentions.0"
    attentions += _stack_pairs(stack or (), same_place, same_place) if kept.num_levels == anatomy.num_levels else mid
    for level in reversed(range(kept.num_levels)):
        pair = up[kept.num_levels - 1 - level]
        layers += _layer_pairs(kept.up[level], pair.teacher, pair.student)
        attentions += _attention_pairs(kept.up[level], pair.teacher, pair.student) or [pair]
    return {"layer": tuple(layers), "self-attn": tuple(attentions)}


def _layer_pairs(block: Block, theirs: str, ours: str) -> list[FeaturePair]:
    """A block's resnets and attentions in the order they run."""
    parts = ("resnets", "attentions") if block.stacks is not None else ("resnets",)
    return [
        FeaturePair(f"{theirs}.{part}.{layer}", f"{ours}.{part}.{place}")
        for place, layer in enumerate(block.layers)
        for part in parts
    ]


def _attention_pairs(block: Block, theirs: str, ours: str) -> list[FeaturePair]:
    """A block's self-attentions."""
    pairs: list[FeaturePair] = []
    for place, layer in enumerate(block.layers):
        pairs += _stack_pairs(block.stack_of(layer), f"{theirs}.attentions.{layer}", f"{ours}.attentions.{place}")
    return pairs


def _stack_pairs(stack: Stack, theirs: str, ours: str) -> list[FeaturePair]:
    return [
        FeaturePair(f"{theirs}.transformer_blocks.{number}.attn1", f"{ours}.transformer_blocks.{place}.attn1")
        for place, number in enumerate(stack)
    ]


def _last_layer(anatomy: Anatomy, kept: Layout) -> list[FeaturePair]:
    """BK-SDM's pair at the innermost level: what its last layers compute, before any downsampler."""
    level = kept.num_levels - 1
    theirs, ours = anatomy.whole.down[level], kept.down[level]
    if not ours.layers:
        return []
    part = "attentions.{}.proj_out" if ours.stacks is not None else "resnets.{}"
    block = f"down_blocks.{level}."
    return [FeaturePair(block + part.format(theirs.layers[-1]), block + part.format(len(ours.layers) - 1))]
