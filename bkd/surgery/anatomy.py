"""What a UNet2DConditionModel is made of, read from its configuration alone.

Levels are numbered from the outside in, as diffusers numbers down blocks: level i owns `down_blocks.i` and, mirrored,
`up_blocks.{n-1-i}`, which has one layer more because the down block's input is a skip connection too. A layer is a
resnet with the attention that follows it; an attention holds a stack of transformer layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bkd.errors import SurgeryError

Stack = tuple[int, ...]
"""Transformer layers of one attention, by the teacher's numbers; an empty one leaves norm and projections."""
WITH_ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
"""Block type -> whether its layers have attention; other types are not Stable Diffusion's."""
MID_WITH_ATTENTION = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}


@dataclass(frozen=True)
class Block:
    """The layers that a down or up block keeps, by the teacher's numbers.

    Attributes:
        layers: In the order they run.
        stacks: For each of these layers, its transformer layers; None for a block without attention.
    """

    layers: tuple[int, ...]
    stacks: tuple[Stack, ...] | None

    def stack_of(self, layer: int) -> Stack:
        """Transformer layers after one layer; empty where it is gone or has no attention."""
        return self.stacks[self.layers.index(layer)] if self.stacks is not None and layer in self.layers else ()


@dataclass(frozen=True)
class Mid:
    """A kept mid block: two resnets around an attention, or with `stack` None a single resnet."""

    stack: Stack | None


@dataclass(frozen=True)
class Layout:
    """Everything a student keeps, by the teacher's numbers.

    Attributes:
        down: The down block of each kept level, outside in.
        up: The up block of each kept level, outside in; one layer more than in `down`.
        mid: None where the mid block is gone.
    """

    down: tuple[Block, ...]
    up: tuple[Block, ...]
    mid: Mid | None

    @property
    def num_levels(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class Anatomy:
    """A teacher's UNet.

    Attributes:
        config: Its configuration.
        whole: All that it has.
        channels: Width of each level, outside in.
    """

    config: Mapping[str, Any]
    whole: Layout
    channels: tuple[int, ...]

    @property
    def num_levels(self) -> int:
        return self.whole.num_levels

    def up_index(self, level: int) -> int:
        """Number of the up block of a level."""
        return self.num_levels - 1 - level

    def per_level(self, key: str, level: int) -> Any:
        """A configuration value that may be given once for all levels, or for each."""
        value = self.config.get(key)
        return value[level] if isinstance(value, (list, tuple)) else value


def read_anatomy(config: Mapping[str, Any]) -> Anatomy:
    """The anatomy that a configuration describes.

    Raises:
        SurgeryError: If it has blocks that Stable Diffusion UNets do not have.
    """
    down_types, up_types = config["down_block_types"], config["up_block_types"]
    for block_type in (*down_types, *up_types):
        if block_type not in WITH_ATTENTION:
            raise SurgeryError("unsupported kind of block", got=block_type, allowed=", ".join(WITH_ATTENTION))
    count = len(down_types)
    for key in ("up_block_types", "block_out_channels", "layers_per_block", "transformer_layers_per_block"):
        if isinstance(value := config.get(key), (list, tuple)) and len(value) != count:
            raise SurgeryError(f"{key} does not have one entry for each level", got=list(value), allowed=f"{count}")
    layers = _repeat(config.get("layers_per_block", 2), count)
    depths = _repeat(config.get("transformer_layers_per_block", 1), count)
    up_depths = config.get("reverse_transformer_layers_per_block") or tuple(reversed(depths))
    down = [_block(down_types[i], layers[i], depths[i]) for i in range(count)]
    up = [_block(up_types[count - 1 - i], layers[i] + 1, up_depths[count - 1 - i]) for i in range(count)]
    channels = tuple(config["block_out_channels"])
    return Anatomy(config, Layout(tuple(down), tuple(up), _mid(config, depths[-1])), channels)


def _block(block_type: str, num_layers: int, depth: int | tuple[int, ...]) -> Block:
    layers = tuple(range(num_layers))
    if not WITH_ATTENTION[block_type]:
        return Block(layers, None)
    return Block(layers, tuple(tuple(range(n)) for n in _repeat(depth, num_layers)))


def _mid(config: Mapping[str, Any], depth: int | tuple[int, ...]) -> Mid | None:
    mid_type = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if mid_type is None:
        return None
    if mid_type not in MID_WITH_ATTENTION:
        raise SurgeryError("unsupported kind of mid block", got=mid_type, allowed=", ".join(MID_WITH_ATTENTION))
    if not MID_WITH_ATTENTION[mid_type]:
        return Mid(None)
    # Where the innermost depths are given layer by layer, diffusers takes the first for the mid block.
    return Mid(tuple(range(depth if isinstance(depth, int) else depth[0])))


def _repeat(value: Any, count: int) -> tuple[Any, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)
