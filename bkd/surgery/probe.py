"""Inputs of the right shapes for a UNet: to count its work, and to prove that two of them compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TIME_IDS = 6
"""SDXL's size conditioning: original height and width, crop top and left, target height and width."""


def unet_inputs(config: Mapping[str, Any], *, side: int, num_tokens: int, seed: int | None = 0) -> dict[str, Tensor]:
    """One sample for every input that a UNet of this configuration takes.

    Args:
        config: A UNet2DConditionModel's configuration.
        side: Height and width of the latents.
        num_tokens: Length of the prompt embedding.
        seed: Of the normal values; None for tensors without memory, on the meta device.

    Returns:
        `sample` (1, C, side, side), `timestep` (1,), `encoder_hidden_states` (1, L, D), for SDXL `text_embeds`
        (1, P) and `time_ids` (1, 6), for students with an input for the guidance scale `timestep_cond`; float32.
    """
    shapes = {
        "sample": (1, config.get("in_channels", 4), side, side),
        "encoder_hidden_states": (1, num_tokens, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        shapes |= {"text_embeds": (1, pooled), "time_ids": (1, TIME_IDS)}
    if dim := config.get("time_cond_proj_dim"):
        shapes["timestep_cond"] = (1, dim)
    if seed is None:
        meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {**meta, "timestep": torch.empty(1, dtype=torch.int64, device="meta")}
    rng = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return {**drawn, "timestep": torch.tensor([500])}


def as_arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of `UNet2DConditionModel.forward`."""
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    plain = {name: tensor for name, tensor in inputs.items() if name not in added}
    return {**plain, "added_cond_kwargs": added} if added else plain
