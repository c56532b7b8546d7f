"""What a recipe will take, before anything is spent: memory by part, steps, disk; and what looks wrong about it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from bkd.environment import shards_networks
from bkd.hooks import FeatureTap
from bkd.lora.adapters import add_adapters, trained_tensors
from bkd.models.load import autocast, training_dtype
from bkd.recipe.schema import Train
from bkd.recipe.stages import Finetune, Stage
from bkd.surgery.build import build_empty
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.probe import as_arguments, unet_inputs
from bkd.training.live_bytes import as_fake

MOMENT_BYTES = {"sgd": 0, "adamw": 8, "adamw-8bit": 2}
"""Of the optimizer's state, for each trained parameter."""
LARGE_UNET = 100_000_000
"""Parameters from which the published settings are a yardstick."""
PUBLISHED_LR_PER_IMAGE = (8e-8, 8e-7)
"""lr / batch: SSD-1B 1e-5 / 128, BK-SDM 5e-5 / 256, Segmind 1e-5 / 32, its portraits 1e-4 / 128."""
FAR = 10.0
RATIO_WORTH_A_WORD = 4.0


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each device. Their sum is an upper bound: gradients grow while activations are let go of. Not in it:
    text encoders, the allocator's slack and the kernels' workspace.

    Attributes:
        teacher: Weights, in the dtype of the forward passes.
        student: Weights that train, in float32, and frozen ones that are not the teacher's.
        gradients: Float32.
        optimizer: Its moments.
        average: The averaged weights.
        activations: What one pass keeps for its backward pass, teacher features included.
        parameters: Of the student.
        teacher_parameters: Of the teacher.
        trained: Parameters that train.
        num_shards: Processes that hold a part of the networks each; 1 where they are copies.
    """

    teacher: int
    student: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    parameters: int
    teacher_parameters: int
    trained: int
    num_shards: int

    def parts(self) -> dict[str, int]:
        """Name -> bytes."""
        names = ("teacher", "student", "gradients", "optimizer", "average", "activations")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on the disk."""
        return 4 * self.trained + (self.optimizer + self.average) * self.num_shards

    @property
    def student_file(self) -> int:
        """Bytes of the trained UNet on the disk."""
        return 4 * self.parameters


def training_memory(
    config: Mapping[str, Any], plan: RemovalPlan, train: Train, stage: Stage, world_size: int = 1
) -> TrainingMemory:
    """Count what a training step holds, exactly but for what the class leaves out.

    Args:
        config: The teacher's UNet configuration.
        plan: How the student comes from it.
        train: Settings.
        stage: What is learned, and through which adapters.
        world_size: Processes; shards are counted for one of them.
    """
    split = world_size if shards_networks(train.parallel) else 1
    empty_teacher, empty_student = build_empty(dict(config)), build_empty(dict(config), plan)
    teacher, student = empty_teacher.num_parameters(), empty_student.num_parameters()
    images = max(1, train.batch // (train.grad_accum * world_size))
    pairs = plan.feature_pairs[stage.method.compared] if stage.method.compared else ()
    size = training_dtype(train.mixed_precision).itemsize
    trained, frozen = student, 0
    shares = stage.lora is not None and stage.lora.share_base
    if stage.lora is not None:
        add_adapters(empty_student.to(training_dtype(train.mixed_precision)), stage.lora)
        trained = sum(parameter.numel() for parameter in trained_tensors(empty_student).values())
        frozen = empty_student.num_parameters() - trained
    kept = activation_bytes(empty_student, train, images)
    features = feature_bytes(empty_teacher, [pair.teacher for pair in pairs], train, images)
    return TrainingMemory(
        teacher=size * teacher // split if shares or not isinstance(stage.method, Finetune) else 0,
        student=(4 * trained + (0 if shares else (4 if shards_networks(train.parallel) else size) * frozen)) // split,
        gradients=4 * trained // split,
        optimizer=MOMENT_BYTES[train.optimizer] * trained // split,
        average=(4 * trained // split) if train.ema else 0,
        activations=kept + features,
        parameters=student,
        teacher_parameters=teacher,
        trained=trained,
        num_shards=split,
    )


def activation_bytes(student: UNet2DConditionModel, train: Train, images: int) -> int:
    """Bytes that a forward pass of `images` keeps for the backward pass, weights not counted.

    Args:
        student: The one that trains, adapters included, on the meta device; changed.
        train: For precision and gradient checkpointing.
        images: In one pass.
    """
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        # Fake tensors know shapes and dtypes only; on the CPU attention keeps what it keeps on a GPU, too.
        as_fake(student.train(), {})
        if train.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        inputs = _inputs(student, images)
        weights = {parameter.untyped_storage()._cdata for parameter in student.parameters()}
        dtype = training_dtype(train.mixed_precision)
        with saved_tensors_hooks(count, lambda tensor: tensor), autocast(dtype, torch.device("cpu")):
            output = student(**inputs).sample.float().square().mean()
        del output
    return sum(size for storage, size in kept.items() if storage not in weights)


def feature_bytes(teacher: UNet2DConditionModel, names: list[str], train: Train, images: int) -> int:
    """Bytes of the activations that a pass compares, in the teacher's dtype.

    Args:
        teacher: On the meta device; changed.
        names: Modules.
        train: For the precision.
        images: In one pass.
    """
    if not names:
        return 0
    with FakeTensorMode(), torch.no_grad():
        as_fake(teacher, {})
        inputs = _inputs(teacher, images)
        with FeatureTap(teacher, names) as tap:
            _, features = tap.run(lambda: teacher(**inputs))
        return sum(feature.numel() for feature in features) * training_dtype(train.mixed_precision).itemsize


def _inputs(unet: UNet2DConditionModel, images: int) -> dict[str, Any]:
    one = unet_inputs(unet.config, side=unet.config.sample_size, num_tokens=77, seed=None)
    many = {name: torch.zeros((images, *tensor.shape[1:]), dtype=tensor.dtype) for name, tensor in one.items()}
    return as_arguments(many)


def device_memory(device: torch.device) -> int:
    """Bytes that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def advice(train: Train, written: Train, memory: TrainingMemory, device: torch.device) -> list[str]:
    """What looks wrong about a training, a sentence for each; nothing of it is refused.

    Args:
        train: Settings.
        written: Those of the recipe's file, before overrides.
        memory: As estimated.
        device: To train on.
    """
    found = _schedule_advice(train)
    ratio = (train.lr / train.batch) / (written.lr / written.batch) if written.lr and train.lr else 1.0
    if max(ratio, 1 / ratio) >= RATIO_WORTH_A_WORD:
        linear, root = train.batch / written.batch, math.sqrt(train.batch / written.batch)
        found.append(
            f"the recipe's lr {written.lr:g} is for batches of {written.batch}; for {train.batch} that would be "
            f"{written.lr * root:.2g} (square root) to {written.lr * linear:.2g} (linear), not {train.lr:g}"
        )
    low, high = PUBLISHED_LR_PER_IMAGE
    if memory.parameters > LARGE_UNET and not low / FAR <= train.lr / train.batch <= high * FAR:
        found.append(
            f"lr / batch is {train.lr / train.batch:.1g}, far from every published setting ({low:g} to {high:g})"
        )
    if memory.total > (there := device_memory(device)):
        found.append(
            f"a step needs about {memory.total / 2**30:,.1f} GiB and the device has {there / 2**30:,.1f}: raise "
            "train.grad_accum (the result stays the same), then train.gradient_checkpointing=true, "
            "train.mixed_precision=bf16, train.optimizer=adamw-8bit"
        )
    return found


def _schedule_advice(train: Train) -> list[str]:
    found = []
    if train.warmup_steps >= train.max_steps:
        found.append(f"the warm-up of {train.warmup_steps:,} steps does not end within {train.max_steps:,}")
    if train.ema and (memory := 1 / (1 - train.ema) if train.ema < 1 else math.inf) * 3 > train.max_steps:
        found.append(
            f"train.ema={train.ema:g} averages over {memory:,.0f} steps of only {train.max_steps:,}: "
            "the student would remember its start"
        )
    return found
