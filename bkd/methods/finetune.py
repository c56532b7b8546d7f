"""Fine-tuning: the diffusion objective on the data, without a teacher (Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from bkd.data.latent_set import CachedBatch
from bkd.losses import LossTerms, task_loss
from bkd.methods.base import Diffusion, NoisyBatch, teaching
from bkd.rng import StepRng


class Finetuning:
    """Teach a UNet what captioned images look like.

    Args:
        student: The UNet to train.
        diffusion: Schedule, text encoder and the draw of noise and captions.
    """

    def __init__(self, *, student: nn.Module, diffusion: Diffusion) -> None:
        self.trainable, self.teacher = student, None
        self.forward: Callable[..., Any] = student
        self.forward_teacher: Callable[..., Any] = student
        self.needs_others, self.reaches_all = False, True
        self._diffusion = diffusion

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def draw(self, batch: CachedBatch, rng: StepRng) -> NoisyBatch:
        return self._diffusion.draw(batch, rng)

    def loss(self, drawn: NoisyBatch) -> LossTerms:
        with teaching(drawn.noisy_latents.device):
            conditioning = self._diffusion.captions(drawn.captions, drawn.dropped, drawn.sizes)
        model_pred = drawn.predict(self.forward, conditioning, torch.float32)
        terms = {"task_loss": task_loss(model_pred, drawn.target, drawn.task_weights)}
        return LossTerms.weighted(terms, {"task_loss": 1.0})
