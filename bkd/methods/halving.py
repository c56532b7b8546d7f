"""Progressive halving: one step of the student for two of the teacher.

Salimans & Ho 2022, arXiv:2202.00512, algorithm 2; Meng et al. 2022, arXiv:2210.03142, section 3.2, for latent models
and students that are told the guidance scale, and section 3.3 for the direction from images to noise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bkd.data.latent_set import CachedBatch, Captions
from bkd.diffusion.guidance import OnePassGuidance
from bkd.diffusion.halving import Crossing, DoubleSteps, crossing
from bkd.losses import LossTerms, output_kd_loss
from bkd.methods.base import Diffusion, dtype_of, map_tensors, predict, teaching
from bkd.methods.guided import embed_guidance_scale
from bkd.recipe.stages import Halving
from bkd.rng import StepRng


@dataclass(frozen=True)
class HalvingBatch:
    """A double step for each sample.

    Attributes:
        noisy_latents: (B, C, h, w), float32: z, where it begins.
        timesteps: (B,), int64: what the student is told.
        first_timesteps: (B,), int64: what the teacher is told at z.
        second_timesteps: (B,), int64: what it is told at z'.
        crossing: Factors, (B, 1, 1, 1), float32.
        captions: Those that both networks are told.
        dropped: (B,), bool: captions to be replaced by the empty prompt.
        sizes: (B, 6), float32, SDXL's size conditioning.
        scale_embeds: (B, E), float32: the guidance scale, where the networks are told one.
    """

    noisy_latents: Tensor
    timesteps: Tensor
    first_timesteps: Tensor
    second_timesteps: Tensor
    crossing: Crossing
    captions: Captions
    dropped: Tensor
    sizes: Tensor | None
    scale_embeds: Tensor | None


class HalvingDistillation:
    """Teach a student UNet to cross in one step what takes its teacher two.

    Args:
        teacher: Frozen, in eval mode; run without gradients, in its own dtype.
        student: The UNet to train.
        diffusion: Schedule, text encoder and the draw of noise and captions.
        settings: Steps, sampler and direction.
        guidance: What the teacher has learnt of guidance; the scales it takes are drawn and told to both.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module,
        student: UNet2DConditionModel,
        diffusion: Diffusion,
        settings: Halving,
        guidance: OnePassGuidance | None,
    ) -> None:
        self.trainable: nn.Module = student
        self.teacher = teacher
        self.forward: Callable[..., Any] = student
        self.forward_teacher: Callable[..., Any] = teacher
        self.needs_others, self.reaches_all = False, True
        self._diffusion = diffusion
        self._guidance = guidance if guidance is not None and guidance.takes_scale else None
        self._embedding_dim: int | None = student.config.time_cond_proj_dim
        schedule = diffusion.schedule
        self._steps = DoubleSteps.of(
            schedule, settings.num_inference_steps[0], sampler=settings.sampler, direction=settings.direction
        )
        self._learnt = settings.prediction_type or schedule.prediction_type

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def draw(self, batch: CachedBatch, rng: StepRng) -> HalvingBatch:
        latents, noise = self._diffusion.draw_latents(batch, rng)
        steps = self._steps.take(rng.integers("double_step", len(self._steps)))
        alpha, sigma = steps.alphas[:, 0], steps.sigmas[:, 0]
        factors = crossing(steps, self._diffusion.schedule.prediction_type, self._learnt)
        return HalvingBatch(
            noisy_latents=_wide(alpha) * latents + _wide(sigma) * noise,
            timesteps=steps.timesteps,
            first_timesteps=steps.first_timesteps,
            second_timesteps=steps.second_timesteps,
            crossing=map_tensors(factors, _wide),
            captions=batch.captions,
            dropped=self._diffusion.draw_dropped(rng),
            sizes=batch.sizes,
            scale_embeds=self._draw_scales(rng),
        )

    def loss(self, drawn: HalvingBatch) -> LossTerms:
        z, factors = drawn.noisy_latents, drawn.crossing
        with teaching(z.device):
            conditioning = self._diffusion.captions(drawn.captions, drawn.dropped, drawn.sizes)

            def teacher(latents: Tensor, timesteps: Tensor) -> Tensor:
                dtype = dtype_of(self.teacher)
                return predict(
                    self.forward_teacher, latents, timesteps, conditioning, dtype, drawn.scale_embeds
                ).float()

            first = teacher(z, drawn.first_timesteps)
            halfway = _sum(factors.halfway, (z, first))
            second = teacher(halfway, drawn.second_timesteps)
            target = _sum(factors.target, (z, first, halfway, second))
            single = _sum(factors.single, (z, first))
        model_pred = predict(self.forward, z, drawn.timesteps, conditioning, torch.float32, drawn.scale_embeds)
        weights = factors.weight.flatten()
        terms = {
            "halving_loss": output_kd_loss(model_pred, target, weights),
            "single_step_loss": output_kd_loss(single, target, weights),  # what there is to learn
        }
        return LossTerms.weighted(terms, {"halving_loss": 1.0, "single_step_loss": 0.0})

    def _draw_scales(self, rng: StepRng) -> Tensor | None:
        if self._guidance is None or self._embedding_dim is None:
            return None
        low, high = self._guidance.low, self._guidance.high
        return embed_guidance_scale(low + (high - low) * rng.uniform("guidance_scale"), self._embedding_dim)


def _wide(factor: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1), float32."""
    return factor.float().reshape(-1, 1, 1, 1)


def _sum(factors: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    terms = [factor * tensor for factor, tensor in zip(factors, tensors, strict=True)]
    return torch.stack(terms).sum(0)
