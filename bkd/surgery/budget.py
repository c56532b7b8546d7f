"""How much of a UNet may be left, in parameters or in MACs, and how much of that each removal saves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from bkd.errors import SurgeryError
from bkd.surgery.anatomy import Anatomy, read_anatomy
from bkd.surgery.build import build_empty
from bkd.surgery.cost import FlopCounts, UNetCost, count_flops, macs_by_module
from bkd.surgery.unet import plan_removal
from bkd.surgery.units import Unit, modules_of

MULTIPLES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Amounts:
    """Parameters or MACs by where a UNet has them. They add up, so what several removals save adds up as well.

    Attributes:
        name: What is counted.
        whole: Parameter name or module path -> amount, in the teacher.
        shallow: The same while the innermost level is gone, as if nothing else were: without the resampling above
            that level, the mid block works at a higher resolution.
    """

    name: str
    whole: Mapping[str, int]
    shallow: Mapping[str, int]

    @property
    def total(self) -> int:
        """All that the teacher has."""
        return sum(self.whole.values())

    def saved(self, anatomy: Anatomy, units: Sequence[Unit]) -> int:
        """How much less a student has that lacks just these; negative where what stays grows by more than what goes.

        Args:
            anatomy: The teacher's.
            units: May overlap; of the levels, the innermost at most.
        """
        is_shallow = f"level.{anatomy.num_levels - 1}" in units
        here = self.shallow if is_shallow else self.whole
        return self.total - sum(here.values()) + amount_within(anatomy, units, here)


def amount_within(anatomy: Anatomy, units: Sequence[Unit], amounts: Mapping[str, int]) -> int:
    """Sum of the amounts that lie in some units.

    Args:
        anatomy: The teacher's.
        units: May overlap.
        amounts: Parameter name or module path -> amount.
    """
    modules = tuple(f"{module}." for unit in units for module in modules_of(unit, anatomy))
    return sum(amount for name, amount in amounts.items() if f"{name}.".startswith(modules))


@dataclass(frozen=True)
class CostMap:
    """Where the cost of a UNet lies, in each measure of `UNetCost`."""

    parameters: Amounts
    macs: Amounts
    macs_without_attention: Amounts

    def total(self) -> UNetCost:
        """The teacher's."""
        return UNetCost(self.parameters.total, self.macs.total, self.macs_without_attention.total)

    def saved(self, anatomy: Anatomy, units: Sequence[Unit]) -> UNetCost:
        """How much less a student costs that lacks just these units; see `Amounts.saved`."""
        measures = (self.parameters, self.macs, self.macs_without_attention)
        return UNetCost(*(amounts.saved(anatomy, units) for amounts in measures))

    def without(self, anatomy: Anatomy, units: Sequence[Unit]) -> UNetCost:
        """What a student costs that lacks just these units."""
        total, saved = astuple(self.total()), astuple(self.saved(anatomy, units))
        return UNetCost(*(whole - gone for whole, gone in zip(total, saved, strict=True)))


def cost_map(config: dict[str, Any], *, num_tokens: int = 77) -> CostMap:
    """Count a UNet once, and with it all its students.

    Args:
        config: A UNet2DConditionModel's; evaluated at its own `sample_size`, at batch 1.
        num_tokens: Length of the prompt embedding.
    """
    unet = build_empty(config)
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    whole = count_flops(unet, num_tokens)
    mid = _mid_without_innermost(config, num_tokens)
    macs = [
        Amounts(name, own := macs_by_module(whole, attention=attention), own | macs_by_module(mid, attention=attention))
        for name, attention in (("MACs", True), ("MACs without attention matmuls", False))
    ]
    return CostMap(Amounts("parameters", sizes, sizes), *macs)


def _mid_without_innermost(config: dict[str, Any], num_tokens: int) -> FlopCounts:
    """What the modules of the mid block do while the innermost level is gone; nothing where it cannot stay then."""
    try:
        plan = plan_removal(config, f"level.{read_anatomy(config).num_levels - 1}")
    except SurgeryError:
        return {}
    unet = build_empty(config, plan)
    if unet.mid_block is None:
        return {}
    counts = count_flops(unet, num_tokens)
    return {name: found for name, found in counts.items() if "mid_block" in name.split(".")}


def parse_budget(keep: str, amounts: Amounts) -> int:
    """How much may be left.

    Args:
        keep: A share such as `0.65` or `65%`, or a number such as `480M`.
        amounts: The teacher's.

    Raises:
        SurgeryError: If it is neither, or would remove nothing or everything.
    """
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*([KMGBT%]?)\s*", keep, flags=re.IGNORECASE)
    if not found:
        allowed = "a share such as 0.65 or 65%, or a number such as 480M"
        raise SurgeryError("not a size", where="--keep", got=keep, allowed=allowed)
    number, unit, total = float(found[1]), found[2].upper(), amounts.total
    if unit == "" and 1 < number <= 100:
        raise SurgeryError("a size that can mean two things", where="--keep", got=keep, allowed=f"{keep}% or {keep}M")
    share = number / 100 if unit == "%" else number
    left = round(share * total) if unit == "%" or (unit == "" and share <= 1) else round(number * MULTIPLES[unit])
    if not 0 < left < total:
        raise SurgeryError(
            "nothing would be removed" if left else "everything would be removed",
            where="--keep",
            got=f"{keep}: {left:,} {amounts.name}",
            allowed=f"more than 0 and fewer than the teacher's {total:,}",
        )
    return left
