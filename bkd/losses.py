"""The three terms of block-removal distillation, as pure functions, and the record that carries them.

L = w_task L_task + w_out L_outKD + w_feat L_featKD   (Kim et al. 2023, arXiv:2305.15798, section 3.2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd.errors import ShapeMismatch


@dataclass(frozen=True)
class LossTerms:
    """A loss to minimise and the parts it is made of.

    Attributes:
        total: Scalar, float32, with gradient.
        parts: Named unweighted terms, scalars without gradient, to be logged as they are.
    """

    total: Tensor
    parts: Mapping[str, Tensor]

    @classmethod
    def weighted(cls, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> LossTerms:
        """Sum of weight x term over the named terms; a term of weight 0 is logged and not trained on.

        At least one weight must not be 0.
        """
        total = torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum()
        return cls(total, {name: term.detach() for name, term in terms.items()})


def task_loss(model_pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error between the student's prediction and the diffusion target.

    Args:
        model_pred: (B, C, H, W), any float dtype; reduced in float32.
        target: Same shape: noise, v or clean latents, by prediction type.

    Returns:
        Scalar, float32.

    Source:
        arXiv:2305.15798, L_Task.
    """
    return _mse(model_pred, target, "task loss")


def output_kd_loss(student_pred: Tensor, teacher_pred: Tensor) -> Tensor:
    """Mean squared error between the outputs of student and teacher UNet.

    Args:
        student_pred: (B, C, H, W), any float dtype; reduced in float32.
        teacher_pred: Same shape. Gradients never flow into it.

    Returns:
        Scalar, float32.

    Source:
        arXiv:2305.15798, L_OutKD.
    """
    return _mse(student_pred, teacher_pred.detach(), "output KD")


def feature_kd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum, over pairs, of the mean squared error between student and teacher activations.

    Args:
        student: K tensors, each (B, C_k, H_k, W_k), any float dtype; reduced in float32.
        teacher: K tensors of the same shapes. Gradients never flow into them.

    Returns:
        Scalar, float32. Zero when the two lists are equal, or empty.

    Raises:
        ShapeMismatch: If a pair differs in shape, or the lists in length; names the pair and both shapes.

    Source:
        arXiv:2305.15798, L_FeatKD.
    """
    if len(student) != len(teacher):
        raise ShapeMismatch("feature KD: unequal numbers of features", got=f"{len(student)} and {len(teacher)}")
    pairs = enumerate(zip(student, teacher, strict=True))
    terms = [_mse(s, t.detach(), f"feature KD, pair {k}") for k, (s, t) in pairs]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _mse(prediction: Tensor, target: Tensor, where: str) -> Tensor:
    # F.mse_loss would broadcast unequal shapes with a warning only.
    if prediction.shape != target.shape:
        raise ShapeMismatch(f"{where}: shapes differ", got=f"{tuple(prediction.shape)} and {tuple(target.shape)}")
    return F.mse_loss(prediction.float(), target.float())
