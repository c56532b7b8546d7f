"""From a stage's words to what trains: the student's plan, its network, and the method with both networks in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from bkd.environment import shards_networks
from bkd.errors import BkdError, ModelError, RecipeError
from bkd.guidance import OnePassGuidance, StudentKind, one_pass_guidance
from bkd.locate import locate
from bkd.lora.adapters import add_adapters, require_adaptable
from bkd.methods.base import Diffusion, Method
from bkd.methods.captions import caption_encoder
from bkd.methods.finetune import Finetuning
from bkd.methods.guided import GuidedDistillation
from bkd.methods.kd import KnowledgeDistillation
from bkd.model_folder import model_digest, read_json, unet_config
from bkd.models import load_noise_schedule, load_unet, place_encoders, training_dtype, use_channels_last
from bkd.prediction_type import PredictionType
from bkd.recipe.schema import Recipe
from bkd.recipe.stages import WHOLE, Finetune, Guided, Kd, Stage, Student
from bkd.surgery.build import build_empty, build_student
from bkd.surgery.plan import PLAN_FILE, RemovalPlan, load_plans
from bkd.surgery.recognise import recognise
from bkd.surgery.unet import plan_removal

GUIDANCE_DIM = 256
"""Length of an embedded guidance scale; what LCM's released students take."""

NOT_FOR_SAMPLE = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""Schedulers of diffusers that do not implement prediction_type `sample`."""


def plan_stage(teacher: Path, stage: Stage) -> RemovalPlan:
    """How a stage's student comes from the teacher.

    Args:
        teacher: Pipeline folder.
        stage: Of the recipe.

    Raises:
        BkdError: If the student, the method, the adapters and the teacher do not fit together.
    """
    _require_teachable(teacher, stage.method.name)
    config, method = unet_config(teacher), stage.method
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
        _require_prediction(teacher, method)
    if stage.student.path is not None:
        _require_prediction_type(_located(stage.student.path), teacher, stage)
        _require_same_guidance(_located(stage.student.path), teacher, stage)
    if stage.lora is not None:
        require_adaptable(build_empty(config, plan), stage.lora)
    return plan


def _require_prediction(teacher: Path, method: Guided) -> None:
    """Some predictions do not say what others do, and not every scheduler knows all of them."""
    schedule = load_noise_schedule(teacher)
    wanted = method.prediction_type or schedule.prediction_type
    timesteps = torch.arange(schedule.num_train_timesteps)
    weights = schedule.predicting(wanted).truncated_snr_weight(timesteps)
    if not all(factors.isfinite().all() for factors in (*schedule.conversion(timesteps, wanted), weights)):
        raise RecipeError(
            f"at this teacher's noisiest timestep {wanted} does not say what the clean latents are",
            where="stages.0.method.prediction_type",
            got=f"{wanted} from {schedule.prediction_type}, of a schedule without signal at its end",
            allowed="v_prediction from v_prediction, or the teacher's own with loss.weighting=none",
        )
    scheduler = read_json(teacher / "scheduler" / "scheduler_config.json").get("_class_name")
    if wanted == "sample" and scheduler in NOT_FOR_SAMPLE:
        raise RecipeError(
            "the teacher's scheduler, which the student is drawn with, does not take this prediction",
            where="stages.0.method.prediction_type",
            got=f"{wanted}; {scheduler}",
            allowed="epsilon, v_prediction",
        )


def student_kind(stage: Stage, teacher: Path) -> StudentKind:
    """What a stage's student will be used like: what the method makes of it, or what its teacher is."""
    method = stage.method
    if isinstance(method, Guided):
        return StudentKind(OnePassGuidance(*method.scales, method.takes_scale), _other_type(method, teacher))
    return StudentKind(one_pass_guidance(teacher))


def _other_type(method: Guided, teacher: Path) -> PredictionType | None:
    theirs = load_noise_schedule(teacher).prediction_type
    return method.prediction_type if method.prediction_type != theirs else None


def _require_teachable(teacher: Path, method: str) -> None:
    """Of a teacher that draws guided in one pass, guidance cannot be taken out, and data would teach it without."""
    known = one_pass_guidance(teacher)
    if known is not None and (known.takes_scale or method in ("guided", "finetune")):
        raise ModelError(
            "this model draws guided in one pass already",
            where=teacher,
            got=f"method {method}",
            remedy="distil from the model it was made of, and fine-tune before guidance is distilled",
        )


def _plan_student(teacher: Path, student: Student) -> RemovalPlan:
    if student.path is None:
        return plan_removal(unet_config(teacher), str(student))
    folder = _located(student.path)
    if (folder / PLAN_FILE).is_file():
        plan, digest = load_plans(folder)[0]
        if digest == model_digest(teacher):
            return plan
    try:
        return recognise(unet_config(teacher), unet_config(folder))
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


def _require_prediction_type(student: Path, teacher: Path, stage: Stage) -> None:
    ours, theirs = (load_noise_schedule(folder).prediction_type for folder in (student, teacher))
    wished = stage.method.prediction_type if isinstance(stage.method, Guided) else None
    remedies = {
        "guided": f"method.prediction_type={ours}",
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


def _require_same_guidance(student: Path, teacher: Path, stage: Stage) -> None:
    """What has learnt to draw guided in one pass unlearns it from a teacher that does not, and from data."""
    known = one_pass_guidance(student)
    if known is not None and stage.method.name != "guided" and known != one_pass_guidance(teacher):
        raise RecipeError(
            "this student draws guided in one pass already, and would unlearn it",
            where="stages.0.student.path",
            got=f"guidance_scale {known}; method {stage.method.name}",
            allowed="method guided",
            remedy="train it further before guidance is distilled, or with method.name=guided",
        )


def build_method(
    recipe: Recipe, number: int, plan: RemovalPlan, pipe: StableDiffusionPipeline, teacher: Path, device: torch.device
) -> Method:
    """What a stage learns, with its networks on the device.

    Args:
        recipe: As validated.
        number: Of the stage.
        plan: How the student comes from the teacher.
        pipe: The teacher, in float32 on the CPU. Its text encoders and, where it teaches or its weights are shared, its
            UNet take the dtype of the forward passes. What is fine-tuned without adapters is its UNet itself.
        teacher: Its folder.
        device: To train on.
    """
    student, _ = place_networks(recipe, number, plan, pipe, device)
    return assemble(recipe, number, plan, pipe, student, teacher)


def place_networks(
    recipe: Recipe, number: int, plan: RemovalPlan, pipe: Any, device: torch.device
) -> tuple[UNet2DConditionModel, bool]:
    """The stage's student on the device, and whether the teacher's UNet is there, too; arguments of `build_method`."""
    train, stage = recipe.train, recipe.stages[number]
    dtype, shards = training_dtype(train.mixed_precision), shards_networks(train.parallel)
    student = start_student(pipe.unet, plan, stage, recipe.seed, can_share=not shards)
    place_encoders(pipe, dtype, device)
    needs_teacher = _shares_base(stage) or not isinstance(stage.method, Finetune)
    if needs_teacher:
        use_channels_last(pipe.unet.to(device, dtype), train.channels_last, dtype, device)
    if stage.lora is not None and not _shares_base(stage) and not shards:
        _cast_frozen(student, dtype)  # as shared weights are; shards must all have one dtype
    use_channels_last(student.to(device), train.channels_last, dtype, device)
    return student, needs_teacher


def assemble(
    recipe: Recipe, number: int, plan: RemovalPlan, pipe: Any, student: UNet2DConditionModel, teacher: Path
) -> Method:
    """The method of a stage, of networks in their places; arguments of `build_method`."""
    settings = recipe.stages[number].method
    diffusion = Diffusion(
        schedule=load_noise_schedule(teacher),
        scaling_factor=pipe.vae.config.scaling_factor,
        captions=caption_encoder(pipe),
        prompt_dropout=recipe.train.prompt_dropout,
        min_snr_gamma=settings.min_snr_gamma,
        random_conditioning=isinstance(settings, Kd) and settings.random_conditioning,
    )
    if isinstance(settings, Finetune):
        return Finetuning(student=student, diffusion=diffusion)
    pairs = plan.feature_pairs[settings.sites]
    if isinstance(settings, Guided):
        return GuidedDistillation(
            teacher=pipe.unet, student=student, diffusion=diffusion, pairs=pairs, settings=settings
        )
    return KnowledgeDistillation(
        teacher=pipe.unet, student=student, diffusion=diffusion, pairs=pairs, loss=settings.loss
    )


def start_student(
    teacher: UNet2DConditionModel, plan: RemovalPlan, stage: Stage, seed: int, *, can_share: bool = True
) -> UNet2DConditionModel:
    """The network that a stage begins with, in float32 on the CPU.

    Args:
        teacher: Its UNet, in float32 on the CPU.
        plan: As `plan_stage` returned it.
        stage: Of the recipe.
        seed: Of adapters' initial values.
        can_share: Whether a network that is fine-tuned may be the teacher's in place of a copy.
    """
    if stage.student.path is not None:
        student = load_unet(locate(stage.student.path))
        if plan.added and not student.config.time_cond_proj_dim:
            student = build_student(student, plan_removal(student.config, WHOLE).with_guidance_input(GUIDANCE_DIM))
        student.register_to_config(sample_size=plan.overrides.get("sample_size", teacher.config.sample_size))
    elif stage.lora is None and isinstance(stage.method, Finetune) and can_share:
        student = build_student(teacher, plan, share_base=True).requires_grad_(True)
    else:
        student = build_student(teacher, plan, share_base=_shares_base(stage))
    if stage.lora is not None:
        add_adapters(student, stage.lora, seed=seed)
    return student


def _shares_base(stage: Stage) -> bool:
    return stage.lora is not None and stage.lora.share_base


def _cast_frozen(student: UNet2DConditionModel, dtype: torch.dtype) -> None:
    for parameter in student.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
