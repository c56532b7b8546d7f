"""From a stage's words to what it will make: the student's plan, how it will be used, and all that can be wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from bkd.diffusion import NoiseSchedule
from bkd.errors import BkdError, ModelError, RecipeError
from bkd.few_steps import FewSteps, few_steps, require_ode
from bkd.grid import nests
from bkd.guidance import OnePassGuidance, StudentKind, one_pass_guidance
from bkd.locate import locate
from bkd.lora.adapters import require_adaptable
from bkd.model_facts import ModelFacts
from bkd.model_folder import model_digest, unet_config
from bkd.models import load_noise_schedule
from bkd.recipe.schema import Recipe, Train
from bkd.recipe.stages import Guided, Halving, Stage, Student, numbered
from bkd.rng import stage_seed
from bkd.surgery.build import build_empty
from bkd.surgery.plan import PLAN_FILE, RemovalPlan, load_plans
from bkd.surgery.recognise import recognise
from bkd.surgery.sites import check_pairs
from bkd.surgery.unet import plan_removal
from bkd.terms import PredictionType

GUIDANCE_DIM = 256
"""Length of an embedded guidance scale; what LCM's released students take."""

NOT_FOR_SAMPLE = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""Schedulers of diffusers that do not implement prediction_type `sample`."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage, with everything about it decided that its weights do not decide.

    Attributes:
        number: Of the stage, from 0.
        seed: Of its data order and every random draw.
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
        seed, kind = stage_seed(recipe.seed, number), student_kind(stage, teacher)
        planned.append(PlannedStage(number, seed, stage, recipe.train_of(number), teacher, plan, kind))
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
    _require_teachable(teacher, method.name)
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
    if isinstance(method, Guided) and (method.prediction_type or method.loss.weighting == "truncated-snr"):
        timesteps = torch.arange(teacher.schedule.num_train_timesteps)
        _require_prediction(teacher, method.prediction_type, timesteps, "loss.weighting=none")
        _require_scheduler(teacher, method.prediction_type)
    if isinstance(method, Halving):
        _require_halving(teacher, method)
    if stage.student.path is not None:
        _require_prediction_type(_located(stage.student.path), teacher.schedule, stage)
        _require_same_guidance(_located(stage.student.path), teacher, stage)
        _require_same_steps(_located(stage.student.path), teacher, stage)
    if stage.lora is not None:
        require_adaptable(build_empty(dict(teacher.unet), plan), stage.lora)
    return plan


def _require_halving(teacher: ModelFacts, method: Halving) -> None:
    """Refuse what the formulas, or the grids, do not hold for."""
    before = method.num_inference_steps[0]
    known, timesteps = teacher.few_steps, teacher.schedule.num_train_timesteps
    key = "stages.0.method.num_inference_steps"
    if known is not None and known != FewSteps(before, direction=method.direction):
        raise ModelError(
            "this teacher takes other steps than those that are to be halved",
            where=teacher.name,
            got=f"{known}; to be halved: {FewSteps(before, direction=method.direction)}",
            remedy=f"method.num_inference_steps=[{known.num_inference_steps}, M]"
            if (known.sampler, known.direction) == ("deterministic", method.direction)
            else "halve the model that it was made of",
        )
    if not nests(timesteps, before):
        fitting = [n for n in range(2, timesteps // 2 + 1, 2) if nests(timesteps, n)]
        nearest = sorted(fitting, key=lambda n: abs(n - before))[:4]
        raise RecipeError(
            "the steps of this grid do not lie in pairs on the grid of half as many",
            where=key,
            got=f"{before} steps of a model with {timesteps:,} timesteps",
            allowed=f"powers of two and even divisors of {timesteps:,} among others; next to it: "
            + ", ".join(map(str, sorted(nearest))),
        )
    require_ode(teacher.scheduler, teacher.name)
    _require_prediction(teacher, method.prediction_type, torch.tensor([timesteps - 1]), "a teacher of v_prediction")
    if method.direction == "inversion" and "sample" in (teacher.schedule.prediction_type, method.prediction_type):
        raise RecipeError(
            "of an image without noise, which an inversion begins with, sample says nothing",
            where="stages.0.method.prediction_type",
            got=f"a teacher of {teacher.schedule.prediction_type}",
            allowed="epsilon, v_prediction",
        )


def _require_prediction(
    teacher: ModelFacts, wished: PredictionType | None, timesteps: torch.Tensor, remedy: str
) -> None:
    """Some predictions do not say what others do, and not every scheduler knows all of them."""
    schedule = teacher.schedule
    wanted = wished or schedule.prediction_type
    factors = (*schedule.conversion(timesteps, wanted), *schedule.conversion(timesteps, "v_prediction"))
    weights = schedule.predicting(wanted).truncated_snr_weight(timesteps)
    if not all(found.isfinite().all() for found in (*factors, weights)):
        raise RecipeError(
            f"at this teacher's noisiest timestep {wanted} does not say what the clean latents are",
            where="stages.0.method.prediction_type",
            got=f"{wanted} from {schedule.prediction_type}, of a schedule without signal at its end",
            allowed=f"v_prediction from v_prediction, or the teacher's own with {remedy}",
        )


def _require_scheduler(teacher: ModelFacts, wished: PredictionType | None) -> None:
    """Of a student that is drawn with as its teacher is."""
    wanted, scheduler = wished or teacher.schedule.prediction_type, teacher.scheduler.get("_class_name")
    if wanted == "sample" and scheduler in NOT_FOR_SAMPLE:
        raise RecipeError(
            "the teacher's scheduler, which the student is drawn with, does not take this prediction",
            where="stages.0.method.prediction_type",
            got=f"{wanted}; {scheduler}",
            allowed="epsilon, v_prediction",
        )


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


def _require_teachable(teacher: ModelFacts, method: str) -> None:
    """Of a teacher that draws guided in one pass, guidance cannot be taken out, and data would teach it without."""
    known = teacher.guidance
    if teacher.few_steps is not None and method != "halving":
        raise ModelError(
            "this model knows a few noise levels only",
            where=teacher.name,
            got=f"{teacher.few_steps}; method {method}",
            remedy="prune, guide and fine-tune before steps are halved",
        )
    if known is not None and method != "halving" and (known.takes_scale or method in ("guided", "finetune")):
        raise ModelError(
            "this model draws guided in one pass already",
            where=teacher.name,
            got=f"method {method}",
            remedy="distil from the model it was made of, and fine-tune before guidance is distilled",
        )
    if known is not None and method == "halving" and known.takes_scale and math.isinf(known.high):
        raise ModelError(
            "this model is told a guidance scale, and does not say which it knows",
            where=teacher.name,
            remedy=f'add {{"guidance": {{"low": 1.0, "high": 14.0, "takes_scale": true}}}} to its {PLAN_FILE}',
        )


def _plan_student(teacher: ModelFacts, student: Student) -> RemovalPlan:
    if student.path is None:
        return plan_removal(teacher.unet, str(student))
    folder = _located(student.path)
    if (folder / PLAN_FILE).is_file() and teacher.folder is not None:
        plan, digest = load_plans(folder)[0]
        if digest == model_digest(teacher.folder):
            return plan
    try:
        return recognise(teacher.unet, unet_config(folder))
    except BkdError as error:
        raise _of_student_path(student.path, error) from error


def _located(path: str) -> Path:
    """The folder of `student.path`."""
    try:
        return locate(path)
    except BkdError as error:
        raise _of_student_path(path, error) from error


def _of_student_path(path: str, error: BkdError) -> RecipeError:
    """The same error with the name of the key."""
    where = f"stages.0.student.path={path}"
    return RecipeError(error.what, where=where, got=error.got, allowed=error.allowed, remedy=error.remedy)


def _require_prediction_type(student: Path, teacher: NoiseSchedule, stage: Stage) -> None:
    ours, theirs = load_noise_schedule(student).prediction_type, teacher.prediction_type
    wished = stage.method.prediction_type if isinstance(stage.method, (Guided, Halving)) else None
    remedies = {
        "guided": f"method.prediction_type={ours}",
        "halving": f"method.prediction_type={ours}",
        "kd": f"a student that predicts {theirs}",
        "finetune": f"teacher.id={stage.student.path} in place of student.path",
    }
    if ours != (wished or theirs):
        raise RecipeError(
            "this student predicts something else than it would be trained for",
            where="stages.0.student.path",
            got=ours,
            allowed=wished or theirs,
            remedy=remedies[stage.method.name],
        )


def _require_same_guidance(student: Path, teacher: ModelFacts, stage: Stage) -> None:
    """What has learnt to draw guided in one pass unlearns it from a teacher that does not, and from data."""
    known = one_pass_guidance(student)
    if known is not None and stage.method.name != "guided" and known != teacher.guidance:
        raise RecipeError(
            "this student draws guided in one pass already, and would unlearn it",
            where="stages.0.student.path",
            got=f"guidance_scale {known}; method {stage.method.name}",
            allowed="method guided",
            remedy="train it further before guidance is distilled, or with method.name=guided",
        )


def _require_same_steps(student: Path, teacher: ModelFacts, stage: Stage) -> None:
    """What knows a few noise levels was trained at those alone, and one way."""
    known, method = few_steps(student), stage.method
    fitting = (teacher.few_steps, method.few_steps) if isinstance(method, Halving) else ()
    if known is not None and known not in fitting:
        raise RecipeError(
            "this student knows a few noise levels only, and other ones than it would be trained at",
            where="stages.0.student.path",
            got=f"{known}; method {method.name}",
            allowed="a student that takes as many steps as one likes"
            + "".join(f", or {few}" for few in fitting if few is not None),
            remedy="leave student.path out, or name the model that this student was halved from",
        )
