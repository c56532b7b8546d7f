"""The keyword arguments of `from_config` that say what a layout keeps."""

from __future__ import annotations

from typing import Any, Union

from bkd.surgery.anatomy import Anatomy, Block, Layout, read_anatomy

PER_LEVEL_KEYS = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "only_cross_attention",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
)
"""Configuration keys that may hold one value per level, outside in."""
Depth = Union[int, tuple[int, ...]]
"""Transformer layers of a block's attentions: one number for all, or one for each."""


def config_overrides(anatomy: Anatomy, kept: Layout) -> dict[str, Any]:
    """What differs from the teacher's configuration; empty when all is kept."""
    overrides = {**_cut(anatomy, kept), **_block_types(anatomy, kept)}
    counts = tuple(len(block.layers) for block in kept.down)
    if counts != tuple(len(block.layers) for block in anatomy.whole.down[: kept.num_levels]):
        # One number where it will do: ControlNetModel.from_unet does not take a list.
        overrides["layers_per_block"] = counts[0] if len({*counts}) == 1 else counts
    if kept.mid is None and anatomy.whole.mid is not None:
        overrides["mid_block_type"] = None
    elif kept.mid != anatomy.whole.mid and kept.mid is not None and kept.mid.stack is None:
        overrides["mid_block_type"] = "UNetMidBlock2D"
    if sizes(read_anatomy({**anatomy.config, **overrides}).whole) != sizes(kept):
        overrides |= _depths(anatomy, kept)
    assert sizes(read_anatomy({**anatomy.config, **overrides}).whole) == sizes(kept)
    return overrides


def sizes(layout: Layout) -> tuple[object, ...]:
    """Numbers of layers and depths of stacks: all that a configuration says of a layout."""
    blocks = [
        (len(block.layers), block.stacks and [len(stack) for stack in block.stacks])
        for block in (*layout.down, *layout.up)
    ]
    stack = layout.mid.stack if layout.mid is not None else None
    return (*blocks, layout.mid is not None, None if stack is None else len(stack))


def _cut(anatomy: Anatomy, kept: Layout) -> dict[str, Any]:
    """Per-level values without those of removed levels."""
    gone = anatomy.num_levels - kept.num_levels
    if not gone:
        return {}
    values = {key: anatomy.config.get(key) for key in PER_LEVEL_KEYS}
    cut = {key: tuple(value[: kept.num_levels]) for key, value in values.items() if isinstance(value, (list, tuple))}
    cut["up_block_types"] = tuple(anatomy.config["up_block_types"][gone:])
    if backward := anatomy.config.get("reverse_transformer_layers_per_block"):
        cut["reverse_transformer_layers_per_block"] = tuple(backward[gone:])
    return cut


def _block_types(anatomy: Anatomy, kept: Layout) -> dict[str, Any]:
    """Block types, where a block has lost its attentions."""
    gone = anatomy.num_levels - kept.num_levels
    sides = (
        ("down_block_types", anatomy.whole.down, kept.down, anatomy.config["down_block_types"][: kept.num_levels]),
        ("up_block_types", anatomy.whole.up, kept.up, anatomy.config["up_block_types"][gone:][::-1]),
    )
    changed = {}
    for key, theirs, ours, types in sides:
        bare = [now.stacks is None and before.stacks is not None for before, now in zip(theirs, ours, strict=False)]
        if any(bare):
            plain = tuple(
                kind.replace("CrossAttn", "") if lost else kind for kind, lost in zip(types, bare, strict=True)
            )
            changed[key] = plain if key.startswith("down") else plain[::-1]
    return changed


def _depths(anatomy: Anatomy, kept: Layout) -> dict[str, Any]:
    """Transformer layers of each attention, in the plainest form that can say them."""
    down, up = [_depth(block) for block in kept.down], [_depth(block) for block in kept.up]
    if down[-1] is None and kept.mid is not None and kept.mid.stack is not None:
        down[-1] = len(kept.mid.stack)  # where diffusers looks for the depth of the mid block
    # A block without attention may say anything: the same as its mirror, where that is one number.
    forward = [_either(own, mirror) for own, mirror in zip(down, up, strict=True)]
    backward = [_either(own, mirror) for own, mirror in zip(up, down, strict=True)]
    depths: dict[str, Any] = {"transformer_layers_per_block": tuple(forward)}
    if forward != backward or any(isinstance(depth, tuple) for depth in forward):
        depths["reverse_transformer_layers_per_block"] = tuple(reversed(backward))
    elif anatomy.config.get("reverse_transformer_layers_per_block") is not None:
        depths["reverse_transformer_layers_per_block"] = None
    return depths


def _depth(block: Block) -> Depth | None:
    """None where there is no attention."""
    if not block.stacks:
        return None
    depths = tuple(len(stack) for stack in block.stacks)
    return depths[0] if len({*depths}) == 1 else depths


def _either(own: Depth | None, mirror: Depth | None) -> Depth:
    if own is not None:
        return own
    return mirror if isinstance(mirror, int) else 1
