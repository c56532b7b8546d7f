"""run_recipe: from a recipe to a run folder with a finished student."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from bkd.caching import Caching, counted_images, ensure_latents, plan_caching, read_latents
from bkd.data.captions import CaptionSource
from bkd.data.filters import parse_filters
from bkd.data.latent_set import LatentSet
from bkd.data.survey import DataWish
from bkd.errors import ModelError, RecipeError
from bkd.eval.pictures import save_pairs
from bkd.files import cache_folder
from bkd.locate import locate
from bkd.methods.base import Diffusion
from bkd.methods.captions import caption_encoder
from bkd.methods.kd import KnowledgeDistillation
from bkd.model_folder import is_inpainting, model_digest, native_resolution, unet_config
from bkd.models import best_device, load_noise_schedule, load_pipeline
from bkd.progress import Progress, silent
from bkd.recipe.schema import Recipe, Stage
from bkd.run_folder import RunFolder
from bkd.student_folder import write_student
from bkd.surgery.build import build_student
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.unet import plan_removal
from bkd.tracking import MetricsLog
from bkd.train import Fit, StepReport


@dataclass(frozen=True)
class Listener:
    """Where a run reports to; only the command line prints.

    Attributes:
        phase: Called with one line when something new begins.
        progress: Called with (done, total) during a phase.
        step: Called after each optimizer step.
        resumed: Called with the number of steps done before, when a stage continues.
    """

    phase: Callable[[str], None] = lambda text: None
    progress: Progress = silent
    step: Callable[[StepReport], None] = lambda report: None
    resumed: Callable[[int], None] = lambda step: None


def _cache(recipe: Recipe) -> Path:
    return Path(recipe.data.cache_dir).expanduser() if recipe.data.cache_dir else cache_folder()


@dataclass(frozen=True)
class Inputs:
    """What a recipe's names stand for.

    Attributes:
        teacher: Its pipeline folder.
        plans: One for each stage.
        caching: The images and captions.
    """

    teacher: Path
    plans: tuple[RemovalPlan, ...]
    caching: Caching


def check_inputs(recipe: Recipe, progress: Progress = silent) -> Inputs:
    """Find everything that can be wrong with a recipe's inputs before anything is written into the run folder.

    Args:
        recipe: As validated.
        progress: Called with (done, total) shards.

    Raises:
        BkdError: If the teacher, a plan, the shards or the resolution do not fit.
    """
    teacher = locate(recipe.teacher.id, revision=recipe.teacher.revision, config=recipe.teacher.config)
    _check_trainable(recipe, teacher)
    resolution = native_resolution(teacher)
    if recipe.data.resolution not in (None, resolution):
        raise RecipeError(
            "the recipe's resolution is not the teacher's",
            where="data.resolution",
            got=f"{recipe.data.resolution} px; the teacher {recipe.teacher.id} draws {resolution} px",
            allowed=str(resolution),
            remedy=f"data.resolution={resolution}, or leave it out, or choose another teacher",
        )
    if recipe.train.mixed_precision == "fp16" and best_device().type == "cpu":
        raise RecipeError(
            "float16 training needs a GPU",
            where="train.mixed_precision",
            got="fp16 on a CPU",
            allowed="no, bf16",
            remedy="train.mixed_precision=no",
        )
    plans = tuple(plan_removal(unet_config(teacher), stage.student.blocks) for stage in recipe.stages)
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
        resolution=resolution,
        mirrored=recipe.data.mirror,
        progress=progress,
    )
    return Inputs(teacher, plans, caching)


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


def run_recipe(recipe: Recipe, run: RunFolder, inputs: Inputs, listener: Listener) -> None:
    """Train every stage that is not finished yet and leave a student folder.

    Args:
        recipe: As validated.
        run: As `open_run` returned it.
        inputs: As `check_inputs` returned them.
        listener: Told what happens.

    Raises:
        Interrupted: After a request to stop; the same call continues.
    """
    digest = model_digest(inputs.teacher)
    device = best_device()
    run.require_same("teacher_digest", digest)
    run.record(device=_describe(device), num_threads=torch.get_num_threads(), teacher=recipe.teacher.id)
    listener.phase("loading the teacher")
    pipe = load_pipeline(inputs.teacher, device=device)

    def ready() -> StableDiffusionPipeline:
        listener.phase(f"caching latents of {counted_images(inputs.caching.num_samples)}")
        return pipe

    ensure_latents(inputs.caching, ready, progress=listener.progress)
    data = read_latents(inputs.caching, window=recipe.data.shuffle_shards)
    run.require_same("data_fingerprint", data.fingerprint)
    run.record(
        num_samples=len(data),
        left_out=dict(data.left_out),
        bad_samples=dict(data.bad),
        latents=asdict(data.description.settings),
    )
    for number, (stage, plan) in enumerate(zip(recipe.stages, inputs.plans, strict=True)):
        _run_stage(recipe, run, number, stage, plan, pipe, data, inputs.teacher, listener)
        run.record(replaced_samples=dict(data.replaced))
    run.record(status="done")


def _run_stage(
    recipe: Recipe,
    run: RunFolder,
    number: int,
    stage: Stage,
    plan: RemovalPlan,
    pipe: StableDiffusionPipeline,
    data: LatentSet,
    teacher_folder: Path,
    listener: Listener,
) -> None:
    last = number == len(recipe.stages) - 1
    output = run.student if last else run.path / "stages" / f"{number:02d}-{stage.method.name}" / "student"
    if any(output.glob("unet/*.safetensors")):
        return
    student = build_student(pipe.unet, plan)
    method = KnowledgeDistillation(
        teacher=pipe.unet,
        student=student,
        diffusion=_diffusion(recipe, pipe, teacher_folder),
        pairs=plan.feature_pairs[stage.method.sites],
        weights=stage.method.loss,
    )
    log = MetricsLog(run.metrics)

    def on_resume(step: int) -> None:
        log.rewind(number, step)
        if step:
            listener.resumed(step)

    def on_step(report: StepReport) -> None:
        listener.step(report)
        if report.step % recipe.train.log_every == 0 or report.step in (1, report.max_steps):
            log.write(_metrics_line(number, report))
        if recipe.train.samples_every and report.step % recipe.train.samples_every == 0:
            with fit.averaged():
                _draw_samples(recipe, run, pipe, student, f"{number:02d}-step-{report.step:08d}")

    listener.phase(f"training {stage.student.blocks}")
    started = time.monotonic()
    fit = Fit(
        method,
        data,
        recipe.train,
        seed=recipe.seed,
        mirror=recipe.data.mirror,
        checkpoints=run.checkpoints(number),
        on_step=on_step,
        on_resume=on_resume,
    )
    try:
        fit.run()
    finally:
        _add_seconds(run, number, time.monotonic() - started)
    listener.phase("writing and reloading the student")
    facts = {"teacher": recipe.teacher.id, "teacher_digest": run.facts()["teacher_digest"]}
    write_student(output, teacher=teacher_folder, unet=student.to("cpu"), plan=plan, facts=facts)
    listener.phase("drawing validation pictures")
    _draw_samples(recipe, run, pipe, student.to(pipe.device), f"{number:02d}-final")


def _add_seconds(run: RunFolder, stage: int, seconds: float) -> None:
    """Training time of a stage, over all the calls it took."""
    name = f"stage_{stage:02d}_seconds"
    run.record(**{name: round(run.facts().get(name, 0.0) + seconds, 1)})


def _diffusion(recipe: Recipe, pipe: StableDiffusionPipeline, teacher_folder: Path) -> Diffusion:
    return Diffusion(
        schedule=load_noise_schedule(teacher_folder),
        scaling_factor=pipe.vae.config.scaling_factor,
        captions=caption_encoder(pipe),
        prompt_dropout=recipe.train.prompt_dropout,
    )


def _metrics_line(stage: int, report: StepReport) -> dict[str, float | int]:
    return {
        "stage": stage,
        "step": report.step,
        **report.parts,
        "total": report.total,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "seconds": round(report.seconds, 4),
    }


def _draw_samples(
    recipe: Recipe, run: RunFolder, pipe: StableDiffusionPipeline, student: UNet2DConditionModel, name: str
) -> None:
    """Teacher | student for each validation prompt, from the same noise."""
    if recipe.samples.prompts:
        save_pairs(run.samples / f"{name}.png", pipe, student, recipe.samples)


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
