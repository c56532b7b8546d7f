"""The three terms of block-removal distillation, as pure functions, and the record that carries them.

L = w_task L_task + w_out L_outKD + w_feat L_featKD   (Kim et al. 2023, arXiv:2305.15798, section 3.2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd.errors import ShapeMismatch

TINY = 1e-12
"""Keeps an all-zero teacher feature from dividing by zero."""


@dataclass(frozen=True)
class LossTerms:
    """A loss to minimise and the parts it is made of.

    Attributes:
        total: Scalar, float32, with gradient.
        parts: Named unweighted terms, scalars without gradient, to be logged as they are.
        sites: What each site adds to the feature term, by the student's module path; scalars without gradient.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    sites: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def weighted(
        cls, terms: Mapping[str, Tensor], weights: Mapping[str, float], sites: Mapping[str, Tensor] | None = None
    ) -> LossTerms:
        """Sum of weight x term over the named terms; a term of weight 0 is logged and not trained on.

        At least one weight must not be 0.
        """
        total = torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum()
        detached = {name: site.detach() for name, site in (sites or {}).items()}
        return cls(total, {name: term.detach() for name, term in terms.items()}, detached)


def task_loss(model_pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between the student's prediction and the diffusion target.

    Args:
        model_pred: (B, C, H, W), any float dtype; reduced in float32.
        target: Same shape: noise, v or clean latents, by prediction type.
        weights: (B,), of each sample's error; all 1 when not given. The sum is divided by B whatever they are, so that
            a sample weighs the same however its batch is split.

    Returns:
        Scalar, float32.

    Source:
        arXiv:2305.15798, L_Task.
    """
    _require_same_shape(model_pred, target, "task loss")
    return _mean_squared_error(model_pred, target, weights)


def output_kd_loss(student_pred: Tensor, teacher_pred: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between the outputs of student and teacher UNet.

    Args:
        student_pred: (B, C, H, W), any float dtype; reduced in float32.
        teacher_pred: Same shape. Gradients never flow into it.
        weights: As for `task_loss`.

    Returns:
        Scalar, float32.

    Source:
        arXiv:2305.15798, L_OutKD.
    """
    _require_same_shape(student_pred, teacher_pred, "output KD")
    return _mean_squared_error(student_pred, teacher_pred.detach(), weights)


def feature_kd_losses(student: Sequence[Tensor], teacher: Sequence[Tensor], *, balanced: bool = False) -> list[Tensor]:
    """For each pair, the mean squared error between student and teacher activations; their sum is the term.

    Unbalanced, the sites with the largest activations are nearly all of the sum. Balanced, a sample's error at a site
    is divided by the mean square of the teacher's activation there: 1 is the error of answering zero.

    Args:
        student: K tensors, each (B, ...), any float dtype; reduced in float32.
        teacher: K tensors of the same shapes. Gradients never flow into them.
        balanced: Whether errors are divided by the teacher's power.

    Returns:
        K scalars, float32. Zero where the two are equal.

    Raises:
        ShapeMismatch: If a pair differs in shape, or the lists in length; names the pair and both shapes.

    Source:
        arXiv:2305.15798, L_FeatKD. Balancing: the normalised distillation of arXiv:2404.11098, but for each sample,
        so that the split of a batch does not matter, and without the factor that is common to all sites.
    """
    if len(student) != len(teacher):
        raise ShapeMismatch("feature KD: unequal numbers of features", got=f"{len(student)} and {len(teacher)}")
    losses = []
    for k, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        _require_same_shape(ours, theirs, f"feature KD, pair {k}")
        theirs = theirs.detach()
        if balanced:
            power = theirs.float().square().flatten(1).mean(1)
            losses.append((_per_sample(ours, theirs) / (power + TINY)).mean())
        else:
            losses.append(F.mse_loss(ours.float(), theirs.float()))
    return losses


def _mean_squared_error(prediction: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return F.mse_loss(prediction.float(), target.float())
    return (weights * _per_sample(prediction, target)).mean()


def _per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,): mean squared error of each sample."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)


def _require_same_shape(prediction: Tensor, target: Tensor, where: str) -> None:
    # F.mse_loss would broadcast unequal shapes with a warning only.
    if prediction.shape != target.shape:
        raise ShapeMismatch(f"{where}: shapes differ", got=f"{tuple(prediction.shape)} and {tuple(target.shape)}")
