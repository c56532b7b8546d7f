"""What a UNet is made of: its blocks, what each weighs, and what the presets would leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bkd.cost import count_flops, unet_cost
from bkd.errors import SurgeryError
from bkd.models import prompt_length, unet_config
from bkd.surgery.build import build_empty
from bkd.surgery.unet import ALIASES, PRESETS, plan_preset


def inspect_model(folder: Path) -> dict[str, Any]:
    """Blocks and presets of a pipeline folder's UNet, from its configuration alone."""
    config = unet_config(folder)
    tokens = prompt_length(folder)
    cost = unet_cost(config, num_tokens=tokens)
    return {
        "parameters": cost.parameters,
        "macs": cost.macs,
        "macs_without_attention": cost.macs_without_attention,
        "blocks": _blocks(config, tokens),
        "presets": [_preset(config, name, tokens) for name in PRESETS if name != "none" and _fits(config, name)],
    }


def _blocks(config: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    unet = build_empty(config)
    counted = {name: sum(flops.values()) for name, flops in count_flops(unet, tokens).items()}
    total = counted["Global"]
    return [
        {
            "id": name,
            "parameters": sum(p.numel() for p in module.parameters()),
            "share_of_macs": counted.get(f"{type(unet).__name__}.{name}", 0) / total,
        }
        for name, module in _named_blocks(unet)
    ]


def _named_blocks(unet: nn.Module) -> list[tuple[str, nn.Module]]:
    """Blocks in the order they run, with their layers beneath them."""
    found = []
    for name, module in unet.named_modules():
        parts = name.split(".")
        is_block = name == "mid_block" or (len(parts) == 2 and parts[0] in ("down_blocks", "up_blocks"))
        is_layer = len(parts) == 4 and parts[0] in ("down_blocks", "up_blocks")
        if is_block or is_layer:
            found.append((name, module))
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return sorted(found, key=lambda item: order[item[0].split(".")[0]])


def _fits(config: dict[str, Any], preset: str) -> bool:
    try:
        plan_removal(config, preset)
    except SurgeryError:
        return False
    return True


def _preset(config: dict[str, Any], name: str, tokens: int) -> dict[str, Any]:
    cost = unet_cost(config, plan_removal(config, name), num_tokens=tokens)
    aliases = [alias for alias, known in ALIASES.items() if known == name]
    return {"name": name, "aliases": aliases, "parameters": cost.parameters, "macs": cost.macs}
