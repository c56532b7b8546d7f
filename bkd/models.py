"""Load models. Here, and only here, dtype and device are decided."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch import nn

from bkd.diffusion import NoiseSchedule, PredictionType
from bkd.errors import ModelError
from bkd.model_folder import is_inpainting, is_sdxl, unet_config, weight_files
from bkd.surgery.build import build_empty

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes in which models are stored."""


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet alone, on the CPU.

    Raises:
        ModelError: If the file lacks tensors that the configuration names.
    """
    check_unet_weights(folder)
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True)


def check_unet_weights(folder: Path) -> None:
    """Compare the UNet's stored tensors, by name and shape, with what its configuration describes.

    diffusers fills what is missing with random numbers, or fails far from the cause.

    Raises:
        ModelError: If a tensor is missing or has another shape.
    """
    stored: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder / "unet"):
        with safe_open(path, framework="pt") as file:
            stored |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    described = {key: tuple(tensor.shape) for key, tensor in build_empty(unet_config(folder)).state_dict().items()}
    wrong = [key for key, shape in described.items() if stored.get(key) != shape]
    if wrong:
        raise ModelError(
            "the UNet's weights are not those of its configuration",
            where=folder / "unet",
            got=f"{len(wrong)} tensors missing or of another shape, the first: {wrong[0]}",
            remedy="get the model again; one whose blocks were deleted in place has lost its configuration",
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which the UNet lies on disk, so that a pruned copy can keep it; float32 where it has several."""
    found = set()
    for path in weight_files(folder / "unet"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a dict
    return DTYPES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def load_pipeline(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> StableDiffusionPipeline:
    """The whole stock text-to-image pipeline, frozen, without a safety checker (it would blacken measured images).

    Raises:
        ModelError: If tensors of the UNet are missing; for an inpainting model, which draws from no text alone.
    """
    check_unet_weights(folder)
    config = unet_config(folder)
    if is_inpainting(config):
        raise ModelError("inpainting models can be inspected and pruned, but not drawn with", where=folder)
    kind, no_checker = StableDiffusionPipeline, {"safety_checker": None, "requires_safety_checker": False}
    if is_sdxl(config):
        kind, no_checker = StableDiffusionXLPipeline, {}
    pipe = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, **no_checker).to(device)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_noise_schedule(folder: Path) -> NoiseSchedule:
    """The training schedule that the folder's scheduler configuration describes."""
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    return NoiseSchedule.from_alphas_cumprod(
        scheduler.alphas_cumprod, cast(PredictionType, scheduler.config.prediction_type)
    )


def best_device() -> torch.device:
    """A CUDA device where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
