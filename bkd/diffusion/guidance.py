"""Students that draw guided in one pass: which guidance scales they know, and how a stock pipeline is to be called.

A student with an input for the scale is told it by the pipeline. One without has a single scale in its weights: asked
for any other than 1, the pipeline would guide it once more, with two passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from bkd.diffusion.few_steps import FewSteps, few_steps
from bkd.diffusion.terms import PredictionType
from bkd.errors import ModelError
from bkd.models.folder import unet_config
from bkd.surgery.plan import plan_entry


@dataclass(frozen=True)
class OnePassGuidance:
    """What a student has learnt.

    Attributes:
        low: Least guidance scale.
        high: Greatest.
        takes_scale: Whether it has an input for the scale; if not, `low` is `high`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    low: float
    high: float
    takes_scale: bool

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" if self.takes_scale else f"{self.low:g}"

    def facts(self) -> dict[str, Any]:
        """For a plan file."""
        return {"low": self.low, "high": self.high, "takes_scale": self.takes_scale}

    @property
    def call(self) -> str:
        """How a stock pipeline is called, in words."""
        if self.takes_scale:
            how = f"it is told the guidance scale: call the pipeline with guidance_scale={self.low:g} to {self.high:g}"
        else:
            how = f"it holds guidance_scale {self}: call the pipeline with guidance_scale=1.0"
        return f"{how}; each step is one pass, and a negative prompt has no effect"

    def nearest(self, asked: float) -> float:
        """The scale that it knows and that comes nearest to one."""
        return min(max(asked, self.low), self.high)

    def pipeline_scale(self, asked: float, model: object) -> float:
        """The `guidance_scale` to call a stock pipeline with.

        Args:
            asked: By the user.
            model: Its name, for errors.

        Raises:
            ModelError: If the student has not learnt that scale.
        """
        if not self.low <= asked <= self.high:
            raise ModelError(
                "this student draws guided in one pass, and has not learnt that guidance scale",
                where=model,
                got=f"guidance_scale {asked:g}",
                allowed=str(self),
                remedy=f"guidance_scale {self.nearest(asked):g}"
                + ("" if self.takes_scale else ", or train with a range: method.guidance_scale=[1, 14]"),
            )
        return asked if self.takes_scale else 1.0


@dataclass(frozen=True)
class StudentKind:
    """How a student is used differently from its teacher.

    Attributes:
        guidance: What it has learnt of guidance; None where it is guided by two passes.
        prediction_type: What it predicts, where that is something else.
        few_steps: What it was halved to; None where it takes as many steps as one likes.
    """

    guidance: OnePassGuidance | None = None
    prediction_type: PredictionType | None = None
    few_steps: FewSteps | None = None

    def __str__(self) -> str:
        told = "told a guidance scale of" if self.guidance and self.guidance.takes_scale else "guidance scale"
        guided = [] if self.guidance is None else [f"guided in one pass, {told} {self.guidance}"]
        return "; ".join(guided + ([str(self.few_steps)] if self.few_steps else []))

    @property
    def encodes(self) -> bool:
        """Whether it finds an image's noise, rather than draws."""
        return self.few_steps is not None and self.few_steps.direction == "inversion"

    @classmethod
    def of(cls, folder: Path) -> StudentKind:
        """What a pipeline folder says of itself."""
        return cls(one_pass_guidance(folder), None, few_steps(folder))

    def facts(self) -> dict[str, Any]:
        """For a plan file."""
        return {
            "guidance": self.guidance.facts() if self.guidance else None,
            "few_steps": self.few_steps.facts() if self.few_steps else None,
        }

    def calls(self) -> tuple[str, ...]:
        """How a stock pipeline is called with it, where that is not as usual: a sentence each, without a full stop."""
        told = [self.guidance.call] if self.guidance else []
        return tuple(told + ([self.few_steps.call] if self.few_steps else []))

    def pipeline_scale(self, asked: float, model: object) -> float:
        """See `OnePassGuidance.pipeline_scale`."""
        return asked if self.guidance is None else self.guidance.pipeline_scale(asked, model)

    def steps(self, asked: int) -> int:
        """Denoising steps: its own number where it has one."""
        return self.few_steps.num_inference_steps if self.few_steps else asked


def one_pass_guidance(folder: Path) -> OnePassGuidance | None:
    """What a student's folder says of its guidance; None for models that are guided by two passes.

    Raises:
        ModelError: If its plan file cannot be read.
    """
    if (known := plan_entry(folder, "guidance", OnePassGuidance)) is not None:
        return known
    if unet_config(folder).get("time_cond_proj_dim"):  # made elsewhere: it does not say for which scales
        return OnePassGuidance(1.0, math.inf, takes_scale=True)
    return None


def pipeline_scale(folder: Path, asked: float, model: object) -> float:
    """The `guidance_scale` to call a model's stock pipeline with; see `OnePassGuidance.pipeline_scale`."""
    return StudentKind(one_pass_guidance(folder)).pipeline_scale(asked, model)


def nearest_scale(folder: Path, wanted: float) -> float:
    """The guidance scale nearest to one that a model has learnt; the same for models that are guided by two passes."""
    known = one_pass_guidance(folder)
    return wanted if known is None else known.nearest(wanted)


def passes_a_step(unet: Mapping[str, Any], pipeline_scale: float) -> int:
    """How often the stock pipeline evaluates the UNet in a denoising step.

    Args:
        unet: The UNet's configuration.
        pipeline_scale: The `guidance_scale` that the pipeline is called with.
    """
    return 2 if pipeline_scale > 1 and not unet.get("time_cond_proj_dim") else 1
