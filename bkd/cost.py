"""What a UNet costs: parameters and multiply-accumulates, counted exactly on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from bkd.surgery.build import build_empty
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.probe import as_arguments, unet_inputs

ATTENTION_MATMULS = ("bmm", "baddbmm", "scaled_dot_product")
"""Operators that only attention uses in a UNet; published BK-SDM figures leave them out."""


@dataclass(frozen=True)
class UNetCost:
    """Cost of one UNet evaluation at batch 1.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates of one forward pass, attention matmuls included.
        macs_without_attention: The same as published for BK-SDM: convolutions and linear layers only.
    """

    parameters: int
    macs: int
    macs_without_attention: int


def unet_cost(config: Mapping[str, Any], plan: RemovalPlan | None = None, *, num_tokens: int = 77) -> UNetCost:
    """Count a UNet, or what a plan makes of it, from its configuration alone.

    Args:
        config: A UNet2DConditionModel's configuration; evaluated at its own `sample_size`.
        plan: Changes to count with.
        num_tokens: Length of the prompt embedding.
    """
    unet = build_empty(dict(config), plan)
    return summed_cost(unet, count_flops(unet, num_tokens))


def summed_cost(unet: UNet2DConditionModel, counts: Mapping[str, Mapping[Any, int]]) -> UNetCost:
    """The cost of a UNet whose operations `count_flops` has counted."""
    flops = counts["Global"]
    attention = sum(n for operator, n in flops.items() if any(name in str(operator) for name in ATTENTION_MATMULS))
    total = sum(flops.values())
    return UNetCost(sum(p.numel() for p in unet.parameters()), total // 2, (total - attention) // 2)


def count_flops(unet: UNet2DConditionModel, num_tokens: int) -> dict[str, dict[Any, int]]:
    """Floating-point operations (two for each multiply-accumulate) of one forward pass at batch 1.

    Args:
        unet: On the meta device; evaluated at its own `sample_size`.
        num_tokens: Length of the prompt embedding.

    Returns:
        Module path (`Global` for all) -> operator -> operations.
    """
    inputs = unet_inputs(unet.config, side=unet.config.sample_size, num_tokens=num_tokens, seed=None)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet(**as_arguments(inputs))
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    return counts


def macs_by_module(counts: Mapping[str, Mapping[Any, int]]) -> dict[str, int]:
    """Module path -> its own multiply-accumulates, without those of the modules inside it.

    Args:
        counts: From `count_flops`.
    """
    flops = {name.partition(".")[2]: sum(found.values()) for name, found in counts.items() if name != "Global"}
    own = dict(flops)
    for name in flops:
        if name:
            own[_nearest_outside(name, flops)] -= flops[name]
    return {name: found // 2 for name, found in own.items()}


def _nearest_outside(name: str, flops: Mapping[str, int]) -> str:
    """The counter knows modules that are called; lists of modules are not."""
    outer = name.rpartition(".")[0]
    return outer if outer in flops else _nearest_outside(outer, flops)
