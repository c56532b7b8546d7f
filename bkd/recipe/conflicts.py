"""Values of a recipe that are fine by themselves and not together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bkd.data.captions import CaptionSource
from bkd.data.filters import parse_filter
from bkd.environment import shards_networks
from bkd.errors import DataError
from bkd.recipe.lora import Lora
from bkd.recipe.schema import Recipe, Train
from bkd.recipe.stages import Guided, Halving, Kd, Stage, Student


def conflicts(recipe: Recipe) -> list[str]:
    """All of them; each begins with the key's name.

    Args:
        recipe: Before its stages are expanded, so that they have the numbers that they were written with.
    """
    problems = _data_problems(recipe)
    if not recipe.stages:
        problems.append("stages: should have one stage or more")
    for number, stage in enumerate(recipe.stages):
        problems += [f"stages.{number}.{problem}" for problem in _stage_problems(stage, recipe, number)]
    if shards_networks(recipe.train.parallel):
        problems += _sharding_problems(recipe)
    for number, stage in enumerate(recipe.stages):
        where = f"stages.{number}.train" if {"batch", "grad_accum"} & stage.train.given().keys() else "train"
        problems += [f"{where}.{problem}" for problem in _passes_problems(recipe.train_of(number))]
    return problems


def _passes_problems(train: Train) -> Iterator[str]:
    if train.grad_accum > 0 and train.batch % train.grad_accum:
        yield f"batch: {train.batch} images cannot be split into {train.grad_accum} passes"


def _data_problems(recipe: Recipe) -> list[str]:
    """Captions and filters that cannot be read."""
    problems = []
    try:
        CaptionSource.parse(recipe.data.caption)
    except DataError as error:
        problems.append(f"data.caption: should be {error.allowed} (got {error.got})")
    for field, text in recipe.data.filters.items():
        try:
            parse_filter(field, text)
        except DataError as error:
            problems.append(f"data.filters.{field}: {error.what} (got {text!r}; allowed: {error.allowed})")
    return problems


def _sharding_problems(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.train.mixed_precision == "fp16":
        problems.append("train.mixed_precision: fp16 scales losses, which shards cannot do; use bf16")
    if recipe.train.optimizer == "adamw-8bit":
        problems.append("train.optimizer: adamw-8bit does not know shards; use adamw")
    return problems


def _stage_problems(stage: Stage, recipe: Recipe, number: int) -> Iterator[str]:
    """Of one stage; problems begin with the key's name in it."""
    method, student = stage.method, stage.student
    if student.path is not None and number:
        yield "student.path: a later stage goes on with the student of the stage before it"
    if student.path is not None and student.blocks is not None:
        yield "student: give either blocks or path"
    if not (method.reaches_all or method.compared):
        yield "method.loss: at least one weight should not be 0"
    if isinstance(method, Kd) and method.random_conditioning and recipe.train_of(number).batch < 2:
        yield "method.random_conditioning: a batch of 1 has no other captions"
    if isinstance(method, Guided):
        yield from _guidance_problems(method, recipe)
    if isinstance(method, Halving):
        yield from _halving_problems(method)
    if stage.lora is not None:
        yield from _lora_problems(stage.lora, student, recipe)


def _lora_problems(lora: Lora, student: Student, recipe: Recipe) -> Iterator[str]:
    for pattern, rank in lora.rank_pattern.items():
        if rank < 1:
            yield f"lora.rank_pattern: a rank is 1 or more (got {pattern}: {rank})"
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"lora.rank_pattern: {pattern!r} is no regular expression: {error}"
    if lora.share_base:
        if student.path is not None:
            yield (
                "lora.share_base: the weights of student.path are not the teacher's; set it to false, or give "
                "student.blocks"
            )
        if shards_networks(recipe.train.parallel):
            yield (
                "lora.share_base: shards of the networks would be no longer shared; use train.parallel=ddp, or "
                "lora.share_base=false"
            )


def _guidance_problems(method: Guided, recipe: Recipe) -> Iterator[str]:
    low, high = method.scales
    if method.takes_scale and low >= high:
        yield f"method.guidance_scale: a range goes up (got [{low:g}, {high:g}]); one scale is written as a number"
    elif low >= 1 and recipe.samples.prompts and not low <= recipe.samples.guidance_scale <= high:
        allowed = f"{low:g} to {high:g}" if method.takes_scale else f"{low:g}"
        yield (
            f"method.guidance_scale: samples.guidance_scale={recipe.samples.guidance_scale:g} is not one that the "
            f"student learns (allowed: {allowed})"
        )


def _halving_problems(method: Halving) -> Iterator[str]:
    teacher, student = method.num_inference_steps
    key = f"method.num_inference_steps: {teacher} step{'s' * (teacher != 1)}"
    if not method.halves:
        halved = [str(teacher >> k) for k in range(1, teacher.bit_length()) if teacher % (1 << k) == 0]
        allowed = f"[{teacher}, M] with M one of {', '.join(halved)}" if halved else "an even number to begin with"
        swapped = f"; did you mean [{student}, {teacher}]?" if student > teacher else ""
        yield f"{key} cannot be halved until {student} are left{swapped} (allowed: {allowed})"
    if method.sampler == "stochastic" and student % 2:
        yield f"{key.rpartition(':')[0]}: sampler stochastic goes two steps ahead, and {student} is odd"
    if method.direction == "inversion" and method.sampler == "stochastic":
        yield "method.sampler: an inversion is deterministic"
