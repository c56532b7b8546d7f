"""How much of a UNet may be left, in parameters or in MACs, and how much of that each removal saves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bkd.cost import count_flops, macs_by_module
from bkd.errors import SurgeryError
from bkd.surgery.anatomy import Anatomy, read_anatomy
from bkd.surgery.build import build_empty
from bkd.surgery.unet import plan_removal
from bkd.surgery.units import Unit, modules_of

Measure = Literal["parameters", "macs"]
NAMES: dict[Measure, str] = {"parameters": "parameters", "macs": "MACs"}
MULTIPLES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Amounts:
    """Parameters or MACs by where a UNet has them. They add up, so what several removals save adds up as well.

    Attributes:
        measure: What is counted.
        whole: Parameter name or module path -> amount, in the teacher.
        shallow: The same while the innermost level is gone, as if nothing else were: without the resampling above
            that level, the mid block works at a higher resolution.
    """

    measure: Measure
    whole: Mapping[str, int]
    shallow: Mapping[str, int]

    @property
    def name(self) -> str:
        """What is counted, in words."""
        return NAMES[self.measure]

    @property
    def total(self) -> int:
        """All that the teacher has."""
        return sum(self.whole.values())

    def saved(self, anatomy: Anatomy, units: Sequence[Unit]) -> int:
        """How much less a student has that lacks just these; negative where what stays grows by more than what goes."""
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


def parameter_amounts(config: dict[str, Any]) -> Amounts:
    """The parameters of a UNet, from its configuration."""
    sizes = {name: p.numel() for name, p in build_empty(config).named_parameters()}
    return Amounts("parameters", sizes, sizes)


def mac_amounts(config: dict[str, Any], num_tokens: int) -> Amounts:
    """The multiply-accumulates of a UNet at batch 1, attention matmuls included, from its configuration.

    Args:
        config: Evaluated at its own `sample_size`.
        num_tokens: Length of the prompt embedding.
    """
    whole = macs_by_module(count_flops(build_empty(config), num_tokens))
    try:
        without_level = plan_removal(config, f"level.{read_anatomy(config).num_levels - 1}")
    except SurgeryError:
        return Amounts("macs", whole, whole)
    inner = macs_by_module(count_flops(build_empty(config, without_level), num_tokens))
    mid = {name: macs for name, macs in inner.items() if f"{name}.".startswith("mid_block.")}
    return Amounts("macs", whole, {**whole, **mid})


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
