"""Editing by encoding and decoding: an image back to its noise with one prompt, and to another image with another.

Su et al. 2022, arXiv:2203.08382 (two models, one latent noise); Meng et al. 2022, arXiv:2210.03142, section 5, for
encoders and decoders of few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from bkd.data.images import images_at_once, open_image, to_model_range, to_pixels
from bkd.diffusion.grid import require_grid
from bkd.diffusion.sampling import InversionScheduler
from bkd.diffusion.schedulers import stock_scheduler
from bkd.edit_plan import Edit, Half
from bkd.errors import DataError, ModelError
from bkd.eval.generate import image_generator
from bkd.eval.pictures import with_unet
from bkd.files import replace_file
from bkd.models.folder import native_resolution
from bkd.models.load import best_device, load_noise_schedule, load_pipeline
from bkd.models.locate import locate
from bkd.progress import Phase

MAX_BATCH = 50
SAME_LATENTS = 0.02
"""Relative distance of two autoencoders' latents up to which they are one: rounding to float16 stays far below."""


def edit_image(edit: Edit, *, overwrite: bool = False, phase: Phase) -> None:
    """Edit one image.

    Args:
        edit: What is wished for.
        overwrite: Replace an earlier output.
        phase: Told what begins.

    Raises:
        BkdError: If the image, the models or the output do not fit; nothing is written then.
    """
    edit.require_possible(overwrite=overwrite)
    pixels = _read(edit.image, edit.side)
    for half in (edit.encoder, edit.decoder):
        locate(half.model)  # with its weights: so far only configurations were looked at
    editor = Editor(edit.encoder, edit.decoder, edit.seed)
    phase(f"encoding with {edit.encoder}")
    noise = editor.encode(pixels, edit.prompts[:1])
    phase(f"decoding with {edit.decoder}")
    edited = editor.decode(noise, edit.prompts[1:])[0]
    with replace_file(edit.output) as stream:
        Image.fromarray(edited.permute(1, 2, 0).numpy()).save(stream, format="PNG")


def _read(image: Path, side: int) -> Tensor:
    """(1, 3, side, side), uint8."""
    try:
        opened = open_image(image.read_bytes())
    except DataError as error:
        raise DataError(error.what, where=image, got=error.got, allowed="a whole JPEG, PNG or WebP file") from error
    _require_size(opened.size, side, image)
    return torch.from_numpy(np.array(opened)).permute(2, 0, 1)[None]


def _require_size(size: tuple[int, int], side: int, image: Path | None = None) -> None:
    if size != (side, side):
        raise DataError(
            "the image is of another size than the models draw",
            where=image,
            got=f"{size[0]} x {size[1]} px",
            allowed=f"{side} x {side} px",
            remedy="resize or crop it",
        )


class Editor:
    """Encodes with one model and decodes with another, or with the same.

    Args:
        encoder: A distilled encoder, or any model that draws: its differential equation is then solved backwards.
        decoder: Any model that draws, of the same latent space and noise levels.
        seed: Of the noise that a stochastic decoder adds; each image has its own.

    Raises:
        ModelError: If the two do not fit together, or cannot do what is asked of them.
    """

    def __init__(self, encoder: Half, decoder: Half, seed: int = 0) -> None:
        encoder.require_encodes()
        decoder.require_draws()
        _require_same_levels(encoder, decoder)
        _require_signal(decoder)
        for half in (encoder, decoder):
            timesteps = load_noise_schedule(half.folder).num_train_timesteps
            require_grid(timesteps, half.steps.num_inference_steps, half.model)
        self._scales = encoder.pipeline_scale, decoder.pipeline_scale
        self._steps = encoder.steps.num_inference_steps, decoder.steps.num_inference_steps
        self._encoder, self._decoder = _loaded(encoder, decoder)
        self._encoder.scheduler = InversionScheduler.from_config(self._encoder.scheduler.config)
        if decoder.halved is None:  # DDIM on the grid of so many steps: what the encoder's are the reverse of
            self._decoder.scheduler = stock_scheduler(self._decoder.scheduler.config, decoder.steps)
        self._names, self._side, self._seed = (encoder.model, decoder.model), native_resolution(encoder.folder), seed

    @torch.no_grad()
    def encode(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images to the noise that they would be drawn from.

        Args:
            pixels: (N, 3, H, W), uint8, of the models' own size.
            prompts: What they show.

        Returns:
            (N, C, h, w), float32, on the CPU.

        Raises:
            DataError: If the images are of another size.
            ModelError: If the decoder's latents are others.
        """
        _require_size((pixels.shape[-1], pixels.shape[-2]), self._side)
        found = [self._latents(self._encoder, chunk) for chunk in torch.split(pixels, self._batch)]
        self._require_same_space(pixels[:1], found[0][:1])
        return self._walk(self._encoder, torch.cat(found), prompts, 0)

    @torch.no_grad()
    def decode(self, noise: Tensor, prompts: Sequence[str]) -> Tensor:
        """Noise to images.

        Args:
            noise: As `encode` returned it.
            prompts: What they are to show.

        Returns:
            (N, 3, H, W), uint8, on the CPU.
        """
        latents, vae = self._walk(self._decoder, noise, prompts, 1), self._decoder.vae
        images = [
            vae.decode(chunk.to(vae.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].cpu()
            for chunk in torch.split(latents, self._batch)
        ]
        return to_pixels(torch.cat(images))

    @property
    def _batch(self) -> int:
        return images_at_once(self._side, MAX_BATCH)

    def _walk(self, pipe: Any, latents: Tensor, prompts: Sequence[str], half: int) -> Tensor:
        """From one end of the grid to the other."""
        walked = []
        for start in range(0, len(prompts), self._batch):
            texts = list(prompts[start : start + self._batch])
            walked.append(
                pipe(
                    texts,
                    latents=latents[start : start + len(texts)].to(pipe.device, pipe.unet.dtype),
                    generator=[image_generator(self._seed, start + number) for number in range(len(texts))],
                    num_inference_steps=self._steps[half],
                    guidance_scale=self._scales[half],
                    output_type="latent",
                ).images.cpu()
            )
        ended = torch.cat(walked).float()
        if not ended.isfinite().all():
            raise ModelError(
                "the latents are not finite numbers any more",
                where=self._names[half],
                remedy="a smaller guidance scale, more steps, or a sounder model",
            )
        return ended

    @staticmethod
    def _latents(pipe: Any, pixels: Tensor) -> Tensor:
        images = to_model_range(pixels).to(pipe.vae.device, pipe.vae.dtype)
        latents: Tensor = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
        return latents.float().cpu()

    def _require_same_space(self, pixels: Tensor, latents: Tensor) -> None:
        theirs = self._latents(self._decoder, pixels)
        if theirs.shape == latents.shape and (theirs - latents).norm() <= SAME_LATENTS * latents.norm():
            return
        raise ModelError(
            "the decoder has another latent space than the encoder",
            where=self._names[1],
            got="another autoencoder",
            allowed=f"that of {self._names[0]}",
            remedy="models of one family, such as a teacher and its students",
        )


def _loaded(encoder: Half, decoder: Half) -> tuple[StableDiffusionPipeline, StableDiffusionPipeline]:
    """Two pipelines; of one model where both are the same."""
    first = load_pipeline(encoder.folder, device=best_device())
    same = encoder.folder == decoder.folder
    return first, with_unet(first, first.unet) if same else load_pipeline(decoder.folder, device=best_device())


def _require_same_levels(encoder: Half, decoder: Half) -> None:
    ours, theirs = (load_noise_schedule(half.folder).alphas for half in (encoder, decoder))
    sides = [native_resolution(half.folder) for half in (encoder, decoder)]
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-6) or sides[0] != sides[1]:
        raise ModelError(
            "the decoder has other noise levels, or images of another size, than the encoder",
            where=decoder.model,
            got=f"{len(theirs)} timesteps to alpha {theirs[-1]:.3g}, {sides[1]} px",
            allowed=f"{len(ours)} timesteps to alpha {ours[-1]:.3g}, {sides[0]} px",
            remedy="models of one family, such as a teacher and its students",
        )


def _require_signal(decoder: Half) -> None:
    """A grid begins at the noisiest timestep, where pure noise says nothing of the image."""
    schedule = load_noise_schedule(decoder.folder)
    if schedule.prediction_type == "epsilon" and schedule.alphas[-1] == 0:
        raise ModelError(
            "at this model's noisiest timestep epsilon does not say what the clean latents are",
            where=decoder.model,
            got="epsilon, of a schedule without signal at its end",
            allowed="v_prediction or sample with zero terminal SNR",
        )
