"""What a training will take, as tables and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bkd.cli.console import console, table

if TYPE_CHECKING:
    from bkd.recipe.schema import Recipe
    from bkd.run import Inputs
    from bkd.surgery.plan import RemovalPlan
    from bkd.training.estimate import TrainingMemory


def show_plan(name: str, recipe: Recipe, inputs: Inputs) -> None:
    """Parameters, memory by part, steps and images, disk, and advice.

    Args:
        name: Of the recipe.
        recipe: As validated.
        inputs: As checked.
    """
    for number, (stage, plan) in enumerate(zip(recipe.stages, inputs.plans, strict=True)):
        memory = estimated(recipe, number, inputs.teacher, plan)
        size = f"{memory.parameters:,} of {memory.teacher_parameters:,} UNet parameters"
        adapters = f", and {memory.trained:,} that train" if stage.lora is not None else ""
        console.print(f"{stage.student.described}: {size}{adapters}")
        rows = [[part, gib(size)] for part, size in memory.parts().items()]
        console.print("memory of a step's tensors; `bkd bench train` measures it with all that comes on top:")
        console.print(table("", ["part", "GiB"], [*rows, ["together", gib(memory.total)]]))
        _show_work(recipe, inputs.caching.num_samples)
        kept = recipe.train.keep_checkpoints + 1  # one more while the next is written
        console.print(
            f"disk: {kept} checkpoints of {gib(memory.checkpoint)} GiB, student {gib(memory.student_file)} GiB + the "
            "teacher's other parts"
        )
        show_advice(name, recipe, memory)


def _show_work(recipe: Recipe, num_samples: int | None) -> None:
    train = recipe.train
    images = train.max_steps * train.batch
    epochs = "remote shards, not counted" if num_samples is None else f"{num_samples:,} samples"
    rounds = "" if not num_samples else f", {images / num_samples:,.2f} epochs"
    console.print(f"data: {epochs}")
    console.print(
        f"{train.max_steps:,} steps of {train.batch} images: {train.max_steps * train.grad_accum:,} passes of "
        f"{train.batch // train.grad_accum}, {images:,} images{rounds}"
    )


def show_advice(name: str, recipe: Recipe, memory: TrainingMemory) -> None:
    """What looks wrong, a line each."""
    from bkd.models import best_device
    from bkd.recipe.load import written_train
    from bkd.training.estimate import advice

    for line in advice(recipe.train, written_train(name), memory, best_device()):
        console.print(f"note: {line}")


def estimated(recipe: Recipe, number: int, teacher: Path, plan: RemovalPlan) -> TrainingMemory:
    """What a stage takes, with as many processes as there are now."""
    from bkd.environment import process_place
    from bkd.model_folder import unet_config
    from bkd.training.estimate import training_memory

    world = process_place().world_size
    return training_memory(unet_config(teacher), plan, recipe.train, recipe.stages[number], world)


def gib(size: int) -> str:
    """`3.42`, or `0.008` where it is little."""
    return f"{size / 2**30:,.2f}" if size >= 2**27 else f"{size / 2**30:.3f}"
