"""What the training loop knows of a method, and the draw that every diffusion method starts with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from bkd.data.latent_set import CachedBatch
from bkd.diffusion import NoiseSchedule
from bkd.losses import LossTerms
from bkd.methods.captions import CaptionEncoder, Conditioning
from bkd.rng import StepRng


class Method(Protocol):
    """What a student learns, as one object; the loop never asks which it is.

    Attributes:
        trainable: The module whose parameters with `requires_grad` are optimised.
        forward: Called in place of `trainable` in forward passes; the loop puts its DDP or FSDP wrapper here.
    """

    trainable: nn.Module
    forward: Callable[..., object]

    def loss(self, batch: CachedBatch, rng: StepRng) -> LossTerms:
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
        conditioning: What the UNet is told besides.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    noisy_latents: Tensor
    conditioning: Conditioning

    def predict(self, unet: Callable[..., object]) -> Tensor:
        """A UNet's output for this batch, of the shape of the latents."""
        output: Tensor = unet(  # type: ignore[index]
            self.noisy_latents,
            self.timesteps,
            self.conditioning.prompt_embeds,
            added_cond_kwargs=dict(self.conditioning.added) or None,
            return_dict=False,
        )[0]
        return output


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The frozen surroundings of a UNet in training: schedule, latent scale and text encoders.

    Attributes:
        schedule: Noise schedule and prediction type.
        scaling_factor: Of the autoencoder.
        captions: From token ids to conditioning.
        prompt_dropout: Share of captions replaced by the empty prompt.
    """

    schedule: NoiseSchedule
    scaling_factor: float
    captions: CaptionEncoder
    prompt_dropout: float

    def draw(self, batch: CachedBatch, rng: StepRng) -> NoisyBatch:
        """Sample latents, captions, timesteps and noise for a batch."""
        device = batch.moments.device
        mean, std = batch.moments.chunk(2, dim=1)
        shape = mean.shape[1:]
        latents = (mean + std * rng.normal("posterior", shape).to(device)) * self.scaling_factor
        noise = rng.normal("noise", shape).to(device)
        timesteps = rng.integers("timestep", self.schedule.num_train_timesteps).to(device)
        dropped = (rng.uniform("prompt_dropout") < self.prompt_dropout).to(device)
        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        return NoisyBatch(latents, noise, timesteps, noisy_latents, self.captions(batch, dropped))
