"""Students of few steps: how many, with which sampler, in which direction; and how a pipeline is to be called."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, PositiveInt

from bkd.diffusion.terms import Direction, Sampler
from bkd.errors import ModelError
from bkd.surgery.plan import plan_entry


@dataclass(frozen=True)
class FewSteps:
    """What a student was halved to.

    Attributes:
        num_inference_steps: It knows the noise levels of so many.
        sampler: With which it takes so many. A stock pipeline takes half as many, deterministic ones, with a student
            for the stochastic sampler.
        direction: `inversion` for one that encodes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    num_inference_steps: PositiveInt
    sampler: Sampler = "deterministic"
    direction: Direction = "generation"

    def __str__(self) -> str:
        words = [self.sampler] * (self.sampler == "stochastic") + ["inversion"] * (self.direction == "inversion")
        plural = "s" * (self.num_inference_steps != 1)
        return f"{self.num_inference_steps} step{plural}" + (f" ({', '.join(words)})" if words else "")

    def facts(self) -> dict[str, Any]:
        """For a plan file."""
        return asdict(self)

    @property
    def stock_steps(self) -> int:
        """How many a stock pipeline takes, with the scheduler of the student's folder."""
        return self.num_inference_steps // 2 if self.sampler == "stochastic" else self.num_inference_steps

    @property
    def call(self) -> str:
        """How a stock pipeline is called, in words; with the scheduler of the student's folder that is exact."""
        halved = f"it was halved to {self}: call the pipeline with num_inference_steps="
        if self.direction == "inversion":
            return (
                f"{halved}{self.num_inference_steps}, the image's latents and "
                "bkd.diffusion.sampling.InversionScheduler, or use bkd edit"
            )
        other = "other numbers of steps and other schedulers visit noise levels that it never saw"
        own = (
            f", or {self.num_inference_steps} and bkd.diffusion.sampling.StochasticScheduler, which it was trained for"
        )
        return f"{halved}{self.stock_steps}{own * (self.sampler == 'stochastic')}; {other}"

    def require(self, asked: int | None, model: object) -> None:
        """Refuse to draw with a student that encodes, or in a number of steps that it has not learnt.

        Args:
            asked: Number of steps; None for its own.
            model: Its name, for errors.

        Raises:
            ModelError: If that is asked for.
        """
        if self.direction == "inversion":
            raise ModelError(
                "this student encodes images, and does not draw",
                where=model,
                got=self,
                remedy="one that draws, such as its teacher (of an edit: --decoder MODEL); this one is for bkd edit"
                " --encoder",
            )
        if asked not in (None, self.num_inference_steps):
            raise ModelError(
                "this student knows the noise levels of another number of steps",
                where=model,
                got=f"{asked} steps",
                allowed=str(self),
                remedy=f"num_inference_steps {self.num_inference_steps}, or the student of an earlier halving",
            )


def few_steps(folder: Path) -> FewSteps | None:
    """What a student's folder says of its steps; None for models that take as many as one likes.

    Raises:
        ModelError: If its plan file cannot be read.
    """
    return plan_entry(folder, "few_steps", FewSteps)


def require_steps(folder: Path, asked: int, model: object) -> None:
    """Refuse to draw with a model in a number of steps that it has not learnt; see `FewSteps.require`."""
    if (known := few_steps(folder)) is not None:
        known.require(asked, model)


def steps_of(folder: Path, asked: int, model: object) -> int:
    """Denoising steps that a model draws with: its own number where it has one, else what was asked for.

    Raises:
        ModelError: If it does not draw.
    """
    known = few_steps(folder)
    if known is None:
        return asked
    known.require(None, model)
    return known.num_inference_steps
