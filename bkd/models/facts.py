"""What is known of a model before its weights are looked at, or there at all: an earlier stage may be to make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.diffusion.few_steps import FewSteps, few_steps
from bkd.diffusion.guidance import OnePassGuidance, StudentKind, one_pass_guidance
from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.diffusion.schedulers import student_scheduler
from bkd.models.folder import scheduler_config, unet_config
from bkd.models.load import load_noise_schedule
from bkd.surgery.plan import RemovalPlan


@dataclass(frozen=True)
class ModelFacts:
    """Of a teacher or a student.

    Attributes:
        name: For people.
        unet: The UNet's configuration.
        schedule: Noise schedule and prediction type.
        scheduler: The scheduler's configuration.
        guidance: What it has learnt of guidance; None where it is guided by two passes.
        few_steps: What it was halved to; None where it takes as many steps as one likes.
        folder: Where it lies; None where it is not there yet.
    """

    name: str
    unet: Mapping[str, Any]
    schedule: NoiseSchedule
    scheduler: Mapping[str, Any]
    guidance: OnePassGuidance | None
    few_steps: FewSteps | None
    folder: Path | None = None

    @property
    def kind(self) -> StudentKind:
        """How it is used."""
        return StudentKind(self.guidance, None, self.few_steps)

    def student(self, name: str, plan: RemovalPlan, kind: StudentKind) -> ModelFacts:
        """What a student will be.

        Args:
            name: Of the student.
            plan: How it comes from this model.
            kind: How it will be used.
        """
        predicts = self.schedule.predicting(kind.prediction_type or self.schedule.prediction_type)
        scheduler = student_scheduler(self.scheduler, kind)
        return ModelFacts(name, {**self.unet, **plan.overrides}, predicts, scheduler, kind.guidance, kind.few_steps)


def model_facts(folder: Path, name: str | None = None) -> ModelFacts:
    """Of a pipeline folder.

    Args:
        folder: Where it lies.
        name: For people; the folder when not given.

    Raises:
        ModelError: If a file cannot be read, or the noise schedule is of another kind than DDPM's.
    """
    return ModelFacts(
        name or str(folder),
        unet_config(folder),
        load_noise_schedule(folder),
        scheduler_config(folder),
        one_pass_guidance(folder),
        few_steps(folder),
        folder,
    )
