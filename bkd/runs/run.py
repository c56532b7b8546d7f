"""run_recipe: from a recipe to a run folder with a finished student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from bkd.data.caching import Caching, counted_images, ensure_latents, plan_caching, read_latents, wait_for_latents
from bkd.data.captions import CaptionSource
from bkd.data.filters import parse_filters
from bkd.data.latent_set import LatentSet
from bkd.data.order import share
from bkd.data.survey import DataWish
from bkd.environment import process_place
from bkd.errors import ModelError, RecipeError
from bkd.files import cache_folder
from bkd.lora.adapters import add_adapters, trained_tensors
from bkd.models.facts import model_facts
from bkd.models.folder import is_inpainting, model_digest, native_resolution, unet_config, vae_factor
from bkd.models.load import best_device, describe_device, load_noise_schedule, load_pipeline, release_memory
from bkd.models.locate import hub_commit, is_folder, locate_teacher
from bkd.progress import Progress, silent
from bkd.recipe.load import packaged_recipes
from bkd.recipe.schema import Recipe
from bkd.runs.folder import RunFolder, is_trained
from bkd.runs.stage import Job, Listener, StageRun, require_same_start
from bkd.runs.stage_plan import PlannedStage, plan_stages
from bkd.surgery.build import build_empty
from bkd.training.checkpoint import newest_shapes, require_fitting
from bkd.training.fit import require_enough
from bkd.training.parallel import Parallel, start_parallel
from bkd.training.stop import Interrupted, StopSignal
from bkd.training.tracking import require_trackers

MAX_ERROR = 2000
"""Characters of an error in run.json; compilers write books."""


def _cache(recipe: Recipe) -> Path:
    return Path(recipe.data.cache_dir).expanduser() if recipe.data.cache_dir else cache_folder()


@dataclass(frozen=True)
class Inputs:
    """What a recipe's names stand for.

    Attributes:
        teacher: Its pipeline folder.
        stages: What each of them makes.
        caching: The images and captions.
    """

    teacher: Path
    stages: tuple[PlannedStage, ...]
    caching: Caching


def check_teacher(recipe: Recipe) -> tuple[Path, tuple[PlannedStage, ...]]:
    """The teacher's folder and what each stage makes, with everything about them that can be wrong found.

    Raises:
        BkdError: If the teacher, a plan, its sites, the precision or the batch do not fit.
    """
    teacher = _locate_teacher(recipe)
    if recipe.train.mixed_precision == "fp16" and best_device().type == "cpu":
        raise RecipeError(
            "float16 training needs a GPU",
            where="train.mixed_precision",
            got="fp16 on a CPU",
            allowed="no, bf16",
            remedy="train.mixed_precision=no",
        )
    require_trackers(recipe.train.trackers)
    for train in map(recipe.train_of, range(len(recipe.stages))):
        share(train.batch, parts=train.grad_accum * process_place().world_size, part=0)
    return teacher, check_stages(recipe, teacher)


def _locate_teacher(recipe: Recipe) -> Path:
    """Its folder; of one that another recipe makes, errors say which."""
    wished = recipe.teacher
    try:
        return locate_teacher(wished)
    except ModelError as error:
        maker = next((name for name in packaged_recipes() if f"{wished.id}/".startswith(f"runs/{name}/")), None)
        raise ModelError(
            error.what,
            where=f"teacher.id={wished.id}" + (f": {error.where}" if error.where else ""),
            got=error.got,
            allowed=error.allowed,
            remedy=f"train it first: bkd train {maker}" if maker and not is_folder(wished.id) else error.remedy,
        ) from error


def check_stages(recipe: Recipe, teacher: Path) -> tuple[PlannedStage, ...]:
    """What each stage makes; only configurations are read.

    Args:
        recipe: As validated.
        teacher: Pipeline folder.

    Raises:
        BkdError: If the teacher, a plan, its sites or the resolution do not fit.
    """
    _check_trainable(recipe, teacher)
    side = training_resolution(recipe, teacher) // vae_factor(teacher)
    stages = plan_stages(recipe, model_facts(teacher, recipe.teacher.id), side)
    for planned in stages:
        if recipe.samples.prompts:
            planned.kind.pipeline_scale(recipe.samples.guidance_scale, "samples.guidance_scale")
    return stages


def training_resolution(recipe: Recipe, teacher: Path) -> int:
    """Side of the training images, in pixels: the teacher's own, but fine-tuning may choose another.

    Raises:
        RecipeError: If the networks cannot work at that resolution, or the teacher would teach at one not its own.
    """
    native = native_resolution(teacher)
    wanted = recipe.data.resolution or native
    if wanted != native and any(stage.method.name != "finetune" for stage in recipe.stages):
        raise RecipeError(
            "the recipe's resolution is not the teacher's",
            where="data.resolution",
            got=f"{wanted} px; the teacher {recipe.teacher.id} draws {native} px",
            allowed=str(native),
            remedy=f"data.resolution={native}, or leave it out, or choose another teacher",
        )
    unit = vae_factor(teacher) * 2 ** (len(unet_config(teacher)["down_block_types"]) - 1)
    if wanted % unit:
        raise RecipeError(
            "the UNet cannot halve this resolution as often as it has levels",
            where="data.resolution",
            got=wanted,
            allowed=f"multiples of {unit}",
            remedy=f"data.resolution={max(unit, round(wanted / unit) * unit)}",
        )
    return wanted


def check_inputs(recipe: Recipe, progress: Progress = silent) -> Inputs:
    """Find everything that can be wrong with a recipe's inputs before anything is written into the run folder.

    Args:
        recipe: As validated.
        progress: Called with (done, total) shards.

    Raises:
        BkdError: If the teacher, a plan, the shards or the resolution do not fit.
    """
    teacher, stages = check_teacher(recipe)
    wish = DataWish(
        CaptionSource.parse(recipe.data.caption),
        parse_filters(recipe.data.filters),
        _cache(recipe),
        recipe.data.remote_cache_gib,
    )
    caching = plan_caching(
        recipe.data.shards,
        teacher,
        wish,
        resolution=training_resolution(recipe, teacher),
        mirrored=recipe.data.mirror,
        progress=progress,
    )
    if caching.num_samples is not None:
        require_enough(caching.num_samples, max(each.train.batch for each in stages), recipe.data.shards)
    return Inputs(teacher, stages, caching)


def check_forced(path: Path, inputs: Inputs) -> None:
    """Of a run that is forced to go on: its weights must fit the students, before anything in its folder changes.

    Args:
        path: The run folder, which need not exist.
        inputs: As `check_inputs` returned them.

    Raises:
        TrainingError: If a checkpoint is of another student.
    """
    for planned in inputs.stages:
        folder, all_train = RunFolder(path).checkpoints(planned.number), planned.stage.method.reaches_all
        if theirs := newest_shapes(folder):
            student = build_empty(dict(planned.teacher.unet), planned.plan)
            if planned.stage.lora is not None:
                add_adapters(student, planned.stage.lora)
            parameters = trained_tensors(student).items()
            ours = {name: tuple(p.shape) for name, p in parameters if all_train or name in theirs}
            require_fitting(theirs, ours, folder)


def _check_trainable(recipe: Recipe, teacher: Path) -> None:
    """Refuse teachers that can be pruned, but not distilled on captioned images."""
    if is_inpainting(unet_config(teacher)):
        raise ModelError(
            "this teacher's students can be pruned, but not distilled",
            where=recipe.teacher.id,
            got="an inpainting UNet learns from masks, and the shards have none",
            allowed="text-to-image teachers: Stable Diffusion 1.x and 2.x, SDXL",
            remedy="bkd prune writes a student that other training code can take",
        )
    load_noise_schedule(teacher)  # refuses those that are not of this kind


def run_recipe(
    recipe: Recipe, run: RunFolder, inputs: Inputs, listener: Listener, stop: StopSignal, *, force: bool = False
) -> None:
    """Train every stage that is not finished yet and leave a student folder.

    Args:
        recipe: As validated.
        run: As `open_run` returned it.
        inputs: As `check_inputs` returned them.
        listener: Told what happens.
        stop: Requests to stop.
        force: Whether a run with another teacher or other data is continued.

    Raises:
        Interrupted: After a request to stop; the same call continues.
    """
    with _recorded_end(run, stop):
        if run.writes:
            run.require_same("teacher_digest", model_digest(inputs.teacher), force=force)
            run.record(teacher_commit=hub_commit(inputs.teacher))
        for stage in recipe.stages:
            require_same_start(run, stage, force=force)
        listener.phase(f"loading the {recipe.origin}")
        pipe = load_pipeline(inputs.teacher)
        _make_latents(inputs.caching, pipe, listener)
        data = read_latents(inputs.caching, window=recipe.data.shuffle_shards)
        run.require_same("data_fingerprint", data.fingerprint, force=force)
        parallel = start_parallel(recipe.train.parallel)
        _record_facts(recipe, run, data, parallel)
        job = Job(recipe, run, data, parallel, listener, stop, force)
        teacher = inputs.teacher
        for planned, folder in zip(inputs.stages, run.students(recipe), strict=True):
            if planned.number and stop.requested and parallel.kind == "alone":
                raise Interrupted  # the next stage would load for a while first
            if not parallel.agree(is_trained(folder, planned.train.max_steps)):
                StageRun(job, planned, teacher, pipe or load_pipeline(teacher)).train()
                run.record(replaced_samples=dict(data.replaced))
            if folder != run.student:
                run.forget_checkpoints(planned.number)
            pipe, teacher = None, folder  # the stage's student teaches the next
            release_memory(parallel.device)


@contextmanager
def _recorded_end(run: RunFolder, stop: StopSignal) -> Iterator[None]:
    """How a run ended, in its run.json."""
    run.record(status="running", error=None)
    try:
        yield
    except BaseException as error:
        asked = isinstance(error, (Interrupted, KeyboardInterrupt))
        stopped = asked or stop.requested  # the signal may have ended a compiler that this process waited for, too
        with suppress(OSError):  # a full disk must not hide what happened
            run.record(status="stopped" if stopped else "failed", error=None if stopped else str(error)[:MAX_ERROR])
        if stopped and not asked:
            raise Interrupted from error
        raise
    run.record(status="done")


def _make_latents(caching: Caching, pipe: StableDiffusionPipeline, listener: Listener) -> None:
    """Encode this process's share of the images, and wait for the others'."""

    def encoding() -> StableDiffusionPipeline:
        listener.phase(f"caching latents of {counted_images(caching.num_samples)}")
        pipe.vae.to(best_device())
        return pipe

    place = process_place()
    ensure_latents(caching, encoding, place=place, progress=listener.progress)
    pipe.vae.to("cpu")
    if place.world_size > 1:
        wait_for_latents(caching, listener.progress)


def _record_facts(recipe: Recipe, run: RunFolder, data: LatentSet, parallel: Parallel) -> None:
    run.record(
        device=describe_device(parallel.device),
        processes=parallel.place.world_size,
        parallel=parallel.kind,
        num_threads=torch.get_num_threads(),
        teacher=recipe.teacher.id,
        num_samples=len(data),
        left_out=dict(data.left_out),
        bad_samples=dict(data.bad),
        latents=asdict(data.description.settings),
    )
