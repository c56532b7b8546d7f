"""Whether a stage's teacher, its method and the student that it goes on with fit together."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from bkd.diffusion.few_steps import FewSteps, few_steps
from bkd.diffusion.grid import nests
from bkd.diffusion.guidance import one_pass_guidance
from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.diffusion.scheduler_kinds import NOT_FOR_SAMPLE, require_ode
from bkd.diffusion.terms import PredictionType
from bkd.errors import BkdError, ModelError, RecipeError
from bkd.models.facts import ModelFacts
from bkd.models.load import load_noise_schedule
from bkd.models.locate import locate
from bkd.recipe.stages import Guided, Halving, Method, Stage
from bkd.surgery.plan import PLAN_FILE


def require_fitting_method(teacher: ModelFacts, method: Method) -> None:
    """Refuse to teach what this teacher cannot, or what it should not.

    Args:
        teacher: What is known of it.
        method: Of the stage.

    Raises:
        BkdError: Naming the model or the key.
    """
    _require_teachable(teacher, method.name)
    if isinstance(method, Guided) and (method.prediction_type or method.loss.weighting == "truncated-snr"):
        timesteps = torch.arange(teacher.schedule.num_train_timesteps)
        allowed = "v_prediction from v_prediction, or the teacher's own with loss.weighting=none"
        _require_prediction(teacher, method.prediction_type, timesteps, allowed)
        _require_scheduler(teacher, method.prediction_type)
    if isinstance(method, Halving):
        _require_halving(teacher, method)


def require_fitting_start(teacher: ModelFacts, stage: Stage, student: Path) -> None:
    """Refuse to go on with a student that would unlearn something.

    Args:
        teacher: What is known of it.
        stage: Of the recipe.
        student: Its folder, of `student.path`.

    Raises:
        RecipeError: Naming the key.
    """
    _require_prediction_type(student, teacher.schedule, stage)
    _require_same_guidance(student, teacher, stage)
    _require_same_steps(student, teacher, stage)


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
            remedy=_how_to_halve(known, method),
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
    allowed = "v_prediction or sample, of teacher and student"
    _require_prediction(teacher, method.prediction_type, torch.tensor([timesteps - 1]), allowed)
    if method.direction == "inversion":
        _require_inversion(teacher.schedule.prediction_type, teacher.name)
        _require_inversion(method.prediction_type, "stages.0.method.prediction_type")


def _how_to_halve(known: FewSteps, method: Halving) -> str:
    if (known.sampler, known.direction) != ("deterministic", method.direction):
        return "halve the model that it was made of"
    if known.num_inference_steps % 2:
        return "leave the stage out: an odd number of steps cannot be halved"
    return f"method.num_inference_steps=[{known.num_inference_steps}, M]"


def _require_inversion(predicts: PredictionType | None, where: str) -> None:
    if predicts == "sample":
        raise RecipeError(
            "of an image without noise, which an inversion begins with, this prediction says nothing",
            where=where,
            got=predicts,
            allowed="epsilon, v_prediction",
        )


def _require_prediction(
    teacher: ModelFacts, wished: PredictionType | None, timesteps: torch.Tensor, allowed: str
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
            allowed=allowed,
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


def starting_folder(path: str) -> Path:
    """Of `student.path`.

    Raises:
        RecipeError: If there is no such model; names the key.
    """
    try:
        return locate(path)
    except BkdError as error:
        raise of_student_path(path, error) from error


def of_student_path(path: str, error: BkdError) -> RecipeError:
    """The same error with the name of the key."""
    where = f"stages.0.student.path={path}"
    return RecipeError(error.what, where=where, got=error.got, allowed=error.allowed, remedy=error.remedy)
