"""Guidance distillation: one pass of the student for the two that classifier-free guidance takes.

Meng et al. 2022, arXiv:2210.03142, section 3.1, for a student that is told the guidance scale; Golnari 2023,
arXiv:2312.06899, for one that always has the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from bkd.data.latent_set import CachedBatch
from bkd.losses import LossTerms, output_kd_loss
from bkd.methods.base import Diffusion, NoisyBatch, dtype_of, teaching
from bkd.methods.captions import Conditioning
from bkd.methods.features import ComparedFeatures, total
from bkd.recipe.stages import Guided
from bkd.rng import StepRng
from bkd.surgery.plan import FeaturePair


@dataclass(frozen=True)
class GuidedBatch:
    """A noisy batch, and the guidance that each of its samples is to have.

    Attributes:
        noisy: See `NoisyBatch`.
        guidance_scale: (B, 1, 1, 1), float32.
        scale_embeds: (B, E), float32, what the student is told of it; None for a student of one scale.
        factor: (B, 1, 1, 1), float32: the student is to predict `factor` times what the teacher predicts …
        offset: (B, 1, 1, 1), float32: … and `offset` times the noisy latents. 1 and 0 where their types agree.
        weights: (B,), float32, of each sample's error; None where all are 1.
    """

    noisy: NoisyBatch
    guidance_scale: Tensor
    scale_embeds: Tensor | None
    factor: Tensor
    offset: Tensor
    weights: Tensor | None

    def as_student(self, prediction: Tensor) -> Tensor:
        """What the teacher predicts, as the student is to say it: (B, C, H, W)."""
        return self.factor * prediction + self.offset * self.noisy.noisy_latents


class GuidedDistillation:
    """Teach a student UNet, in one pass, the guided output of its teacher.

    Args:
        teacher: Frozen, in eval mode; run without gradients, in its own dtype.
        student: The UNet to train; with an input for the guidance scale where a range of them is to be learnt.
        diffusion: Schedule, text encoder and the draw of noise and captions.
        pairs: Which activations of the teacher's conditional pass the student's should agree with.
        settings: Scales, terms and what the teacher's other pass is told.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module,
        student: UNet2DConditionModel,
        diffusion: Diffusion,
        pairs: Sequence[FeaturePair],
        settings: Guided,
    ) -> None:
        self.trainable: nn.Module = student
        self.teacher = teacher
        self.forward: Callable[..., Any] = student
        self.forward_teacher: Callable[..., Any] = teacher
        self.needs_others, self.reaches_all = False, settings.reaches_all
        self._diffusion, self._settings = diffusion, settings
        self._embedding_dim: int | None = student.config.time_cond_proj_dim if settings.takes_scale else None
        self._unconditional = diffusion.captions.unconditional(settings.negative_prompt)
        loss = settings.loss
        self._features = ComparedFeatures(teacher, student, pairs if loss.feature_kd else (), loss.balancing)
        self.watching = self._features.watching
        self._weights = {"output_kd_loss": loss.output_kd, "feature_kd_loss": loss.feature_kd, "unguided_loss": 0.0}

    def draw(self, batch: CachedBatch, rng: StepRng) -> GuidedBatch:
        noisy, schedule = self._diffusion.draw(batch, rng), self._diffusion.schedule
        low, high = self._settings.scales
        scale = low + (high - low) * rng.uniform("guidance_scale")
        learnt = schedule.predicting(self._settings.prediction_type or schedule.prediction_type)
        factor, offset = schedule.conversion(noisy.timesteps, learnt.prediction_type)
        truncated = self._settings.loss.weighting == "truncated-snr"
        return GuidedBatch(
            noisy,
            guidance_scale=scale.reshape(-1, 1, 1, 1),
            scale_embeds=embed_guidance_scale(scale, self._embedding_dim) if self._embedding_dim else None,
            factor=factor,
            offset=offset,
            weights=learnt.truncated_snr_weight(noisy.timesteps) if truncated else None,
        )

    def loss(self, drawn: GuidedBatch) -> LossTerms:
        noisy = drawn.noisy
        with teaching(noisy.noisy_latents.device):
            conditioning = self._diffusion.captions(noisy.captions, noisy.dropped, noisy.sizes)
            unconditional, conditional, teacher_features = self._teacher_passes(noisy, conditioning)
            guided = unconditional + drawn.guidance_scale * (conditional - unconditional)
            target, unguided = drawn.as_student(guided), drawn.as_student(conditional)
        model_pred, student_features = self._features.of_student(
            lambda: noisy.predict(self.forward, conditioning, torch.float32, drawn.scale_embeds)
        )
        sites = self._features.losses(student_features, teacher_features)
        terms = {
            "output_kd_loss": output_kd_loss(model_pred, target, drawn.weights),
            "unguided_loss": output_kd_loss(unguided, target, drawn.weights),  # what there is to learn
        }
        if sites:
            terms["feature_kd_loss"] = total(sites, like=model_pred)
        return LossTerms.weighted(terms, self._weights, sites)

    def _teacher_passes(self, noisy: NoisyBatch, conditional: Conditioning) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The teacher's unconditional and conditional output, float32, and the activations of the latter."""
        unconditional, dtype = _as_many(self._unconditional, conditional), dtype_of(self.teacher)

        def predict(conditioning: Conditioning) -> Tensor:
            return noisy.predict(self.forward_teacher, conditioning, dtype)

        if not self._settings.joint_teacher_passes:
            first = predict(unconditional)
            second, features = self._features.of_teacher(lambda: predict(conditional))
            return first.float(), second.float(), features
        both, features = self._features.of_teacher(lambda: predict(_joined(unconditional, conditional)))
        first, second = both.float().chunk(2)
        return first, second, [feature.chunk(2)[1].clone() for feature in features]  # the other half can go


def _as_many(one: Conditioning, like: Conditioning) -> Conditioning:
    """The conditioning of a batch of one for each sample of another, with the sizes of that."""
    count = len(like.prompt_embeds)
    added = {name: tensor.expand(count, -1) for name, tensor in one.added.items()}
    return Conditioning(one.prompt_embeds.expand(count, -1, -1), {**like.added, **added})


def _joined(first: Conditioning, second: Conditioning) -> Conditioning:
    """One batch after the other."""
    added = {name: torch.cat([first.added[name], tensor]) for name, tensor in second.added.items()}
    return Conditioning(torch.cat([first.prompt_embeds, second.prompt_embeds]), added)


def embed_guidance_scale(guidance_scale: Tensor, dim: int) -> Tensor:
    """What a stock pipeline makes of a guidance scale: Fourier features of w = guidance_scale - 1, (B, dim), float32.

    Args:
        guidance_scale: (B,), 1 for no guidance.
        dim: `time_cond_proj_dim` of the UNet.
    """
    # The pipeline's own method, which asks nothing of the pipeline.
    embeds: Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(cast(Any, None), guidance_scale - 1, dim)
    return embeds
