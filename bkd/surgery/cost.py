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
FlopCounts = Mapping[str, Mapping[Any, int]]
"""Module path (after the class name; `Global` for all) -> operator -> floating-point operations."""


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
    flops = count_flops(unet, num_tokens)["Global"]
    attention = sum(n for operator, n in flops.items() if _is_attention(operator))
    total = sum(flops.values())
    return UNetCost(sum(p.numel() for p in unet.parameters()), total // 2, (total - attention) // 2)


def _is_attention(operator: object) -> bool:
    return any(name in str(operator) for name in ATTENTION_MATMULS)


def count_flops(unet: UNet2DConditionModel, num_tokens: int) -> FlopCounts:
    """Floating-point operations (two for each multiply-accumulate) of one forward pass at batch 1.

    Args:
        unet: On the meta device; evaluated at its own `sample_size`.
        num_tokens: Length of the prompt embedding.
    """
    inputs = unet_inputs(unet.config, side=unet.config.sample_size, num_tokens=num_tokens, seed=None)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet(**as_arguments(inputs))
    counts: FlopCounts = counter.get_flop_counts()
    return counts


def macs_by_module(counts: FlopCounts, *, attention: bool = True) -> dict[str, int]:
    """Module path -> its own multiply-accumulates, without those of the modules inside it.

    Args:
        counts: From `count_flops`, of a whole UNet or of some of its modules.
        attention: Whether to count attention matmuls.
    """
    flops = {
        name.partition(".")[2]: sum(n for operator, n in found.items() if attention or not _is_attention(operator))
        for name, found in counts.items()
        if name != "Global"
    }
    own = dict(flops)
    for name, inside in flops.items():
        outside = _nearest_outside(name, flops)
        if name and outside in own:
            own[outside] -= inside
    return {name: found // 2 for name, found in own.items()}


def _nearest_outside(name: str, flops: Mapping[str, int]) -> str:
    """The next module around one; the counter knows those that are called, which lists of modules are not."""
    outside = name.rpartition(".")[0]
    return outside if outside in flops or not outside else _nearest_outside(outside, flops)
