"""Calibration inputs: what a UNet meets when it draws the images of some shards, at timesteps spread evenly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bkd.data.captions import CaptionSource
from bkd.data.images import images_at_once, to_model_range
from bkd.data.reading import DecodedSample, decoded_samples
from bkd.data.sources import Source
from bkd.data.survey import DataWish
from bkd.diffusion.guidance import StudentKind
from bkd.errors import DataError, ModelError
from bkd.files import cache_folder
from bkd.models.folder import is_inpainting, is_sdxl, native_resolution, unet_config
from bkd.models.load import load_noise_schedule
from bkd.rng import StepRng

MAX_BATCH = 32


def check_calibratable(folder: Path) -> None:
    """Refuse models that cannot be measured on shards.

    Raises:
        ModelError: For inpainting UNets, whose masks no shard has, and for students that nothing could train after
            blocks were removed.
    """
    kind = StudentKind.of(folder)
    if kind.few_steps is not None or (kind.guidance is not None and kind.guidance.takes_scale):
        raise ModelError(
            "--keep prunes before guidance is distilled and steps are halved",
            where=folder,
            got=kind,
            remedy="prune and distil the model that this one was made of, then method.name=guided and halving",
        )
    if is_inpainting(unet_config(folder)):
        raise ModelError(
            "--keep cannot measure inpainting UNets: shards hold no masks",
            where=folder,
            remedy="choose units or a preset with --blocks",
        )


@torch.no_grad()
def calibration_batches(folder: Path, pipe: Any, shards: list[Source], num_samples: int) -> list[dict[str, Tensor]]:
    """UNet inputs for the first usable samples of the shards.

    Args:
        folder: The pipeline's folder.
        pipe: Loaded, frozen; Stable Diffusion or SDXL.
        shards: Of images with captions.
        num_samples: How many samples to take; fewer where there are fewer.

    Returns:
        Batches as `bkd.surgery.score.Inputs`, on the pipeline's device.

    Raises:
        DataError: If no sample can be used.
    """
    resolution = native_resolution(folder)
    usable = list(islice(_usable_samples(shards, resolution), num_samples))
    if not usable:
        raise DataError(
            "no sample of the calibration shards can be used",
            where=shards[0].name,
            allowed="images (jpg, png, webp) with captions (txt)",
            remedy="give other shards: --calibration SHARDS",
        )
    size = images_at_once(resolution, MAX_BATCH)
    # Evenly spread over the schedule: a few samples then see it all.
    schedule = load_noise_schedule(folder)
    steps = schedule.num_train_timesteps
    timesteps = (torch.arange(len(usable)) * 2 + 1) * steps // (2 * len(usable))
    batches = []
    for start in range(0, len(usable), size):
        chunk, positions = usable[start : start + size], range(start, min(start + size, len(usable)))
        images = to_model_range(torch.stack([item.image.pixels for item in chunk])).to(pipe.device, pipe.vae.dtype)
        latents = pipe.vae.encode(images).latent_dist.mean.float().cpu() * pipe.vae.config.scaling_factor
        noise = StepRng(0, 0, positions).normal("noise", latents.shape[1:])
        noisy = schedule.add_noise(latents, noise, timesteps[start : start + size])
        inputs = {"sample": noisy, **_conditions(pipe, [item.caption for item in chunk], resolution)}
        floats = {name: tensor.to(pipe.device, pipe.unet.dtype) for name, tensor in inputs.items()}
        batches.append({**floats, "timestep": timesteps[start : start + size].to(pipe.device)})
    return batches


def _usable_samples(shards: list[Source], resolution: int) -> Iterator[DecodedSample]:
    wish = DataWish(CaptionSource(), (), cache_folder())
    for shard in shards:
        with shard.hold() as path:
            selection = wish.select(path)
            samples = selection.index.samples(selection.rows.tolist())
            yield from decoded_samples(samples, resolution, wish.caption, bad=Counter())


def _conditions(pipe: Any, captions: list[str], resolution: int) -> dict[str, Tensor]:
    encoded = pipe.encode_prompt(
        captions, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if not is_sdxl(pipe.unet.config):
        return {"encoder_hidden_states": encoded[0]}
    sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution])
    time_ids = sizes.float().repeat(len(captions), 1)
    return {"encoder_hidden_states": encoded[0], "text_embeds": encoded[2], "time_ids": time_ids}
