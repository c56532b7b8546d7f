"""From a stage's words to what it will make: the student's plan, and how it will be used."""

from __future__ import annotations

from dataclasses import dataclass

from bkd.diffusion.guidance import OnePassGuidance, StudentKind
from bkd.diffusion.terms import PredictionType
from bkd.errors import BkdError, RecipeError
from bkd.lora.adapters import require_adaptable
from bkd.models.facts import ModelFacts
from bkd.models.folder import model_digest, unet_config
from bkd.recipe.schema import Recipe, Train
from bkd.recipe.stages import Guided, Halving, Stage, Student, numbered
from bkd.runs.stage_checks import of_student_path, require_fitting_method, require_fitting_start, starting_folder
from bkd.surgery.build import build_empty
from bkd.surgery.plan import PLAN_FILE, RemovalPlan, load_plans
from bkd.surgery.recognise import recognise
from bkd.surgery.sites import check_pairs
from bkd.surgery.unet import plan_removal

GUIDANCE_DIM = 256
"""Length of an embedded guidance scale; what LCM's released students take."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage, with everything about it decided that its weights do not decide.

    Attributes:
        number: Of the stage, from 0.
        seed: Of its data order and every random draw; the recipe's.
        stage: As the recipe has it.
        train: How it is trained.
        teacher: What is known of its teacher.
        plan: How its student comes from that.
        kind: How the student will be used.
    """

    number: int
    seed: int
    stage: Stage
    train: Train
    teacher: ModelFacts
    plan: RemovalPlan
    kind: StudentKind

    @property
    def student(self) -> ModelFacts:
        """What is known of its student."""
        name = f"the student of {numbered([self.number])} ({self.stage.title})"
        return self.teacher.student(name, self.plan, self.kind)


def plan_stages(recipe: Recipe, teacher: ModelFacts, side: int) -> tuple[PlannedStage, ...]:
    """All stages of a recipe, each with the student of the one before as its teacher.

    Args:
        recipe: As validated.
        teacher: Of the first.
        side: Of the latents that are trained on.

    Raises:
        BkdError: If a stage does not fit; names it.
    """
    planned: list[PlannedStage] = []
    for number, stage in enumerate(recipe.stages):
        try:
            plan = plan_stage(teacher, stage).at_size(side, teacher.unet["sample_size"])
            if (sites := stage.method.compared) is not None:
                check_pairs(teacher.unet, plan, plan.feature_pairs[sites])
        except BkdError as error:
            raise _of_stage(error, recipe, number) from error
        kind = student_kind(stage, teacher)
        planned.append(PlannedStage(number, recipe.seed, stage, recipe.train_of(number), teacher, plan, kind))
        teacher = planned[-1].student
    return tuple(planned)


def _of_stage(error: BkdError, recipe: Recipe, number: int) -> BkdError:
    """The same error, of this stage: where there are several, one that is written may stand for more than one."""
    if len(recipe.stages) == 1:
        return error
    prefix = f"{numbered([number])} ({recipe.stages[number].title}): "
    fields = {name: getattr(error, name) for name in ("where", "got", "allowed", "remedy")}
    told = {name: str(value).replace("stages.0.", prefix) for name, value in fields.items() if value is not None}
    return type(error)(error.what, **told)


def plan_stage(teacher: ModelFacts, stage: Stage) -> RemovalPlan:
    """How a stage's student comes from the teacher.

    Args:
        teacher: What is known of it.
        stage: Of the recipe.

    Raises:
        BkdError: If the student, the method, the adapters and the teacher do not fit together.
    """
    method = stage.method
    require_fitting_method(teacher, method)
    plan = _plan_student(teacher, stage.student)
    if isinstance(method, Guided) and method.takes_scale and not plan.added:
        plan = plan.with_guidance_input(GUIDANCE_DIM)
    elif plan.added and not (isinstance(method, Guided) and method.takes_scale):
        raise RecipeError(
            "this student has an input for the guidance scale, and the method does not train it",
            where="stages.0.student.path",
            got=f"method {method.name}",
            remedy="method.name=guided with a range for method.guidance_scale, or a student without that input",
        )
    if stage.student.path is not None:
        require_fitting_start(teacher, stage, starting_folder(stage.student.path))
    if stage.lora is not None:
        require_adaptable(build_empty(dict(teacher.unet), plan), stage.lora)
    return plan


def student_kind(stage: Stage, teacher: ModelFacts) -> StudentKind:
    """What a stage's student will be used like: what the method makes of it, or what its teacher is."""
    method = stage.method
    if isinstance(method, Guided):
        return StudentKind(OnePassGuidance(*method.scales, method.takes_scale), _other_type(method, teacher))
    if isinstance(method, Halving):
        return StudentKind(teacher.guidance, _other_type(method, teacher), method.few_steps)
    return StudentKind(teacher.guidance)


def _other_type(method: Guided | Halving, teacher: ModelFacts) -> PredictionType | None:
    return method.prediction_type if method.prediction_type != teacher.schedule.prediction_type else None


def _plan_student(teacher: ModelFacts, student: Student) -> RemovalPlan:
    if student.path is None:
        return plan_removal(teacher.unet, str(student))
    folder = starting_folder(student.path)
    if (folder / PLAN_FILE).is_file() and teacher.folder is not None:
        plan, digest = load_plans(folder)[0]
        if digest == model_digest(teacher.folder):
            return plan
    try:
        return recognise(teacher.unet, unet_config(folder))
    except BkdError as error:
        raise of_student_path(student.path, error) from error
