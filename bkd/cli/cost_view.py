"""What a training will take, as tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bkd.cli.console import console, table

if TYPE_CHECKING:
    from bkd.bench.train import TrainingSpeed
    from bkd.recipe.schema import Recipe, Train
    from bkd.runs.run import Inputs
    from bkd.runs.stage_plan import PlannedStage
    from bkd.training.estimate import TrainingMemory


def show_plan(name: str, recipe: Recipe, inputs: Inputs) -> None:
    """Parameters, memory by part, steps and images, disk, and advice.

    Args:
        name: Of the recipe.
        recipe: As validated.
        inputs: As checked.
    """
    from bkd.recipe.stages import numbered

    console.print(f"data: {_counted_samples(inputs.caching.num_samples)}")
    counted = [estimated(planned) for planned in inputs.stages]
    largest = max(range(len(counted)), key=lambda number: counted[number].total)
    if len(counted) > 1:
        _show_stages(inputs.stages, counted)
        console.print(f"{numbered([largest])} takes the most:")
    _show_memory(inputs.stages[largest], counted[largest])
    if len(counted) == 1:
        _show_work(recipe.last_train, inputs.caching.num_samples)
    _show_disk(recipe, counted)
    show_advice(name, inputs.stages, counted)


def _show_stages(stages: Sequence[PlannedStage], counted: Sequence[TrainingMemory]) -> None:
    """A line for each of several."""
    rows = [
        (
            str(planned.number + 1),
            planned.stage.title,
            f"{memory.parameters:,}",
            f"{memory.trained:,}",
            gib(memory.total),
            f"{planned.train.max_steps:,}",
            f"{planned.train.batch} in {planned.train.grad_accum}",
            f"{planned.train.max_steps * planned.train.batch:,}",
        )
        for planned, memory in zip(stages, counted, strict=True)
    ]
    header = ("stage", "", "parameters", "trained", "GiB", "steps", "batch in passes", "images")
    console.print(table("", header, rows, left=(1,)))


def _show_memory(planned: PlannedStage, memory: TrainingMemory) -> None:
    size = f"{memory.parameters:,} of {memory.teacher_parameters:,} UNet parameters"
    adapters = f", and {memory.trained:,} that train" if planned.stage.lora is not None else ""
    console.print(f"{planned.stage.title}: {size}{adapters}")
    rows = [[part, gib(size)] for part, size in memory.parts().items()]
    console.print("memory of a step's tensors; `bkd bench train` measures it with all that comes on top:")
    console.print(table("", ["part", "GiB"], [*rows, ["together", gib(memory.total)]]))


def _show_disk(recipe: Recipe, counted: Sequence[TrainingMemory]) -> None:
    kept = recipe.train.keep_checkpoints + 1  # one more while the next is written; of one stage at a time
    largest, students = max(memory.checkpoint for memory in counted), sum(memory.student_file for memory in counted)
    many = len(counted) > 1
    console.print(
        f"disk: {kept} checkpoints of {gib(largest)} GiB, {f'{len(counted)} students' if many else 'student'} "
        f"{gib(students)} GiB + the teacher's other parts{' for each' if many else ''}"
    )


def _counted_samples(num_samples: int | None) -> str:
    return "remote shards, not counted" if num_samples is None else f"{num_samples:,} samples"


def _show_work(train: Train, num_samples: int | None) -> None:
    images = train.max_steps * train.batch
    rounds = "" if not num_samples else f", {images / num_samples:,.2f} epochs"
    console.print(
        f"{train.max_steps:,} steps of {train.batch} images: {train.max_steps * train.grad_accum:,} passes of "
        f"{train.batch // train.grad_accum}, {images:,} images{rounds}"
    )


def show_advice(name: str, stages: Sequence[PlannedStage], counted: Sequence[TrainingMemory]) -> None:
    """What looks wrong, a line each; where there are several stages, with those that it is true of.

    Args:
        name: Of the recipe.
        stages: Those to look at.
        counted: What each takes.
    """
    from bkd.models.load import best_device
    from bkd.recipe.load import written_train
    from bkd.recipe.stages import numbered
    from bkd.training.estimate import advice

    found: dict[str, list[int]] = {}
    for planned, memory in zip(stages, counted, strict=True):
        written = replace(written_train(name), **planned.stage.train.given())
        for line in advice(planned.train, written, memory, best_device()):
            found.setdefault(line, []).append(planned.number)
    for line, numbers in found.items():
        console.print(f"note: {numbered(numbers)}: {line}" if len(stages) > 1 else f"note: {line}")


def estimated(planned: PlannedStage) -> TrainingMemory:
    """What a stage takes, with as many processes as there are now."""
    from bkd.environment import process_place
    from bkd.training.estimate import training_memory

    world = process_place().world_size
    return training_memory(planned.teacher.unet, planned.plan, planned.train, planned.stage, world)


def show_training_speed(speed: TrainingSpeed, stages: Sequence[PlannedStage]) -> None:
    """Images a second, hours and memory.

    Args:
        speed: Of the first stage.
        stages: All of the recipe.
    """
    from bkd.models.load import best_device

    max_steps = stages[0].train.max_steps
    hours = speed.seconds * max_steps / 3600
    console.print(f"device: {speed.device}")
    console.print(f"{speed.images_per_second:,.2f} images/s, {speed.seconds:,.3f} s a step")
    whose = f"the {max_steps:,} steps of the first of {len(stages)} stages" if stages[1:] else f"{max_steps:,} steps"
    console.print(f"{hours:,.2f} hours for {whose}; reading data, checkpoints and pictures are not in it")
    whose = "on the device" if best_device().type == "cuda" else "of the process"
    console.print(f"peak memory {whose}: {gib(speed.peak_bytes)} GiB")


def gib(size: int) -> str:
    """`3.42`, or `0.008` where it is little."""
    return f"{size / 2**30:,.2f}" if size >= 2**27 else f"{size / 2**30:.3f}"
