"""Train and draw what docs/results.md says of few steps: students against samplers, guidance, and edits, by seed.

    python tools/results_steps_runs.py -o FOLDER [--jobs 2] [--seeds 3]

Trainings are those of `bkd train`, each in a process of one thread. Stop it at any time and start it anew.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import experiment
import numpy as np
import torch
from experiment import GUIDANCE_SCALE, prompts, require_same_settings

from bkd.data.shapes import COLORS, THEME_SHAPE, Scene, scenes
from bkd.data.shapes_checker import rendered
from bkd.diffusion.few_steps import few_steps
from bkd.edit import Editor
from bkd.edit_plan import Half
from bkd.eval.candidates import Named, load_candidate
from bkd.eval.drawing import Drawing
from bkd.eval.generate import draw
from bkd.files import replace_file
from bkd.models.folder import model_digest
from bkd.models.locate import locate

FIRST, COUNTS = 32, (16, 8, 4, 2, 1)
"""Steps that halvings begin with, and those that they lead to."""
STOCHASTIC = (16, 8, 4, 2)
HALVING_STEPS = 150
"""Optimizer steps of each halving."""
SAMPLERS, SAMPLER_STEPS = ("ddim", "ddpm", "dpm++"), (1, 2, 4, 8, 16)
FULL_STEPS = 25
"""Of the teacher that students are compared with; two UNet calls each."""
SCALES, FEW = (1.0, 2.0, GUIDANCE_SCALE, 5.0, 8.0), 4
"""Guidance scales, compared at few steps."""
NUM_SCENES, NUM_NOISES = 50, 8
"""For diversity: captions, and images of each."""
NUM_EDITS, EDIT_FIRST, EDIT_COUNTS = 200, 16, (8, 4, 2, 1)
EDIT_SCALES = (1.0, GUIDANCE_SCALE, 8.0)
TEACHER, TOLD, PRUNED, JOINT = "teacher", "told a scale", "sd-tiny, told a scale", "joint, two passes"
FIXED = f"always {GUIDANCE_SCALE:g}"
STUDENTS = (TOLD, FIXED, PRUNED, JOINT)
HALVED = f"num_inference_steps=[{FIRST}, 1]"
RECIPES = {
    TOLD: ("shapes/halving", (f"stages.1.method.{HALVED}",)),
    FIXED: ("shapes/halving", (f"stages.1.method.{HALVED}", f"stages.0.method.guidance_scale={GUIDANCE_SCALE}")),
    PRUNED: ("shapes/full-chain", (f"stages.2.method.{HALVED}",)),
    JOINT: (
        "shapes/halving",
        (f"stages=[{{method: {{name: halving, {HALVED.replace('=', ': ')}}}}}]", "train.prompt_dropout=0.1"),
    ),
}
"""What students are made by: a packaged recipe, and overrides."""


@dataclass(frozen=True)
class Training:
    """A `bkd train`: its run folder, the packaged recipe, and overrides."""

    folder: Path
    recipe: str
    overrides: tuple[str, ...]

    def student(self, steps: int | None) -> Path:
        """The folder of the student of so many steps; None: of the guided one, which takes any number."""
        found = [*sorted(self.folder.glob("stages/*-guided/student"))] if steps is None else []
        for folder in (*sorted(self.folder.glob("stages/*/student")), self.folder / "student"):
            if (few := few_steps(folder)) is not None and few.num_inference_steps == steps:
                found.append(folder)
        return found[0]

    def perform(self) -> float:
        """Train, or find it done; returns the seconds it took."""
        started, settings = time.monotonic(), ["samples.prompts=[]", "train.trackers=[]", "train.log_every=10"]
        command = [sys.executable, "-m", "bkd", "train", self.recipe, *self.overrides, *settings, "-o", self.folder]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=one_thread)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return time.monotonic() - started


def trainings(folder: Path, seed: int) -> dict[str, Training]:
    """Those of the teacher, by what they make."""
    common = (f"seed={seed}", f"train.max_steps={HALVING_STEPS}")
    return {
        name: Training(folder / "runs" / f"seed-{seed}" / name, recipe, (*overrides, *common))
        for name, (recipe, overrides) in RECIPES.items()
    }


def later_trainings(folder: Path, seed: int) -> dict[str, Training]:
    """Those of students that others have made."""
    told = trainings(folder, seed)[TOLD]
    common = (f"seed={seed}", f"train.max_steps={HALVING_STEPS}", "samples.prompts=[]")
    found = {}
    for steps in STOCHASTIC:
        method = f"{{name: halving, num_inference_steps: [{steps}, {steps}], sampler: stochastic}}"
        overrides = (f"teacher.id={told.student(steps)}", f"stages=[{{method: {method}}}]", *common)
        found[f"stochastic-{steps}"] = Training(
            folder / "runs" / f"seed-{seed}" / f"stochastic-{steps}", "shapes/halving-stochastic", overrides
        )
    inverse = f"stages.0.method.num_inference_steps=[{EDIT_FIRST}, 1]"
    overrides = (f"teacher.id={told.student(None)}", inverse, *common)
    found["encoder"] = Training(folder / "runs" / f"seed-{seed}" / "encoder", "shapes/encoder", overrides)
    tiny = trainings(folder, seed)[PRUNED].folder / "stages" / "00-kd" / "student"
    overrides = (f"teacher.id={tiny}", f"seed={seed}", "samples.prompts=[]")
    found["theme"] = Training(folder / "runs" / f"seed-{seed}" / "theme", "shapes/finetune", overrides)
    return found


@dataclass(frozen=True)
class Shot:
    """Images to be drawn: of which model, how, and of which prompts."""

    path: Path
    model: Path
    drawing: Drawing
    texts: tuple[str, ...]

    def perform(self) -> None:
        """Draw."""
        named = Named(str(self.model), self.model)
        drawing = named.drawing(self.drawing)
        pipe = load_candidate(named, torch.float32, torch.device("cpu"), drawing.scheduler)
        called = replace(drawing, guidance_scale=named.pipeline_scale(drawing.guidance_scale))
        images = torch.stack([image for _, image in draw(pipe, self.texts, range(len(self.texts)), called)])
        save(self.path, images=images.numpy())


def save(path: Path, **arrays: np.ndarray) -> None:
    with replace_file(path) as stream:
        np.savez_compressed(stream, **arrays)


def diverse() -> tuple[str, ...]:
    """Captions, each so many times: every image has noise of its own."""
    return tuple(scene.caption for scene in scenes("test", NUM_SCENES) for _ in range(NUM_NOISES))


def place(folder: Path, seed: int | None, *parts: object) -> Path:
    """Of a file of images; the teacher's belong to no seed."""
    where = folder / "drawn" / (TEACHER if seed is None else f"seed-{seed}")
    return where / ("_".join(map(str, parts)) + ".npz")


def teacher_shots(folder: Path) -> Iterator[Shot]:
    """Samplers, and scales."""
    teacher, texts = locate("shapes"), tuple(prompts())
    for sampler, steps in (*itertools.product(SAMPLERS, SAMPLER_STEPS), ("ddim", FULL_STEPS)):
        drawing = Drawing(steps, GUIDANCE_SCALE, scheduler=sampler)
        yield Shot(place(folder, None, sampler, steps), teacher, drawing, texts)
    for scale, (name, said) in itertools.product(SCALES, {"scale": texts, "diverse": diverse()}.items()):
        yield Shot(place(folder, None, name, f"{scale:g}"), teacher, Drawing(FULL_STEPS, scale, scheduler="ddim"), said)


def student_shots(folder: Path, seed: int) -> Iterator[Shot]:
    """Every student at its own steps, and at few steps with every scale."""
    made, later, texts = trainings(folder, seed), later_trainings(folder, seed), tuple(prompts())
    for name, training in made.items():
        for steps in COUNTS:
            drawing = Drawing(steps, GUIDANCE_SCALE)
            yield Shot(place(folder, seed, name, steps), training.student(steps), drawing, texts)
        if name != JOINT:
            yield Shot(place(folder, seed, name, FIRST), training.student(None), Drawing(FIRST, GUIDANCE_SCALE), texts)
    for steps in STOCHASTIC:
        model = later[f"stochastic-{steps}"].folder / "student"
        yield Shot(place(folder, seed, "stochastic", steps), model, Drawing(steps, GUIDANCE_SCALE), texts)
    few = {TOLD: made[TOLD].student(FEW), "stochastic": later[f"stochastic-{FEW}"].folder / "student"}
    for (name, model), scale in itertools.product(few.items(), SCALES):
        for kind, said in {"scale": texts, "diverse": diverse()}.items():
            yield Shot(place(folder, seed, name, kind, f"{scale:g}"), model, Drawing(FEW, scale), said)


def edits(kind: str) -> tuple[list[Scene], list[Scene]]:
    """Scenes, and the same with a change to their first object; where it lies exactly, no caption says.

    Args:
        kind: `color`: it has another one. `theme`: it is of the shape that only the fine-tuned student knows.
    """
    before, after = list(scenes("test", NUM_EDITS)), []
    for scene in before:
        first, *others = scene.objects
        color = random.Random(scene.caption).choice([name for name in COLORS if name != first.color])
        changed = replace(first, color=color) if kind == "color" else replace(first, shape=THEME_SHAPE)
        after.append(replace(scene, objects=(changed, *others)))
    return before, after


@dataclass(frozen=True)
class Edit:
    """Scenes encoded with one model and decoded with another."""

    path: Path
    encoder: Half
    decoder: Half
    kind: str = "color"

    def perform(self) -> None:
        """Edit."""
        drawn = drawn_edits(self.encoder, self.decoder, self.kind)
        save(self.path, **{name: tensor.numpy() for name, tensor in drawn.items()})


def drawn_edits(encoder: Half, decoder: Half, kind: str = "color") -> dict[str, torch.Tensor]:
    """`noise` of the scenes, (N, C, h, w); from it, uint8 (N, 3, H, W): the edited `images`, and the scenes `again`."""
    before, after = edits(kind)
    editor = Editor(encoder, decoder)
    noise = editor.encode(rendered(before), [scene.caption for scene in before])
    again, edited = (editor.decode(noise, [scene.caption for scene in said]) for said in (before, after))
    return {"images": edited, "again": again, "noise": noise}


def half(folder: Path, scale: float, steps: int = FULL_STEPS) -> Half:
    return Half(str(folder), folder, scale, steps)


def teacher_edits(folder: Path) -> Iterator[Edit]:
    """Without training: at equal and at full steps, with every pair of scales at full ones."""
    teacher = locate("shapes")
    for steps in (*EDIT_COUNTS, FULL_STEPS):
        halves = half(teacher, 1.0, steps), half(teacher, GUIDANCE_SCALE, steps)
        yield Edit(place(folder, None, "edit", steps), *halves)
    for first, second in itertools.product(EDIT_SCALES, EDIT_SCALES):
        name = place(folder, None, "edit", f"{first:g}", f"{second:g}")
        yield Edit(name, half(teacher, first), half(teacher, second))


def student_edits(folder: Path, seed: int) -> Iterator[Edit]:
    """Distilled encoder and decoder, at each number of steps, and with every pair of scales at few."""
    encoder, decoder = later_trainings(folder, seed)["encoder"], trainings(folder, seed)[TOLD]
    for steps in EDIT_COUNTS:
        halves = half(encoder.student(steps), 1.0), half(decoder.student(steps), GUIDANCE_SCALE)
        yield Edit(place(folder, seed, "edit", steps), *halves)
    for first, second in itertools.product(EDIT_SCALES, EDIT_SCALES):
        name = place(folder, seed, "edit", f"{first:g}", f"{second:g}")
        yield Edit(name, half(encoder.student(FEW), first), half(decoder.student(FEW), second))
    theme = half(later_trainings(folder, seed)["theme"].folder / "student", GUIDANCE_SCALE)
    yield Edit(place(folder, seed, "theme", FULL_STEPS), half(locate("shapes"), 1.0), theme, "theme")
    yield Edit(place(folder, seed, "theme", FEW), half(encoder.student(FEW), 1.0), theme, "theme")


def main() -> None:
    args = experiment.parsed_arguments(__doc__)
    experiment.start_worker()
    shared = {"first": FIRST, "halving_steps": HALVING_STEPS, "recipes": {k: list(v[1]) for k, v in RECIPES.items()}}
    require_same_settings(args.output, "settings", {**shared, "teacher": model_digest(locate("shapes"))})
    seeds = range(args.seeds)
    for made in (trainings, later_trainings):
        asked = {f"{name}, seed {seed}": t.perform for seed in seeds for name, t in made(args.output, seed).items()}
        experiment.perform_jobs(asked, ThreadPoolExecutor(args.jobs))
    work: list[Shot | Edit] = [*teacher_shots(args.output), *teacher_edits(args.output)]
    work += [shot for seed in seeds for shot in (*student_shots(args.output, seed), *student_edits(args.output, seed))]
    left = {str(one.path.relative_to(args.output)): one.perform for one in work if not one.path.is_file()}
    experiment.perform_jobs(left, experiment.worker_pool(args.jobs))


if __name__ == "__main__":
    main()
