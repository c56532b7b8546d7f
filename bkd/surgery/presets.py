"""Presets: removals that papers and released students made known."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from bkd.errors import SurgeryError
from bkd.surgery.anatomy import Anatomy, Block, Layout, Mid


@dataclass(frozen=True)
class Preset:
    """What a preset removes; the defaults remove nothing.

    Attributes:
        summary: In words.
        source: Where it comes from.
        thin: One layer fewer in every block: down blocks keep the first, up blocks the first and the last.
        mid: Whether the mid block stays.
        num_levels_removed: Innermost levels that go.
        depth: Transformer layers kept of each stack, its first ones; None for all.
    """

    summary: str
    source: str
    thin: bool = True
    mid: bool = True
    num_levels_removed: int = 0
    depth: int | None = None


BK_SDM = "Kim et al. 2023, arXiv:2305.15798, figure 3"
KOALA = "Lee et al. 2023, arXiv:2312.04005"
PRESETS: dict[str, Preset] = {
    "sd-small": Preset("one layer fewer in every block", f"Segmind SD-Small; BK-SDM-Base: {BK_SDM}"),
    "bk-small": Preset("sd-small without the mid block", f"BK-SDM-Small: {BK_SDM}", mid=False),
    "sd-tiny": Preset(
        "bk-small without the innermost level",
        f"Segmind SD-Tiny; BK-SDM-Tiny: {BK_SDM}",
        mid=False,
        num_levels_removed=1,
    ),
    "koala-1b": Preset("sd-small with the first 6 layers of each transformer stack", KOALA, depth=6),
    "koala-700m": Preset("bk-small with the first 5 layers of each transformer stack", KOALA, mid=False, depth=5),
    "none": Preset("nothing removed: the student starts as the teacher's copy", "", thin=False),
}
ALIASES = {"bk-base": "sd-small", "bk-tiny": "sd-tiny"}
"""BK-SDM's names for two of them: Segmind's Small is BK-SDM's Base."""
PRESET_NAMES = (*PRESETS, *ALIASES)


def split_list(blocks: str) -> list[str]:
    """The words of a list; a comma inside a pattern's brackets belongs to the pattern."""
    return [word.strip() for word in re.split(r",(?![^\[]*\])", blocks) if word.strip()]


def is_unknown_name(word: str) -> bool:
    """Whether a word of a list is written like a preset's name and is none; units have dots, patterns and paths."""
    return re.fullmatch(r"[\w-]+", word) is not None and word not in (*PRESET_NAMES, "mid", "mid_block")


def preset_layout(anatomy: Anatomy, name: str) -> Layout:
    """What a preset keeps of a teacher.

    Args:
        anatomy: The teacher's.
        name: One of `PRESET_NAMES`.

    Raises:
        SurgeryError: If the teacher is not of the kind that the preset was made for.
    """
    preset = PRESETS[ALIASES.get(name, name)]
    if not preset.thin:
        return anatomy.whole
    _check_fits(anatomy, name, preset)
    levels = range(anatomy.num_levels - preset.num_levels_removed)
    return Layout(
        down=tuple(_thin(anatomy.whole.down[level], (0,), preset.depth) for level in levels),
        up=tuple(_thin(anatomy.whole.up[level], (0, 2), preset.depth) for level in levels),
        mid=_mid(anatomy.whole.mid, preset),
    )


def _check_fits(anatomy: Anatomy, name: str, preset: Preset) -> None:
    if any(len(block.layers) != 2 for block in anatomy.whole.down):
        raise SurgeryError(
            f"preset '{name}' needs a teacher with two layers in every block",
            got=f"layers_per_block {[len(block.layers) for block in anatomy.whole.down]}",
            remedy="name the units to remove; `bkd inspect` lists them",
        )
    if preset.num_levels_removed and (anatomy.num_levels < 2 or anatomy.channels[-1] != anatomy.channels[-2]):
        raise SurgeryError(
            f"preset '{name}' needs an innermost level as wide as the one above it",
            got=f"block_out_channels {list(anatomy.channels)}",
            remedy="choose 'bk-small', which keeps every level, or for SDXL 'koala-700m'",
        )
    deepest = max((len(stack) for block in anatomy.whole.down for stack in block.stacks or ()), default=0)
    if preset.depth is not None and deepest <= preset.depth:
        raise SurgeryError(
            f"preset '{name}' needs a teacher with deeper transformer stacks (SDXL)",
            got=f"at most {deepest} transformer layers in an attention",
            allowed=f"more than {preset.depth}",
            remedy="choose 'sd-small' or 'bk-small'",
        )


def _thin(block: Block, layers: tuple[int, ...], depth: int | None) -> Block:
    return Block(layers, None if block.stacks is None else tuple(block.stack_of(layer)[:depth] for layer in layers))


def _mid(mid: Mid | None, preset: Preset) -> Mid | None:
    if mid is None or not preset.mid:
        return None
    return mid if mid.stack is None else replace(mid, stack=mid.stack[: preset.depth])
