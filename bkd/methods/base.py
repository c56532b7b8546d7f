"""What the training loop knows of a method, and the draw that every diffusion method starts with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bkd.data.latent_set import CachedBatch
from bkd.diffusion import NoiseSchedule
from bkd.losses import LossTerms
from bkd.rng import StepRng


@dataclass(frozen=True)
class Batch:
    """One forward pass's worth of cached samples, on the training device.

    Attributes:
        moments: (B, 2C, h, w), float32: posterior mean and deviation, before the scaling factor.
        token_ids: (B, L), int64.
    """

    moments: Tensor
    token_ids: Tensor

    @classmethod
    def of(cls, cached: CachedBatch, device: torch.device) -> Batch:
        """Cached samples, moved to a device."""
        return cls(cached.moments.to(device), cached.token_ids.to(device))


class Method(Protocol):
    """What a student learns, as one object; the loop never asks which it is.

    Attributes:
        trainable: The module whose parameters with `requires_grad` are optimised.
        forward: Called in place of `trainable` in forward passes; the loop puts its DDP or FSDP wrapper here.
    """

    trainable: nn.Module
    forward: Callable[..., object]

    def loss(self, batch: Batch, rng: StepRng) -> LossTerms:
        """The loss of one forward pass; all randomness comes from `rng`."""
        ...


@dataclass(frozen=True)
class NoisyBatch:
    """A point of the forward process for each sample, and the captions that go with it.

    Attributes:
        latents: (B, C, h, w), scaled.
        noise: Same shape.
        timesteps: (B,), int64.
        noisy_latents: Same shape as `latents`.
        prompt_embeds: (B, L, D).
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    noisy_latents: Tensor
    prompt_embeds: Tensor


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The frozen surroundings of a UNet in training: schedule, latent scale and text encoder.

    Attributes:
        schedule: Noise schedule and prediction type.
        scaling_factor: Of the autoencoder.
        text_encoder: Frozen, in eval mode.
        empty_ids: (1, L), token ids of the empty prompt.
        prompt_dropout: Share of captions replaced by the empty prompt.
    """

    schedule: NoiseSchedule
    scaling_factor: float
    text_encoder: nn.Module
    empty_ids: Tensor
    prompt_dropout: float

    def draw(self, batch: Batch, rng: StepRng) -> NoisyBatch:
        """Sample latents, captions, timesteps and noise for a batch."""
        device = batch.moments.device
        mean, std = batch.moments.chunk(2, dim=1)
        shape = mean.shape[1:]
        latents = (mean + std * rng.normal("posterior", shape).to(device)) * self.scaling_factor
        noise = rng.normal("noise", shape).to(device)
        timesteps = rng.integers("timestep", self.schedule.num_train_timesteps).to(device)
        dropped = (rng.uniform("prompt_dropout") < self.prompt_dropout).to(device)
        token_ids = torch.where(dropped[:, None], self.empty_ids.to(device), batch.token_ids)
        with torch.no_grad():
            prompt_embeds = self.text_encoder(token_ids)[0]
        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        return NoisyBatch(latents, noise, timesteps, noisy_latents, prompt_embeds)
