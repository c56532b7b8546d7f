"""How much a removal changes what a UNet computes, before any training (LAPTOP-Diff, arXiv:2404.11098, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bkd.surgery.build import build_student
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.probe import as_arguments

Inputs = Mapping[str, Tensor]
"""One batch of UNet inputs, as `bkd.surgery.probe.unet_inputs` names them."""


class OutputChange:
    """Relative squared change of a teacher's output on fixed inputs: |student - teacher|^2 / |teacher|^2.

    Attributes:
        num_samples: How many inputs there are.

    Args:
        teacher: Frozen, in eval mode.
        batches: UNet inputs on the teacher's device, in its dtype. Their outputs are kept.
    """

    def __init__(self, teacher: UNet2DConditionModel, batches: Sequence[Inputs]) -> None:
        self._teacher = teacher
        self._batches = batches
        self._expected = self._outputs(teacher)
        self.num_samples = sum(len(output) for output in self._expected)
        self._power = sum(float(output.double().square().sum()) for output in self._expected)

    def of_plan(self, plan: RemovalPlan) -> float:
        """When a student is built by a plan; its weights are the teacher's own, not copies.

        Raises:
            SurgeryError: If the plan is not for this teacher.
        """
        return self._of(build_student(self._teacher, plan, share_base=True))

    def of_skipping(self, module: str) -> float:
        """When one module hands on what it is given; for transformer layers, whose removal is just that."""
        with skipped(self._teacher.get_submodule(module)):
            return self._of(self._teacher)

    def _of(self, unet: UNet2DConditionModel) -> float:
        pairs = zip(self._outputs(unet), self._expected, strict=True)
        return sum(float((ours.double() - theirs.double()).square().sum()) for ours, theirs in pairs) / self._power

    @torch.no_grad()
    def _outputs(self, unet: UNet2DConditionModel) -> list[Tensor]:
        return [unet(**as_arguments(batch)).sample for batch in self._batches]


@contextmanager
def skipped(module: nn.Module) -> Iterator[None]:
    """A module that returns its first input while the block runs."""

    def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        return args[0] if args else kwargs["hidden_states"]

    handle = module.register_forward_hook(first_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
