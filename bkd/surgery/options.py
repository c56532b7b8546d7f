"""What a stock configuration can express, and how a wish is completed into it.

diffusers derives every layer's width from `block_out_channels`. So a kept layer must stand where its width is wanted:
place p of a student's up block takes (channels from below, channels of its skip), and only a teacher's layer that takes
the same two can fill it. This one rule, over all choices of layers, says what can go and what must go with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

from bkd.errors import SurgeryError
from bkd.surgery.anatomy import Anatomy, Block, Layout, Mid, Stack
from bkd.surgery.units import Unit

T = TypeVar("T")
MID_KEYS = ("block_out_channels", "attention_head_dim", "num_attention_heads", "cross_attention_dim")
"""What the mid block takes from the innermost level's entry in the configuration."""


@dataclass(frozen=True)
class LevelChoice:
    """The layers that one level keeps, down and up."""

    down: tuple[int, ...]
    up: tuple[int, ...]


def level_choices(anatomy: Anatomy, level: int, num_levels: int) -> list[LevelChoice]:
    """All choices of layers that a level can keep in a student of `num_levels` levels, the fullest first.

    Among equals the default comes first: of a down block the last layers go, of an up block the middle ones.
    """
    num_down, num_up = len(anatomy.whole.down[level].layers), len(anatomy.whole.up[level].layers)
    inputs = [down_channels(anatomy, level, place) for place in range(num_down)]
    takes = [up_channels(anatomy, level, place, num_up, anatomy.num_levels) for place in range(num_up)]
    choices = []
    for count in range(num_down, -1, -1):
        if count == 0 and down_channels(anatomy, level, 0) != anatomy.channels[level]:
            continue  # the first layer is the one that widens
        downs = _fitting(inputs, [down_channels(anatomy, level, place) for place in range(count)])
        wanted = [up_channels(anatomy, level, place, count + 1, num_levels) for place in range(count + 1)]
        choices += [LevelChoice(down, up) for down in downs for up in sorted(_fitting(takes, wanted), key=_outermost)]
    return choices


def down_channels(anatomy: Anatomy, level: int, place: int) -> int:
    """Channels that a down layer takes at its place."""
    return anatomy.channels[max(0, level - 1) if place == 0 else level]


def up_channels(anatomy: Anatomy, level: int, place: int, total: int, num_levels: int) -> tuple[int, int]:
    """Channels that an up layer takes at its place: from below, and from its skip connection."""
    below = level + 1 if place == 0 and level + 1 < num_levels else level
    skip = max(0, level - 1) if place == total - 1 else level
    return anatomy.channels[below], anatomy.channels[skip]


def _fitting(takes: Sequence[T], wanted: Sequence[T]) -> list[tuple[int, ...]]:
    """Ways to fill the wanted places, in order, with layers that take just what is wanted there."""
    chosen = combinations(range(len(takes)), len(wanted))
    return [layers for layers in chosen if [takes[layer] for layer in layers] == [*wanted]]


def _outermost(layers: Stack) -> tuple[bool, int, Stack]:
    return 0 not in layers, -layers[-1], layers


def complete(anatomy: Anatomy, wanted: Collection[Unit]) -> Layout:
    """The fullest layout without the wanted units; what it lacks beyond them are their partners.

    Raises:
        SurgeryError: If no stock configuration lacks just these; says why, and what is nearest.
    """
    num_levels = _num_levels(anatomy, wanted)
    down, up = [], []
    for level in range(num_levels):
        choice = _choose(anatomy, level, num_levels, wanted)
        down.append(_block(anatomy.whole.down[level], f"down.{level}", choice.down, wanted))
        up.append(_block(anatomy.whole.up[level], f"up.{anatomy.up_index(level)}", choice.up, wanted))
    mid = _mid(anatomy, num_levels, wanted)
    if mid is not None and mid.stack is not None and down[-1].stacks:
        # diffusers reads the depth of the mid block from the innermost down block's first entry.
        first, shared = _same_depth(down[-1].stacks[0], mid.stack)
        down[-1] = replace(down[-1], stacks=(first, *down[-1].stacks[1:]))
        mid = Mid(shared)
    return Layout(tuple(down), tuple(up), mid)


def _num_levels(anatomy: Anatomy, wanted: Collection[Unit]) -> int:
    levels = sorted(int(unit.removeprefix("level.")) for unit in wanted if unit.startswith("level."))
    if not levels:
        return anatomy.num_levels
    if levels[0] == 0:
        raise SurgeryError("nothing would be left of the UNet", got="level.0", remedy="keep the outermost level")
    if levels != list(range(levels[0], anatomy.num_levels)):
        raise SurgeryError(
            f"level.{levels[0]} can only go together with the levels inside it",
            allowed=", ".join(f"level.{level}" for level in range(levels[0], anatomy.num_levels)),
            remedy=f"the nearest that can go alone: level.{anatomy.num_levels - 1}",
        )
    return levels[0]


def _choose(anatomy: Anatomy, level: int, num_levels: int, wanted: Collection[Unit]) -> LevelChoice:
    choices = level_choices(anatomy, level, num_levels)
    gone = {unit for unit in layer_units(anatomy, level) if unit in wanted}
    for choice in choices:
        if gone <= lacking(anatomy, level, choice):
            return choice
    removals = [lacked for choice in choices if (lacked := lacking(anatomy, level, choice))]
    nearest = min(removals, key=lambda lacked: len(lacked ^ gone), default=set())
    reasons = [why for unit in sorted(gone) if (why := why_fixed(anatomy, unit))]
    if num_levels < anatomy.num_levels and not reasons:
        reasons = [f"without level.{num_levels}, no layers of level {level} have the widths that are wanted there"]
    raise SurgeryError(
        f"no stock configuration of level {level} lacks {', '.join(sorted(gone)) or 'what the other removals take'}",
        got="; ".join(reasons) or "no other layers have the widths that are wanted in their places",
        remedy="the nearest that can go: " + (", ".join(sorted(nearest)) or "nothing at this level"),
    )


def layer_units(anatomy: Anatomy, level: int) -> list[Unit]:
    """The layers of one level."""
    down = [f"down.{level}.{layer}" for layer in anatomy.whole.down[level].layers]
    return down + [f"up.{anatomy.up_index(level)}.{layer}" for layer in anatomy.whole.up[level].layers]


def lacking(anatomy: Anatomy, level: int, choice: LevelChoice) -> set[Unit]:
    """The layers that a choice does without."""
    kept = {f"down.{level}.{layer}" for layer in choice.down}
    kept |= {f"up.{anatomy.up_index(level)}.{layer}" for layer in choice.up}
    return {*layer_units(anatomy, level)} - kept


def why_fixed(anatomy: Anatomy, unit: Unit) -> str | None:
    """Why a layer cannot go while all levels stay: it alone takes the channels that are wanted in its place."""
    side, block, layer = unit.split(".")
    level, place = (int(block) if side == "down" else anatomy.up_index(int(block))), int(layer)
    if any(unit in lacking(anatomy, level, choice) for choice in level_choices(anatomy, level, anatomy.num_levels)):
        return None
    wide = anatomy.channels[level]
    if side == "down":
        narrow = down_channels(anatomy, level, place)
        return f"{unit} alone turns {narrow} channels into {wide}" if narrow != wide else None
    total = len(anatomy.whole.up[level].layers)
    takes = [up_channels(anatomy, level, other, total, anatomy.num_levels) for other in range(total)]
    below, skip = takes[place]
    return f"{unit} alone takes {below} + {skip} channels" if takes.count(takes[place]) == 1 else None


def _block(whole: Block, name: str, layers: tuple[int, ...], wanted: Collection[Unit]) -> Block:
    if whole.stacks is None or f"{name}.attn" in wanted:
        return Block(layers, None)
    stacks = [_left(whole.stack_of(layer), f"{name}.{layer}", wanted) for layer in layers]
    return Block(layers, tuple(stacks))


def _left(stack: Stack, prefix: str, wanted: Collection[Unit]) -> Stack:
    return tuple(number for number in stack if f"{prefix}.t{number}" not in wanted)


def mid_fits(anatomy: Anatomy, num_levels: int) -> bool:
    """Whether the mid block can stay when only this many levels do."""
    now, then = num_levels - 1, anatomy.num_levels - 1
    return all(anatomy.per_level(key, now) == anatomy.per_level(key, then) for key in MID_KEYS)


def _mid(anatomy: Anatomy, num_levels: int, wanted: Collection[Unit]) -> Mid | None:
    whole = anatomy.whole.mid
    if whole is None or "mid" in wanted or not mid_fits(anatomy, num_levels):
        return None
    if whole.stack is None or "mid.attn" in wanted:
        return Mid(None)
    return Mid(_left(whole.stack, "mid", wanted))


def _same_depth(one: Stack, other: Stack) -> tuple[Stack, Stack]:
    """Shorten the longer of two stacks, first by what the shorter one lacks, then from its end."""
    depth = min(len(one), len(other))

    def shorten(stack: Stack, model: Stack) -> Stack:
        first_to_go = sorted(stack, key=lambda number: (number in model, -number))
        return tuple(sorted(first_to_go[len(stack) - depth :]))

    return shorten(one, other), shorten(other, one)
