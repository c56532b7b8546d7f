"""Presets for UNet2DConditionModel: from a teacher's configuration and a preset's name to a RemovalPlan.

Levels are numbered from the outside in, as diffusers numbers down blocks: level i owns `down_blocks.i` and, mirrored,
`up_blocks.{n-1-i}`, which has one layer more because the down block's input is a skip too. A layer is a resnet with
the attention that follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bkd.errors import SurgeryError, one_of
from bkd.surgery.plan import FeaturePair, RemovalPlan, Sites

PRESETS: dict[str, str] = {
    "sd-small": "one layer fewer in every block; Segmind's SD-Small",
    "bk-small": "sd-small without the mid block; BK-SDM-Small",
    "sd-tiny": "bk-small without the innermost level; Segmind's SD-Tiny",
    "none": "nothing removed: the student starts as the teacher's copy",
}
"""Names and what they remove (Kim et al. 2023, arXiv:2305.15798, figure 3; segmind/distill-sd)."""
ALIASES = {"bk-base": "sd-small", "bk-tiny": "sd-tiny"}
"""BK-SDM's names for two of them: Segmind's Small is BK-SDM's Base."""
PRESET_NAMES = (*PRESETS, *ALIASES)


@dataclass(frozen=True)
class Layout:
    """The layers a student keeps, by the teacher's numbering.

    Attributes:
        down: For each kept level, outside in, the kept layers of its down block.
        up: For each kept level, outside in, the kept layers of its up block; one more than in `down`.
        mid: Whether the mid block stays.
        num_teacher_levels: Levels the teacher has; the innermost ones beyond `len(down)` are removed.
    """

    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    mid: bool
    num_teacher_levels: int

    @property
    def num_levels(self) -> int:
        return len(self.down)

    @property
    def num_removed_levels(self) -> int:
        return self.num_teacher_levels - self.num_levels


def plan_preset(config: Mapping[str, Any], preset: str) -> RemovalPlan:
    """The plan of a named preset for a teacher with this configuration.

    Args:
        config: A UNet2DConditionModel's configuration; only its architecture keys are read.
        preset: One of `PRESET_NAMES`.

    Raises:
        SurgeryError: If the name is unknown, or the teacher has no layer or level to spare.
    """
    one_of(preset, PRESET_NAMES, kind="preset", error=SurgeryError)
    whole = _whole(config)
    return _plan(preset, config, whole, _layout(ALIASES.get(preset, preset), whole))


def _whole(config: Mapping[str, Any]) -> Layout:
    num_levels = len(config["down_block_types"])
    layers = config["layers_per_block"]
    per_level = (layers,) * num_levels if isinstance(layers, int) else tuple(layers)
    return Layout(
        down=tuple(tuple(range(n)) for n in per_level),
        up=tuple(tuple(range(n + 1)) for n in per_level),
        mid=config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None,
        num_teacher_levels=num_levels,
    )


def _layout(preset: str, whole: Layout) -> Layout:
    if preset == "none":
        return whole
    if any(len(layers) != 2 for layers in whole.down):
        raise SurgeryError(
            f"preset '{preset}' needs a teacher with two layers in every block",
            got=f"layers_per_block {[len(layers) for layers in whole.down]}",
            remedy="presets apply to unpruned Stable Diffusion 1.x and 2.x UNets",
        )
    # Of a down block the first layer stays: only it can change the width. Of an up block the first and the last
    # stay: they take the skips of the level below and of the down block's input, whose widths differ.
    thin = replace(whole, down=((0,),) * whole.num_levels, up=((0, 2),) * whole.num_levels)
    if preset == "sd-small":
        return thin
    without_mid = replace(thin, mid=False)
    if preset == "bk-small":
        return without_mid
    return replace(without_mid, down=thin.down[:-1], up=thin.up[:-1])  # sd-tiny


def _plan(name: str, config: Mapping[str, Any], whole: Layout, kept: Layout) -> RemovalPlan:
    if kept.num_removed_levels and config["block_out_channels"][-1] != config["block_out_channels"][-2]:
        raise SurgeryError(
            "the innermost level can only go when the level above it is as wide",
            got=f"block_out_channels {list(config['block_out_channels'])}",
            remedy="choose 'bk-small', which keeps every level",
        )
    renamed = _renamed(kept)
    pairs: dict[Sites, tuple[FeaturePair, ...]] = {"block": _block_pairs(kept), "bk": _bk_pairs(kept)}
    return RemovalPlan(
        name=name,
        removed=_removed(whole, kept),
        overrides=_overrides(config, whole, kept),
        renamed=renamed,
        feature_pairs=pairs,
    )


def _removed(whole: Layout, kept: Layout) -> tuple[str, ...]:
    last = whole.num_levels - 1
    units = []
    for level in range(kept.num_levels):
        units += [f"down.{level}.{layer}" for layer in whole.down[level] if layer not in kept.down[level]]
        units += [f"up.{last - level}.{layer}" for layer in whole.up[level] if layer not in kept.up[level]]
    units += [f"level.{level}" for level in range(kept.num_levels, whole.num_levels)]
    return tuple(units + (["mid"] if whole.mid and not kept.mid else []))


PER_LEVEL_KEYS = (
    "block_out_channels",
    "down_block_types",
    "only_cross_attention",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
)
"""Configuration keys that may hold one value per level, outside in."""


def _overrides(config: Mapping[str, Any], whole: Layout, kept: Layout) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if kept.down != whole.down:
        counts = tuple(len(layers) for layers in kept.down)
        overrides["layers_per_block"] = counts[0] if len(set(counts)) == 1 else counts
    if whole.mid and not kept.mid:
        overrides["mid_block_type"] = None
    if kept.num_removed_levels:
        for key in PER_LEVEL_KEYS:
            if isinstance(config.get(key), (list, tuple)):
                overrides[key] = tuple(config[key][: kept.num_levels])
        overrides["up_block_types"] = tuple(config["up_block_types"][kept.num_removed_levels :])
    return overrides


def _renamed(kept: Layout) -> dict[str, str]:
    """Student prefix -> teacher prefix, for blocks and layers whose number changes."""
    renamed = {}
    for level in range(kept.num_levels):
        theirs, ours = kept.num_teacher_levels - 1 - level, kept.num_levels - 1 - level
        if theirs != ours:
            renamed[f"up_blocks.{ours}"] = f"up_blocks.{theirs}"
        for side, block, source, layers in (
            ("down", level, level, kept.down[level]),
            ("up", ours, theirs, kept.up[level]),
        ):
            for position, layer in enumerate(layers):
                if position != layer:
                    for part in ("resnets", "attentions"):
                        renamed[f"{side}_blocks.{block}.{part}.{position}"] = f"{side}_blocks.{source}.{part}.{layer}"
    return renamed


def _block_pairs(kept: Layout) -> tuple[FeaturePair, ...]:
    """After every block that both have, as in segmind/distill-sd.

    Where inner levels are gone, the student's innermost down block stands where the teacher's last removed up block
    hands over: what it returns goes into the same next block, so those two are paired.
    """
    down = [FeaturePair(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(kept.num_levels)]
    up = [FeaturePair(f"up_blocks.{i + kept.num_removed_levels}", f"up_blocks.{i}") for i in range(kept.num_levels)]
    mid = [FeaturePair("mid_block", "mid_block")] if kept.mid else []
    if kept.num_removed_levels:
        down[-1] = FeaturePair(f"up_blocks.{kept.num_removed_levels - 1}", down[-1].student)
    return tuple(down + mid + up)


def _bk_pairs(kept: Layout) -> tuple[FeaturePair, ...]:
    """BK-SDM's own sites: levels only, never the mid block.

    Without its innermost level the student has no downsampler there; the attention before it is compared instead.
    """
    pairs = [pair for pair in _block_pairs(kept) if pair.student != "mid_block"]
    if kept.num_removed_levels:
        level = kept.num_levels - 1
        block = f"down_blocks.{level}.attentions"
        teacher_last = 1  # the teacher's own last layer, whose output the next level would have seen
        pairs[level] = FeaturePair(f"{block}.{teacher_last}.proj_out", f"{block}.{len(kept.down[level]) - 1}.proj_out")
    return tuple(pairs)
