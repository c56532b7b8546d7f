"""Block-removal distillation: task + output + feature loss (Kim et al. 2023, arXiv:2305.15798; segmind/distill-sd)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bkd.data.latent_set import CachedBatch
from bkd.hooks import FeatureTap
from bkd.losses import LossTerms, feature_kd_losses, output_kd_loss, task_loss
from bkd.methods.base import Diffusion, NoisyBatch
from bkd.recipe.schema import Loss
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
        pairs = tuple(pairs) if loss.feature_kd else ()
        self._sites = [pair.student for pair in pairs]
        self._student_tap = FeatureTap(student, self._sites)
        self._teacher_tap = FeatureTap(teacher, [pair.teacher for pair in pairs])
        self._balanced = loss.balancing == "teacher-power"
        self._weights = {
            "task_loss": loss.task,
            "output_kd_loss": loss.output_kd,
            "feature_kd_loss": loss.feature_kd,
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self._student_tap, self._teacher_tap:
            yield

    def draw(self, batch: CachedBatch, rng: StepRng) -> NoisyBatch:
        return self._diffusion.draw(batch, rng)

    def loss(self, drawn: NoisyBatch) -> LossTerms:
        # no_grad, not inference_mode: what inference_mode returns cannot enter a loss. Without autocast, which would
        # compute norms and softmax in float32 though the teacher's weights are not.
        device, dtype = drawn.noisy_latents.device.type, next(self.teacher.parameters()).dtype
        with torch.no_grad(), torch.autocast(device, enabled=False):
            conditioning = self._diffusion.captions(drawn.captions, drawn.dropped, drawn.sizes)
            teacher_pred, teacher_features = self._teacher_tap.run(
                lambda: drawn.predict(self.forward_teacher, conditioning, dtype)
            )
        model_pred, student_features = self._student_tap.run(
            lambda: drawn.predict(self.forward, conditioning, torch.float32)
        )
        losses = feature_kd_losses(student_features, teacher_features, balanced=self._balanced)
        return LossTerms.weighted(
            {
                "task_loss": task_loss(model_pred, drawn.target, drawn.task_weights),
                "output_kd_loss": output_kd_loss(model_pred, teacher_pred),
                "feature_kd_loss": torch.stack(losses).sum() if losses else model_pred.new_zeros(()),
            },
            self._weights,
            sites=dict(zip(self._sites, losses, strict=True)),
        )
