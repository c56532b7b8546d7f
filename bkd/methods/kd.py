"""Block-removal distillation: task + output + feature loss (Kim et al. 2023, arXiv:2305.15798; segmind/distill-sd)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from bkd.data.latent_set import CachedBatch
from bkd.hooks import FeatureTap
from bkd.losses import LossTerms, feature_kd_loss, output_kd_loss, task_loss
from bkd.methods.base import Diffusion
from bkd.recipe.schema import LossWeights
from bkd.rng import StepRng
from bkd.surgery.plan import FeaturePair


class KnowledgeDistillation:
    """Teach a student UNet what its teacher computes, inside and out.

    Args:
        teacher: Frozen, in eval mode; run without gradients, never wrapped.
        student: The UNet to train.
        diffusion: Schedule, text encoder and the draw of noise and captions.
        pairs: Which activations should agree.
        weights: Of the three terms. Every term is logged; without a feature weight no features are compared.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module,
        student: nn.Module,
        diffusion: Diffusion,
        pairs: Sequence[FeaturePair],
        weights: LossWeights,
    ) -> None:
        self.trainable = student
        self.forward: Callable[..., object] = student
        self._teacher = teacher
        self._diffusion = diffusion
        self._pairs = tuple(pairs) if weights.feature_kd else ()
        self._weights = {
            "task_loss": weights.task,
            "output_kd_loss": weights.output_kd,
            "feature_kd_loss": weights.feature_kd,
        }

    def loss(self, batch: CachedBatch, rng: StepRng) -> LossTerms:
        drawn = self._diffusion.draw(batch, rng)
        # no_grad, not inference_mode: what inference_mode returns cannot enter a loss.
        with torch.no_grad(), FeatureTap(self._teacher, [pair.teacher for pair in self._pairs]) as tap:
            teacher_pred = drawn.predict(self._teacher)
            teacher_features = tap.take()
        with FeatureTap(self.trainable, [pair.student for pair in self._pairs]) as tap:
            model_pred = drawn.predict(self.forward)
            student_features = tap.take()
        target = self._diffusion.schedule.target(drawn.latents, drawn.noise, drawn.timesteps)
        return LossTerms.weighted(
            {
                "task_loss": task_loss(model_pred, target),
                "output_kd_loss": output_kd_loss(model_pred, teacher_pred),
                "feature_kd_loss": feature_kd_loss(student_features, teacher_features),
            },
            self._weights,
        )
