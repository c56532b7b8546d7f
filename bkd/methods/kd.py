"""Block-removal distillation: task + output + feature loss (Kim et al. 2023, arXiv:2305.15798; segmind/distill-sd)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bkd.data.latent_set import CachedBatch
from bkd.losses import LossTerms, output_kd_loss, task_loss
from bkd.methods.base import Diffusion, NoisyBatch, dtype_of, teaching
from bkd.methods.features import ComparedFeatures, total
from bkd.recipe.stages import Loss
from bkd.rng import StepRng
from bkd.surgery.plan import FeaturePair


class KnowledgeDistillation:
    """Teach a student UNet what its teacher computes, inside and out.

    Args:
        teacher: Frozen, in eval mode; run without gradients, in its own dtype.
        student: The UNet to train.
        diffusion: Schedule, text encoder and the draw of noise and captions.
        pairs: Which activations should agree.
        loss: Weights of the three terms. Every term is logged; without a feature weight no features are compared.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module,
        student: nn.Module,
        diffusion: Diffusion,
        pairs: Sequence[FeaturePair],
        loss: Loss,
    ) -> None:
        self.trainable, self.teacher = student, teacher
        self.forward: Callable[..., Any] = student
        self.forward_teacher: Callable[..., Any] = teacher
        self.needs_others = diffusion.random_conditioning
        self.reaches_all = loss.reaches_all
        self._diffusion = diffusion
        self._features = ComparedFeatures(teacher, student, pairs if loss.feature_kd else (), loss.balancing)
        self.watching = self._features.watching
        self._weights = {
            "task_loss": loss.task,
            "output_kd_loss": loss.output_kd,
            "feature_kd_loss": loss.feature_kd,
        }

    def draw(self, batch: CachedBatch, rng: StepRng) -> NoisyBatch:
        return self._diffusion.draw(batch, rng)

    def loss(self, drawn: NoisyBatch) -> LossTerms:
        with teaching(drawn.noisy_latents.device):
            conditioning = self._diffusion.captions(drawn.captions, drawn.dropped, drawn.sizes)
            teacher_pred, teacher_features = self._features.of_teacher(
                lambda: drawn.predict(self.forward_teacher, conditioning, dtype_of(self.teacher))
            )
        model_pred, student_features = self._features.of_student(
            lambda: drawn.predict(self.forward, conditioning, torch.float32)
        )
        sites = self._features.losses(student_features, teacher_features)
        terms = {
            "task_loss": task_loss(model_pred, drawn.target, drawn.task_weights),
            "output_kd_loss": output_kd_loss(model_pred, teacher_pred),
            "feature_kd_loss": total(sites, like=model_pred),
        }
        return LossTerms.weighted(terms, self._weights, sites)
