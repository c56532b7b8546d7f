"""Feature KD: activations of the two networks, tapped at the same sites and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from bkd.hooks import FeatureTap
from bkd.losses import feature_kd_losses
from bkd.recipe.stages import Balancing
from bkd.surgery.plan import FeaturePair

T = TypeVar("T")


class ComparedFeatures:
    """Sites of two networks, and what their activations differ by; without sites nothing is tapped.

    Args:
        teacher: The one that is compared with.
        student: The one that learns.
        pairs: Which activations should agree.
        balancing: See `feature_kd_losses`.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, pairs: Sequence[FeaturePair], balancing: Balancing
    ) -> None:
        self._sites = [pair.student for pair in pairs]
        self._student_tap = FeatureTap(student, self._sites)
        self._teacher_tap = FeatureTap(teacher, [pair.teacher for pair in pairs])
        self._balanced = balancing == "teacher-power"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place for as long as the context lasts."""
        with self._student_tap, self._teacher_tap:
            yield

    def of_teacher(self, forward: Callable[[], T]) -> tuple[T, list[Tensor]]:
        """What a pass of the teacher returns, and its activations."""
        return self._teacher_tap.run(forward)

    def of_student(self, forward: Callable[[], T]) -> tuple[T, list[Tensor]]:
        """The same of the student."""
        return self._student_tap.run(forward)

    def losses(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> dict[str, Tensor]:
        """What each site adds to the feature term, by the student's module path."""
        found = feature_kd_losses(student, teacher, balanced=self._balanced)
        return dict(zip(self._sites, found, strict=True))


def total(losses: dict[str, Tensor], like: Tensor) -> Tensor:
    """The feature term; zero, on the device of `like`, without sites."""
    return torch.stack(list(losses.values())).sum() if losses else like.new_zeros(())
