"""Load models. Here, and only here, dtype and device are decided."""

from __future__ import annotations

import gc
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from bkd.diffusion.few_steps import few_steps
from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.diffusion.scheduler_kinds import require_ddpm_levels
from bkd.diffusion.schedulers import drawing_scheduler
from bkd.diffusion.terms import DTYPE_NAMES, PredictionType
from bkd.errors import ModelError, one_of
from bkd.models.folder import is_inpainting, is_sdxl, parts_of, scheduler_config, unet_config
from bkd.models.unet_weights import check_unet_weights

LONGEST_PROMPT = 100_000
"""More than any text encoder takes, and less than what transformers has for "not written"."""


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet alone, on the CPU.

    Raises:
        ModelError: If the file lacks tensors that the configuration names.
    """
    check_unet_weights(folder)
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True)


def load_pipeline(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    without: Collection[str] = (),
) -> StableDiffusionPipeline:
    """The stock text-to-image pipeline, frozen, without a safety checker (it would blacken measured images).

    Args:
        folder: Pipeline folder.
        dtype: Of all parts.
        device: For all parts.
        without: Parts that are not needed and not loaded.

    Raises:
        ModelError: If tensors of the UNet are missing, or a tokenizer knows no length; for an inpainting model, which
            draws from no text alone.
    """
    if "unet" not in without:
        check_unet_weights(folder)
    config = unet_config(folder)
    if is_inpainting(config):
        raise ModelError("inpainting models can be inspected and pruned, but not drawn with", where=folder)
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    kind = StableDiffusionPipeline
    if is_sdxl(config):
        kind, options = StableDiffusionXLPipeline, {"add_watermarker": False}
    options |= dict.fromkeys(set(without) & set(parts_of(folder)))
    pipe = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, **options).to(device)
    pipe.scheduler = drawing_scheduler(pipe.scheduler, few_steps(folder))
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    _require_prompt_length(pipe, folder)
    return pipe


def _require_prompt_length(pipe: Any, folder: Path) -> None:
    """Prompts are padded to the tokenizer's own length; to transformers it is endless where none is written."""
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = pipe.components.get(name)
        if tokenizer is not None and tokenizer.model_max_length > LONGEST_PROMPT:
            raise ModelError(
                "the tokenizer does not say how many tokens a prompt has",
                where=folder / name / "tokenizer_config.json",
                got="no model_max_length",
                remedy='add "model_max_length": 77, or what the text encoder has as max_position_embeddings',
            )


def describe_device(device: torch.device) -> str:
    """Its name, for records and tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"


def training_dtype(mixed_precision: str) -> torch.dtype:
    """What the forward passes compute in: `no`, `bf16` or `fp16`."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]


DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def dtype_named(name: str, device: torch.device | None = None) -> torch.dtype:
    """What a model computes in, by torch's name, on a device: this process's best one when not given.

    Raises:
        ModelError: If there is no such dtype here, or this device does not compute in it.
    """
    one_of(name, DTYPES, kind="dtype", error=ModelError)
    if name == "float16" and (device or best_device()).type == "cpu":
        raise ModelError("float16 needs a GPU", where="--dtype", allowed="float32, bfloat16 on a CPU")
    return DTYPES[name]


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Forward passes of float32 weights in another dtype; nothing where that is float32, too."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def place_encoders(pipe: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Put a pipeline's text encoders on the device."""
    for name in ("text_encoder", "text_encoder_2"):
        if (part := pipe.components.get(name)) is not None:
            part.to(device, dtype)


def use_channels_last(unet: nn.Module, wish: bool | None, dtype: torch.dtype, device: torch.device) -> None:
    """Lay convolution weights out as (N, H, W, C) where that is faster.

    Args:
        unet: Changed in place.
        wish: None for the rule: half precision on a GPU. On a CPU it made bf16 steps seven times slower.
        dtype: Of the forward passes.
        device: Of the network.
    """
    if wish if wish is not None else device.type == "cuda" and dtype != torch.float32:
        unet.to(memory_format=torch.channels_last)


def load_noise_schedule(folder: Path) -> NoiseSchedule:
    """The training schedule that the folder's scheduler configuration describes.

    Raises:
        ModelError: If it is of another kind than DDPM's, such as EDM's or flow matching.
    """
    require_ddpm_levels(scheduler_config(folder), folder / "scheduler" / "scheduler_config.json")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    prediction_type = scheduler.config.prediction_type
    one_of(prediction_type, get_args(PredictionType), kind="prediction_type", error=ModelError)
    return NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod, prediction_type)


def release_memory(device: torch.device) -> None:
    """Hand back what nothing refers to any more: Python finds cycles late, and CUDA's allocator keeps what it had."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def best_device() -> torch.device:
    """This process's CUDA device where there is one."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def device_named(name: str | None) -> torch.device:
    """A device by torch's name; the best one when not given.

    Raises:
        ModelError: If this machine has none of the kind.
    """
    if name is None:
        return best_device()
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = name.partition(":")[0]
    one_of(kind, there, kind="device", error=ModelError)
    if not there[kind]:
        raise ModelError(f"there is no {kind} device here", allowed=", ".join(k for k, found in there.items() if found))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device(kind, -1)
    if device.index is not None and not 0 <= device.index < (torch.cuda.device_count() if kind == "cuda" else 1):
        raise ModelError("there is no such device here", got=name, allowed=kind)
    return device
