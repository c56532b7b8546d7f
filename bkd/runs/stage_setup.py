"""From a planned stage to what trains: its network, and the method with both networks in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bkd.environment import shards_networks
from bkd.lora.adapters import add_adapters
from bkd.methods.base import Diffusion, Method
from bkd.methods.captions import caption_encoder
from bkd.methods.finetune import Finetuning
from bkd.methods.guided import GuidedDistillation
from bkd.methods.halving import HalvingDistillation
from bkd.methods.kd import KnowledgeDistillation
from bkd.models.load import load_unet, place_encoders, training_dtype, use_channels_last
from bkd.models.locate import locate
from bkd.recipe.stages import WHOLE, Finetune, Guided, Halving, Kd, Stage
from bkd.runs.stage_plan import GUIDANCE_DIM, PlannedStage
from bkd.surgery.build import build_student
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.unet import plan_removal


def build_method(planned: PlannedStage, pipe: StableDiffusionPipeline, device: torch.device) -> Method:
    """What a stage learns, with its networks on the device.

    Args:
        planned: The stage.
        pipe: Its teacher, in float32 on the CPU. Its text encoders and, where it teaches or its weights are shared, its
            UNet take the dtype of the forward passes. What is fine-tuned without adapters is its UNet itself.
        device: To train on.
    """
    student, _ = place_networks(planned, pipe, device)
    return assemble(planned, pipe, student)


def place_networks(planned: PlannedStage, pipe: Any, device: torch.device) -> tuple[UNet2DConditionModel, bool]:
    """The stage's student on the device, and whether the teacher's UNet is there, too; arguments of `build_method`."""
    train, stage = planned.train, planned.stage
    dtype, shards = training_dtype(train.mixed_precision), shards_networks(train.parallel)
    student = start_student(pipe.unet, planned.plan, stage, planned.seed, can_share=not shards)
    place_encoders(pipe, dtype, device)
    needs_teacher = _shares_base(stage) or not isinstance(stage.method, Finetune)
    if needs_teacher:
        use_channels_last(pipe.unet.to(device, dtype), train.channels_last, dtype, device)
    if stage.lora is not None and not _shares_base(stage) and not shards:
        _cast_frozen(student, dtype)  # as shared weights are; shards must all have one dtype
    use_channels_last(student.to(device), train.channels_last, dtype, device)
    return student, needs_teacher


def assemble(planned: PlannedStage, pipe: Any, student: UNet2DConditionModel) -> Method:
    """The method of a stage, of networks in their places.

    Args:
        planned: The stage.
        pipe: Its teacher.
        student: What trains.
    """
    settings, plan = planned.stage.method, planned.plan
    diffusion = Diffusion(
        schedule=planned.teacher.schedule,
        scaling_factor=pipe.vae.config.scaling_factor,
        captions=caption_encoder(pipe),
        prompt_dropout=planned.train.prompt_dropout,
        min_snr_gamma=settings.min_snr_gamma,
        random_conditioning=isinstance(settings, Kd) and settings.random_conditioning,
    )
    if isinstance(settings, Finetune):
        return Finetuning(student=student, diffusion=diffusion)
    if isinstance(settings, Halving):
        guidance = planned.teacher.guidance
        return HalvingDistillation(
            teacher=pipe.unet, student=student, diffusion=diffusion, settings=settings, guidance=guidance
        )
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


@torch.no_grad()
def with_trained(student: UNet2DConditionModel, trained: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """A network in which tensors are replaced by those that have trained since.

    Args:
        student: As `start_student` returned it; changed in place.
        trained: By the name of the parameter.
    """
    for name, tensor in trained.items():
        student.get_parameter(name).copy_(tensor)
    return student


def _shares_base(stage: Stage) -> bool:
    return stage.lora is not None and stage.lora.share_base


def _cast_frozen(student: UNet2DConditionModel, dtype: torch.dtype) -> None:
    for parameter in student.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
