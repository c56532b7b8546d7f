"""From token ids to what a UNet is told of a caption: prompt embeddings, and for SDXL pooled ones and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bkd.data.latent_set import Captions
from bkd.models.folder import is_sdxl
from bkd.surgery.probe import TIME_IDS


@dataclass(frozen=True)
class Conditioning:
    """What goes into a UNet beside noisy latents and timesteps.

    Attributes:
        prompt_embeds: (B, L, D).
        added: SDXL's `text_embeds`, (B, P), and `time_ids`, (B, 6); empty for Stable Diffusion.
    """

    prompt_embeds: Tensor
    added: Mapping[str, Tensor]


class CaptionEncoder(Protocol):
    """A teacher's frozen text encoders."""

    def __call__(self, captions: Captions, dropped: Tensor, sizes: Tensor | None) -> Conditioning:
        """Encode captions, on the device of the encoders and in their dtype.

        Args:
            captions: B of them.
            dropped: (B,), bool: captions to be replaced by the empty prompt.
            sizes: (B, 6), SDXL's size conditioning.
        """
        ...

    def unconditional(self, negative_prompt: str) -> Conditioning:
        """What a pipeline tells the pass that guidance leads away from, for a batch of one; without sizes.

        Args:
            negative_prompt: Often empty.
        """
        ...


def caption_encoder(pipe: Any) -> CaptionEncoder:
    """The encoder of a loaded pipeline, Stable Diffusion or SDXL."""
    return SdxlCaptions(pipe) if is_sdxl(pipe.unet.config) else StableDiffusionCaptions(pipe)


class StableDiffusionCaptions:
    """One encoder, whose last layer is used."""

    def __init__(self, pipe: Any) -> None:
        self._tokenizer, self._encoder = pipe.tokenizer, pipe.text_encoder
        self._empty = _token_ids(self._tokenizer, self._encoder, "")

    @torch.no_grad()
    def __call__(self, captions: Captions, dropped: Tensor, sizes: Tensor | None) -> Conditioning:
        token_ids = torch.where(dropped[:, None], self._empty, captions.token_ids)
        return Conditioning(self._encoder(token_ids)[0], {})

    def unconditional(self, negative_prompt: str) -> Conditioning:
        ids = _token_ids(self._tokenizer, self._encoder, negative_prompt)
        return self(Captions(ids), torch.zeros(1, dtype=torch.bool, device=ids.device), None)


class SdxlCaptions:
    """Two encoders, whose last layers but one are joined; the second also gives a pooled embedding.

    The empty prompt is a zero embedding where the pipeline says so (`force_zeros_for_empty_prompt`).
    """

    def __init__(self, pipe: Any) -> None:
        self._tokenizers = (pipe.tokenizer, pipe.tokenizer_2)
        self._encoders = (pipe.text_encoder, pipe.text_encoder_2)
        self._empty = self._ids("")
        self._zeros = bool(pipe.config.force_zeros_for_empty_prompt)

    @torch.no_grad()
    def __call__(self, captions: Captions, dropped: Tensor, sizes: Tensor | None) -> Conditioning:
        assert captions.token_ids_2 is not None and sizes is not None  # cached with two tokenizers
        ids = [captions.token_ids, captions.token_ids_2]
        if not self._zeros:
            pairs = zip(self._empty, ids, strict=True)
            ids = [torch.where(dropped[:, None], empty, each) for empty, each in pairs]
        outputs = [encoder(each, output_hidden_states=True) for encoder, each in zip(self._encoders, ids, strict=True)]
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[1][0]
        if self._zeros:
            prompt_embeds = prompt_embeds.masked_fill(dropped[:, None, None], 0)
            pooled = pooled.masked_fill(dropped[:, None], 0)
        return Conditioning(prompt_embeds, {"text_embeds": pooled, "time_ids": sizes})

    def unconditional(self, negative_prompt: str) -> Conditioning:
        first, second = self._ids(negative_prompt)
        nothing = torch.tensor([negative_prompt == ""], device=first.device)
        found = self(Captions(first, second), nothing, torch.zeros(1, TIME_IDS))
        return Conditioning(found.prompt_embeds, {"text_embeds": found.added["text_embeds"]})

    def _ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        first, second = (
            _token_ids(tokenizer, encoder, prompt)
            for tokenizer, encoder in zip(self._tokenizers, self._encoders, strict=True)
        )
        return first, second


def _token_ids(tokenizer: Any, encoder: Any, prompt: str) -> Tensor:
    """(1, L): a prompt, on its encoder's device."""
    ids: Tensor = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.to(encoder.device)
