"""Units: the pieces of a UNet that can be named for removal.

    down.1.0  up.2.1    a layer: a resnet with the attention that follows it
    down.1.attn         all attentions of one block
    down.1.0.t3         transformer layer 3 of that layer's attention
    mid  mid.attn  mid.t3
    level.3             a level: its down block, its up block and the resampling between it and the next

Module paths of diffusers are understood too, and patterns as in a shell: `*.t[6-9]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from bkd.errors import SurgeryError, suggest
from bkd.surgery.anatomy import Anatomy, Block, Layout, Stack

Unit = str
"""A unit's id."""


class BlockName(NamedTuple):
    """`down.1`: a block, its number being diffusers'."""

    side: str
    number: int

    def __str__(self) -> str:
        return f"{self.side}.{self.number}"


def blocks_of(anatomy: Anatomy, layout: Layout) -> Iterator[tuple[BlockName, Block, Block]]:
    """(name, the teacher's block, what a layout keeps of it) for every level that the layout has."""
    for level in range(layout.num_levels):
        yield BlockName("down", level), anatomy.whole.down[level], layout.down[level]
        yield BlockName("up", anatomy.up_index(level)), anatomy.whole.up[level], layout.up[level]


def all_units(anatomy: Anatomy) -> list[Unit]:
    """Every unit, level by level from the outside in; the mid block comes last."""
    found: list[Unit] = []
    for name, block, _ in blocks_of(anatomy, anatomy.whole):
        if name.side == "down":
            found.append(f"level.{name.number}")
        found += _block_units(name, block)
    return [*found, *_mid_units(anatomy)]


def level_of(unit: Unit, anatomy: Anatomy) -> int | None:
    """The level that a unit lies in or is; None for the mid block and its parts."""
    kind, _, rest = unit.partition(".")
    if kind == "mid":
        return None
    number = int(rest.split(".")[0])
    return anatomy.up_index(number) if kind == "up" else number


def parent_of(unit: Unit, anatomy: Anatomy) -> Unit | None:
    """The next larger unit that goes with this one's place: its layer, its level, or the mid block."""
    if unit == "mid" or unit.startswith("level."):
        return None
    level = level_of(unit, anatomy)
    if level is None:
        return "mid"
    return unit.rpartition(".")[0] if ".t" in unit else f"level.{level}"


def _block_units(name: BlockName, block: Block) -> Iterator[Unit]:
    for layer in block.layers:
        yield f"{name}.{layer}"
        yield from (f"{name}.{layer}.t{number}" for number in block.stack_of(layer))
    if block.stacks:
        yield f"{name}.attn"


def _mid_units(anatomy: Anatomy) -> Iterator[Unit]:
    if anatomy.whole.mid is not None:
        yield "mid"
        if anatomy.whole.mid.stack is not None:
            yield from (f"mid.t{number}" for number in anatomy.whole.mid.stack)
            yield "mid.attn"


def removed_units(anatomy: Anatomy, layout: Layout) -> tuple[Unit, ...]:
    """The units that a layout lacks, each named by the largest unit that holds it."""
    removed = []
    for name, theirs, ours in blocks_of(anatomy, layout):
        removed += [f"{name}.{layer}" for layer in theirs.layers if layer not in ours.layers]
        if theirs.stacks and ours.stacks is None and ours.layers:
            removed.append(f"{name}.attn")
        elif theirs.stacks and ours.stacks is not None:
            for layer in ours.layers:
                removed += _missing(f"{name}.{layer}", theirs.stack_of(layer), ours.stack_of(layer))
    removed += [f"level.{level}" for level in range(layout.num_levels, anatomy.num_levels)]
    if (whole := anatomy.whole.mid) is not None:
        if layout.mid is None:
            removed.append("mid")
        elif whole.stack is not None:
            kept = layout.mid.stack
            removed += ["mid.attn"] if kept is None else _missing("mid", whole.stack, kept)
    return tuple(removed)


def _missing(prefix: str, whole: Stack, kept: Stack) -> list[Unit]:
    return [f"{prefix}.t{number}" for number in whole if number not in kept]


def is_within(unit: Unit, other: Unit, anatomy: Anatomy) -> bool:
    """Whether removing `other` removes `unit` as well."""
    if unit == other or unit.startswith(other + "."):
        return True
    if other.endswith(".attn"):
        block = other.removesuffix(".attn")
        return unit.startswith(block + ".") and re.search(r"\.t\d+$", unit) is not None
    return other.startswith("level.") and level_of(unit, anatomy) == level_of(other, anatomy)


def modules_of(unit: Unit, anatomy: Anatomy) -> list[str]:
    """The teacher's modules that go with a unit; each path ends where a module does."""
    kind, _, rest = unit.partition(".")
    if kind == "level":
        level = int(rest)
        above = [f"down_blocks.{level - 1}.downsamplers"] if level else []
        return [f"down_blocks.{level}", f"up_blocks.{anatomy.up_index(level)}", *above]
    if kind == "mid":
        inside = {"": ["mid_block"], "attn": ["mid_block.attentions", "mid_block.resnets.1"]}
        return inside.get(rest) or [f"mid_block.attentions.0.transformer_blocks.{rest[1:]}"]
    block, *inner = rest.split(".")
    match inner:
        case ["attn"]:
            return [f"{kind}_blocks.{block}.attentions"]
        case [layer]:
            home = level_of(unit, anatomy)
            assert home is not None  # a layer lies in one
            blocks = anatomy.whole.down if kind == "down" else anatomy.whole.up
            has_attention = blocks[home].stacks is not None
            parts = ("resnets", "attentions") if has_attention else ("resnets",)
            return [f"{kind}_blocks.{block}.{part}.{layer}" for part in parts]
        case [layer, number]:
            return [f"{kind}_blocks.{block}.attentions.{layer}.transformer_blocks.{number[1:]}"]
    raise AssertionError(unit)


def parse_unit(text: str, anatomy: Anatomy) -> frozenset[Unit]:
    """The units that one word of a list stands for: an id, a pattern or a module path.

    Raises:
        SurgeryError: If there is nothing of that name, or it is no unit.
    """
    units = all_units(anatomy)
    if text in units:
        return frozenset([text])
    if any(letter in text for letter in "*?["):
        found = frozenset(unit for unit in units if fnmatchcase(unit, text))
        if not found:
            raise SurgeryError(f"no unit matches the pattern '{text}'", remedy="`bkd inspect MODEL` lists all units")
        return found
    path = re.fullmatch(r"(down_blocks|up_blocks|mid_block)((?:\.[a-z0-9_]+)*)", text)
    named = _from_path(path[1], [*filter(None, path[2].split("."))], anatomy) if path else frozenset()
    if named and named <= {*units}:
        return named
    if (single := re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)", text)) and (
        layer := f"{single[1]}.{single[2]}.{single[3]}"
    ) + ".t0" in units:
        raise SurgeryError(
            "a stock configuration cannot drop a single attention",
            got=text,
            allowed=f"{layer} (the layer), {single[1]}.{single[2]}.attn (all attentions of the block), "
            f"or its transformer layers: {layer}.t*",
        )
    hint = suggest(text, [*units, *PATH_FORMS])
    raise SurgeryError(f"unknown unit '{text}'{hint}", remedy="`bkd inspect MODEL` lists all units and presets")


PATH_FORMS = (
    "down_blocks.1.attentions",
    "down_blocks.1.resnets.1",
    "mid_block",
    "mid_block.attentions",
    "down_blocks.1.attentions.0.transformer_blocks.0",
)


def _from_path(block: str, rest: list[str], anatomy: Anatomy) -> frozenset[Unit]:
    """Units of a module path, or an empty set where it names none."""
    if block == "mid_block":
        return _from_mid_path(rest)
    match rest:
        case [index] if index.isdecimal() and int(index) < anatomy.num_levels:
            level = int(index) if block == "down_blocks" else anatomy.up_index(int(index))
            return frozenset([f"level.{level}"])
        case [index, "attentions"]:
            return frozenset([f"{block[:-7]}.{index}.attn"])
        case [index, "resnets", layer]:
            return frozenset([f"{block[:-7]}.{index}.{layer}"])
        case [index, "attentions", layer, "transformer_blocks", number]:
            return frozenset([f"{block[:-7]}.{index}.{layer}.t{number}"])
    return frozenset()


def _from_mid_path(rest: list[str]) -> frozenset[Unit]:
    match rest:
        case []:
            return frozenset(["mid"])
        case ["attentions"] | ["attentions", "0"]:
            return frozenset(["mid.attn"])
        case ["attentions", "0", "transformer_blocks", number]:
            return frozenset([f"mid.t{number}"])
    return frozenset()
