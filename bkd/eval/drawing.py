"""How images are drawn, and what a model is drawn with where nothing is said.

Light, so that wrong wishes are refused before anything heavy loads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bkd.data.shapes import EMBEDDED
from bkd.diffusion.few_steps import few_steps, require_steps
from bkd.diffusion.guidance import nearest_scale, pipeline_scale
from bkd.diffusion.scheduler_kinds import require_ode
from bkd.diffusion.terms import SCHEDULERS
from bkd.errors import DataError, ModelError, one_of
from bkd.models.folder import scheduler_config
from bkd.models.locate import is_folder, locate
from bkd.runs.folder import run_of_student

RNGS = ("per-image", "bksdm")
EMBEDDED_DRAWING = (20, 3.0)
USUAL_DRAWING = (25, 7.5)


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    Attributes:
        num_inference_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; 1 for none.
        seed: Of the starting noise, 0 or more.
        rng: `per-image`: image i has a generator of its own, on the CPU, seeded by (seed, i). `bksdm`: one generator
            on the device for all images, one after the other, as BK-SDM's published figures were made; image i's noise
            is the i-th that it gives, and other devices give other images.
        scheduler: One of `bkd.diffusion.terms.SCHEDULERS`; a model's own when not given.
    """

    num_inference_steps: int
    guidance_scale: float
    seed: int = 0
    rng: str = "per-image"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        one_of(self.rng, RNGS, kind="rng", error=DataError)
        if self.scheduler is not None:
            one_of(self.scheduler, SCHEDULERS, kind="scheduler", error=DataError)

    def __str__(self) -> str:
        plural = "s" * (self.num_inference_steps != 1)
        words = [f"{self.num_inference_steps} step{plural}", f"guidance {self.guidance_scale:g}"]
        return ", ".join([*words, self.scheduler] if self.scheduler else words)

    def facts(self) -> dict[str, Any]:
        """What was chosen, for reports."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def drawing_settings(
    model: str, steps: int | None, guidance: float | None, *, suite: str = "prompts", alone: bool = False
) -> tuple[int, float]:
    """Denoising steps and guidance scale: as asked, else the run's own, else what the kind of model is used with.

    Args:
        model: A MODEL argument; a run's student is drawn with as its run says, too.
        steps: As asked.
        guidance: As asked.
        suite: What is drawn for.
        alone: Whether no other model is drawn with, so that what it knows itself comes before what its run says.
    """
    if (run := run_of_student(Path(model))) is not None:
        samples = run.recipe().samples
        usual = (samples.num_inference_steps, samples.guidance_scale)
    else:
        usual = EMBEDDED_DRAWING if EMBEDDED in (model, suite) else USUAL_DRAWING
    is_run = run is not None and run.path == Path(model)
    if alone or (is_folder(model) and not is_run):
        folder = locate(model, weights=False)
        guidance = guidance or nearest_scale(folder, usual[1])
        if alone and steps is None and (few := few_steps(folder)):
            steps = few.num_inference_steps
    return steps or usual[0], guidance or usual[1]


def require_drawable(model: str, drawing: Drawing) -> float:
    """Refuse to draw with a model as it has not learnt to draw.

    Args:
        model: A MODEL argument.
        drawing: How.

    Returns:
        The `guidance_scale` to call its pipeline with.

    Raises:
        ModelError: If there is no such model, or it has not learnt that guidance scale, so many steps, or a
            sampler like that.
    """
    folder = locate(model, weights=False)
    scale = pipeline_scale(folder, drawing.guidance_scale, model)
    require_steps(folder, drawing.num_inference_steps, model)
    if drawing.scheduler is not None and (few := few_steps(folder)) is not None:
        raise ModelError(
            "this student was trained for one sampler",
            where=model,
            got=drawing.scheduler,
            allowed=few,
            remedy="leave --scheduler out",
        )
    if drawing.scheduler is not None:
        require_ode(scheduler_config(folder), model)
    return scale
