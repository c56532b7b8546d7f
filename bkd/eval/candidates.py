"""Which models an `eval` command means: a run stands for its teacher, its untrained student and its students."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from bkd.diffusion.few_steps import few_steps
from bkd.diffusion.guidance import pipeline_scale
from bkd.diffusion.scheduler_kinds import require_ode
from bkd.diffusion.schedulers import chosen_scheduler
from bkd.errors import ModelError
from bkd.eval.drawing import Drawing
from bkd.eval.pictures import with_unet
from bkd.models.folder import model_digest, scheduler_config
from bkd.models.load import load_pipeline
from bkd.models.locate import locate, locate_teacher
from bkd.runs.folder import RunFolder, require_finished
from bkd.surgery.build import build_student
from bkd.surgery.plan import load_plan


@dataclass(frozen=True)
class Named:
    """A model to be loaded: where it lies, and whether to prune it again to see it before training."""

    name: str
    folder: Path
    pruned_like: Path | None = None

    @cached_property
    def digest(self) -> str:
        """Of everything that the model is made of."""
        own = model_digest(self.folder)
        if self.pruned_like is None:
            return own
        return hashlib.sha256((own + load_plan(self.pruned_like).to_json()).encode()).hexdigest()

    def drawing(self, asked: Drawing) -> Drawing:
        """How it draws: as asked, but in as many steps, and with the scheduler, that it was trained for.

        Raises:
            ModelError: If it does not draw, or has not learnt that guidance scale, or does not draw with such noise or
                with such a scheduler.
        """
        pipeline_scale(self.folder, asked.guidance_scale, self.name)
        if (few := few_steps(self.folder)) is None:
            if asked.scheduler is not None:
                require_ode(scheduler_config(self.folder), self.name)
            return asked
        if few.sampler == "stochastic" and asked.rng == "bksdm":
            raise ModelError(
                "this student's sampler draws noise on the way: from one generator images would depend on each other",
                where=self.name,
                got="--rng bksdm",
                remedy="--rng per-image",
            )
        few.require(None, self.name)
        return replace(asked, num_inference_steps=few.num_inference_steps, scheduler=None)

    def pipeline_scale(self, asked: float) -> float:
        """The `guidance_scale` to call its pipeline with.

        Raises:
            ModelError: If it draws guided in one pass, and not at that scale.
        """
        return pipeline_scale(self.folder, asked, self.name)


def name_candidates(models: Sequence[str], teacher: str | None) -> list[Named]:
    """Resolve MODEL arguments; the teacher comes first and is the reference.

    Raises:
        ModelError: If a model does not exist, or a run's teacher is not the one that was named.
    """
    found = [Named("teacher", locate(teacher))] if teacher is not None else []
    runs = [RunFolder(Path(model)) for model in models]
    for run in runs:
        if run.facts_file.is_file():
            require_finished(run)
    folders = [locate(model) for model in models]
    given = {folder.resolve() for folder in folders}
    for run, folder, label in zip(runs, folders, _labels(models), strict=True):
        if not run.facts_file.is_file():
            found.append(Named(label, folder))
            continue
        original = _teacher_of(run, teacher)
        known = [named for named in found if named.folder == original and named.pruned_like is None]
        if not known:
            origin = run.recipe().origin
            found.append(Named(f"{origin} of {label}" if found else origin, original))
        found += [*_untrained(f"{label} untrained", run, original), *_earlier(label, run, given), Named(label, folder)]
    names = [named.name for named in found]
    if len(set(names)) < len(found) or len(given) < len(models):
        raise ModelError("the same model is named twice", got=", ".join(names), remedy="name each model once")
    return found


def whole_candidates(models: Sequence[str], teacher: str | None) -> list[Named]:
    """Those of `name_candidates` that have a folder: no students as they were right after pruning.

    Raises:
        ModelError: As there.
    """
    return [named for named in name_candidates(models, teacher) if named.pruned_like is None]


def _untrained(name: str, run: RunFolder, teacher: Path) -> list[Named]:
    """What a run started from, where that is not its teacher itself."""
    recipe = run.recipe()
    if (start := recipe.stages[0].student.path) is not None:
        return [Named(name, locate(start))]
    first = run.students(recipe)[0]
    return [] if load_plan(first).changes_nothing else [Named(name, teacher, pruned_like=first)]


def _earlier(label: str, run: RunFolder, given: Container[Path]) -> list[Named]:
    """The students of all stages but the last, where they are not given themselves."""
    folders = run.students(run.recipe())[:-1]
    return [Named(f"{label}/{folder.parent.name}", folder) for folder in folders if folder.resolve() not in given]


def _labels(models: Sequence[str]) -> list[str]:
    """The last part of each path that says something, or all of it where two would be called the same."""
    paths = [Path(model) for model in models]
    names = [(path.parent.name if path.name == "student" else path.name) or str(path) for path in paths]
    return [name if names.count(name) == 1 else model for name, model in zip(names, models, strict=True)]


def _teacher_of(run: RunFolder, teacher: str | None) -> Path:
    own = run.recipe().teacher
    folder = locate(teacher) if teacher else locate_teacher(own)
    if model_digest(folder) != run.facts()["teacher_digest"]:
        raise ModelError("this run was distilled from another teacher", where=run.path, got=teacher or own.id)
    return folder


def load_candidate(
    named: Named, dtype: torch.dtype, device: torch.device, scheduler: str | None = None
) -> StableDiffusionPipeline:
    """Load a model, frozen.

    Args:
        named: Which.
        dtype: Of all parts.
        device: For all parts.
        scheduler: One of `bkd.diffusion.schedulers.CHOICES`, in place of its own.
    """
    pipe = load_pipeline(named.folder, dtype=dtype, device=device)
    if scheduler is not None:
        pipe.scheduler = chosen_scheduler(scheduler, pipe.scheduler)
    if named.pruned_like is not None:
        pipe = with_unet(pipe, build_student(pipe.unet, load_plan(named.pruned_like)))
    return pipe
