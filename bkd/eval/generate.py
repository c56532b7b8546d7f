"""Draw images with a stock pipeline so that the result depends on prompt and seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bkd.data.images import images_at_once, to_pixels
from bkd.progress import Progress, silent

MAX_BATCH = 50


@torch.no_grad()
def generate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int = 0,
    first: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """One image for each prompt.

    Image i starts from noise of a generator of its own, seeded by (seed, first + i): two models draw from the same
    noise, and the size of the batch changes nothing.

    Args:
        pipe: Any stock text-to-image pipeline of the Stable Diffusion family.
        prompts: N texts.
        num_inference_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; 1 for none.
        seed: 0 or more.
        first: Number of the first image.
        progress: Called with (done, N).

    Returns:
        (N, 3, H, W), uint8, on the CPU.
    """
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    batch = images_at_once(side, MAX_BATCH)
    images = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed((seed << 32) + first + start + i) for i in range(len(chunk))]
        decoded = pipe(
            chunk,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="pt",
        ).images
        images.append(to_pixels(decoded.cpu() * 2 - 1))
        progress(start + len(chunk), len(prompts))
    return torch.cat(images)
