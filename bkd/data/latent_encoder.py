"""From decoded images and captions to the arrays of cached samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bkd.data.images import DecodedImage, to_model_range
from bkd.data.latent_shards import Arrays, LatentSettings, may_be_mirrored
from bkd.models.folder import is_sdxl, model_digest, unet_config


@dataclass(frozen=True, kw_only=True)
class LatentEncoder:
    """A teacher's autoencoder and tokenizers.

    Attributes:
        vae: Frozen, in eval mode; runs on its own device in its own dtype.
        tokenizers: One, or SDXL's two; each pads to its `model_max_length`.
        settings: What the arrays depend on.
    """

    vae: AutoencoderKL
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    settings: LatentSettings

    def encode(self, images: Sequence[DecodedImage], captions: Sequence[str]) -> list[Arrays | None]:
        """Arrays of each sample, as `bkd.data.latent_shards` describes them; None where a latent is not finite."""
        pixels = torch.stack([image.pixels for image in images])
        moments = self._moments(pixels)
        mirrored = self._moments(pixels.flip(-1)) if self.settings.mirrored else None
        ids = [self._ids(tokenizer, captions) for tokenizer in self.tokenizers]
        found: list[Arrays | None] = []
        for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
            arrays: dict[str, NDArray[Any]] = {"moments": moments[row], "ids": ids[0][row]}
            if mirrored is not None and may_be_mirrored(caption):
                arrays["mirrored"] = mirrored[row]
            if len(ids) > 1:
                arrays |= {"ids_2": ids[1][row], "sizes": self._sizes(image)}
            finite = all(np.isfinite(arrays[name]).all() for name in ("moments", "mirrored") if name in arrays)
            found.append(arrays if finite else None)
        return found

    @torch.no_grad()
    def _moments(self, pixels: Tensor) -> NDArray[np.float16]:
        posterior = self.vae.encode(to_model_range(pixels).to(self.vae.device, self.vae.dtype)).latent_dist
        # float16 ends at 65504: what lies beyond becomes infinite, and is noticed
        return torch.cat([posterior.mean, posterior.std], dim=1).to("cpu", torch.float16).numpy()

    @staticmethod
    def _ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> NDArray[np.int32]:
        found = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="np").input_ids
        return np.asarray(found, np.int32)

    def _sizes(self, image: DecodedImage) -> NDArray[np.int32]:
        side = self.settings.resolution
        return np.array([*image.original_size, *image.crop_top_left, side, side], np.int32)


def latent_settings(
    teacher: Path, *, resolution: int, mirrored: bool, caption: str, filters: Sequence[str]
) -> LatentSettings:
    """What a teacher's cached latents depend on; reads its weight files, but loads nothing."""
    tokenizers = ("tokenizer", "tokenizer_2") if is_sdxl(unet_config(teacher)) else ("tokenizer",)
    return LatentSettings(
        vae=model_digest(teacher, ["vae"]),
        tokenizers=tuple(model_digest(teacher, [part]) for part in tokenizers),
        resolution=resolution,
        mirrored=mirrored,
        caption=caption,
        filters=tuple(filters),
    )


def encoder_of(pipe: Any, settings: LatentSettings) -> LatentEncoder:
    """The encoder of a loaded pipeline."""
    names = ("tokenizer", "tokenizer_2")[: len(settings.tokenizers)]
    return LatentEncoder(vae=pipe.vae, tokenizers=tuple(getattr(pipe, name) for name in names), settings=settings)
