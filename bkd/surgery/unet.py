"""From a teacher's configuration and a list of units to a RemovalPlan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bkd.errors import SurgeryError, suggest
from bkd.surgery.anatomy import Anatomy, Layout, read_anatomy
from bkd.surgery.correspondence import feature_pairs, renamed_modules
from bkd.surgery.options import complete
from bkd.surgery.overrides import config_overrides
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.presets import PRESET_NAMES, PRESETS, is_unknown_name, preset_layout, split_list
from bkd.surgery.units import Unit, is_within, modules_of, parse_unit, removed_units


def plan_removal(config: Mapping[str, Any], blocks: str, *, strict: bool = False) -> RemovalPlan:
    """The plan that removes a list of units, with the partners that must go along.

    Args:
        config: A UNet2DConditionModel's configuration; only its architecture keys are read.
        blocks: Presets, units, patterns or module paths, separated by commas.
        strict: Refuse instead of removing a partner that was not named.

    Raises:
        SurgeryError: If a name is unknown, or no stock configuration lacks just these units.
    """
    anatomy = read_anatomy(config)
    wanted = parse_blocks(anatomy, blocks)
    layout = complete(anatomy, wanted)
    removed = removed_units(anatomy, layout)
    partners = tuple(unit for unit in removed if not any(is_within(unit, other, anatomy) for other in wanted))
    if partners and strict:
        raise SurgeryError(
            f"'{blocks}' can only go together with other units",
            got=f"partners needed: {', '.join(partners)}",
            remedy="name them too, or leave out --strict",
        )
    return plan_layout(anatomy, layout, partners=partners)


def parse_blocks(anatomy: Anatomy, blocks: str) -> frozenset[Unit]:
    """The units that a comma-separated list names.

    Raises:
        SurgeryError: If a name is unknown or a preset does not fit the teacher.
    """
    wanted: set[Unit] = set()
    words = split_list(blocks)
    for word in words:
        if word in PRESET_NAMES:
            wanted.update(removed_units(anatomy, preset_layout(anatomy, word)))
        else:
            wanted.update(_unit(anatomy, word))
    if not words:
        raise SurgeryError(
            "nothing would be removed", got=f"'{blocks}'", remedy="`bkd inspect` lists presets and units"
        )
    return frozenset(wanted)


def _unit(anatomy: Anatomy, word: str) -> frozenset[Unit]:
    if is_unknown_name(word):
        hint = suggest(word, PRESET_NAMES)
        raise SurgeryError(
            f"unknown preset or unit '{word}'{hint}",
            allowed=f"{', '.join(PRESET_NAMES)}, and the units of `bkd inspect`",
        )
    return parse_unit(word, anatomy)


def plan_layout(anatomy: Anatomy, layout: Layout, *, partners: tuple[Unit, ...] = ()) -> RemovalPlan:
    """The plan of a student that keeps what a layout says."""
    removed = removed_units(anatomy, layout)
    return RemovalPlan(
        name=_known_as(anatomy, layout) or ",".join(removed),
        removed=removed,
        partners=partners,
        removed_modules=tuple(module for unit in removed for module in modules_of(unit, anatomy)),
        overrides=config_overrides(anatomy, layout),
        renamed=renamed_modules(anatomy, layout),
        feature_pairs=feature_pairs(anatomy, layout),
    )


def _known_as(anatomy: Anatomy, layout: Layout) -> str | None:
    return next((name for name in PRESETS if fits(anatomy, name) and preset_layout(anatomy, name) == layout), None)


def fits(anatomy: Anatomy, preset: str) -> bool:
    """Whether a preset can be made of this teacher."""
    try:
        preset_layout(anatomy, preset)
    except SurgeryError:
        return False
    return True
