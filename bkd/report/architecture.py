"""What a run's student is made of beside its teacher: units, parameters, multiply-accumulates, UNet calls an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from bkd.diffusion.guidance import StudentKind, nearest_scale, passes_a_step
from bkd.errors import BkdError
from bkd.eval.shown import NONE, TIMES
from bkd.models.folder import prompt_length, unet_config
from bkd.models.locate import locate_teacher
from bkd.recipe.schema import Recipe
from bkd.runs.folder import RunFolder
from bkd.surgery.anatomy import read_anatomy
from bkd.surgery.canvas import Canvas
from bkd.surgery.compatibility import compatibility_notes
from bkd.surgery.cost import unet_cost
from bkd.surgery.diagram import diagram
from bkd.surgery.options import complete
from bkd.surgery.plan import PLAN_FILE, RemovalPlan, load_plans
from bkd.surgery.recognise import recognise
from bkd.surgery.unet import plan_removal


@dataclass(frozen=True)
class Model:
    """What one model costs.

    Attributes:
        parameters: Of its UNet.
        macs: Of one UNet evaluation of one sample, attention matmuls included.
        steps: Of an image, as the recipe's `samples` say or as it was trained for; None where it does not draw.
        passes: UNet evaluations of each step.
    """

    parameters: int
    macs: int
    steps: int | None
    passes: int

    @property
    def calls(self) -> int | None:
        """UNet evaluations of an image."""
        return self.steps * self.passes if self.steps else None

    @property
    def calls_text(self) -> str:
        """The same, as steps times passes."""
        return f"{self.steps} {TIMES} {self.passes}" if self.steps else NONE

    @property
    def image_macs(self) -> int | None:
        """Multiply-accumulates of all of them."""
        return self.macs * self.calls if self.calls else None


@dataclass(frozen=True)
class Architecture:
    """Teacher and student; None for what is not at hand.

    Attributes:
        teacher: As it was distilled from.
        student: The newest one, or the one that the recipe plans.
        removed: Units that the student lacks.
        planned: Whether no student has been written yet.
        notes: What does not fit the student that fits its teacher.
        drawing: What is kept and what is not.
        problem: Why there is no teacher and no diagram.
    """

    teacher: Model | None
    student: Model | None
    removed: tuple[str, ...]
    planned: bool
    drawing: Canvas | None
    notes: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def diagram(self) -> Markup | None:
        """The drawing, for a page."""
        if self.drawing is None:
            return None
        return Markup(self.drawing.svg().replace(' xmlns="http://www.w3.org/2000/svg"', ""))  # it says nothing in HTML


def architecture(run: RunFolder) -> Architecture:
    """What is known without weights; a teacher that is not on this disk is asked for, its configuration alone."""
    recipe = run.recipe()
    try:
        return _compared(run, recipe, locate_teacher(recipe.teacher, weights=False))
    except BkdError as error:
        student = newest_student(run, recipe)
        model = _model(student, recipe) if student else None
        return Architecture(None, model, (), student is None, None, problem=str(error))


def newest_student(run: RunFolder, recipe: Recipe) -> Path | None:
    """Of the last stage that has one."""
    return next((folder for folder in reversed(run.students(recipe)) if (folder / PLAN_FILE).is_file()), None)


def _compared(run: RunFolder, recipe: Recipe, teacher: Path) -> Architecture:
    config, student = unet_config(teacher), newest_student(run, recipe)
    plan = _removal(run, config, student) if student else _planned(config, recipe)
    before = _model(teacher, recipe)
    after = _model(student, recipe) if student else _model(teacher, recipe, plan)
    anatomy = read_anatomy(config)
    title = plan.name if plan.removed else "all blocks"
    subtitle = f"{before.parameters:,} → {after.parameters:,} UNet parameters"
    drawing = diagram(anatomy, complete(anatomy, plan.removed), title, subtitle=subtitle)
    return Architecture(before, after, plan.removed, student is None, drawing, compatibility_notes(config, plan))


def _model(folder: Path, recipe: Recipe, plan: RemovalPlan | None = None) -> Model:
    cost = unet_cost(unet_config(folder), plan, num_tokens=prompt_length(folder))
    return Model(cost.parameters, cost.macs, *_drawn(folder, recipe))


def _removal(run: RunFolder, config: dict[str, object], student: Path) -> RemovalPlan:
    """By the plan of the only stage that removed something; of several, one that leads all the way."""
    plans = []
    for plan, teacher_digest in load_plans(student):
        plans.append(plan)
        if teacher_digest == run.facts().get("teacher_digest"):
            break
    removing = [plan for plan in plans if plan.removed]
    return (removing or plans)[0] if len(removing) <= 1 else recognise(config, unet_config(student))


def _planned(config: dict[str, object], recipe: Recipe) -> RemovalPlan:
    """Of the first stage, before it has written a student."""
    blocks = str(recipe.stages[0].student.blocks or "none")
    return recognise(config, config) if blocks == "none" else plan_removal(config, blocks)


def _drawn(folder: Path, recipe: Recipe) -> tuple[int | None, int]:
    """Steps and passes of each; none for a model that encodes."""
    kind, asked = StudentKind.of(folder), recipe.samples
    if kind.encodes:
        return None, 1
    scale = kind.pipeline_scale(nearest_scale(folder, asked.guidance_scale), folder)
    return kind.steps(asked.num_inference_steps), passes_a_step(unet_config(folder), scale)
