"""Train and draw what `make results` compares: every student, method and seed, at a few numbers of steps.

    python tools/results_runs.py -o FOLDER [--jobs 2] [--seeds 3]

Each run is on the CPU and has one thread, so that others beside it change nothing. Runs that are done
are found again: stop it at any time and start it anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from torch import nn

from bkd.bench import Unsaved
from bkd.caching import ensure_latents, read_latents
from bkd.data.shapes import scenes
from bkd.data.shapes_checker import check
from bkd.eval.generate import Drawing, draw
from bkd.eval.pictures import with_unet
from bkd.files import replace_file, write_atomically
from bkd.locate import locate
from bkd.model_folder import model_digest
from bkd.models import load_pipeline
from bkd.recipe.load import load_recipe
from bkd.run import check_inputs
from bkd.stage_setup import build_method
from bkd.training.fit import Events, Fit
from bkd.training.journal import StepReport
from bkd.training.parallel import start_parallel
from bkd.training.stop import StopSignal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a device; workers inherit it
STUDENTS = ("sd-small", "bk-small", "sd-tiny")
POINTS = (10, 25, 50, 100, 200, 400)
"""Optimizer steps after which a student draws. The rate is constant: each is the end of a training of that length."""
SETTINGS = {
    "train.batch": 16,
    "train.lr": 1e-3,
    "train.lr_schedule": "constant",
    "train.warmup_steps": 10,
    "train.ema": 0.95,
    "train.samples_every": 5,
}
DRAWING = Drawing(num_inference_steps=8, guidance_scale=3.0)
NUM_PROMPTS = {"test": 250, "novel": 150}
TRIAL_PROMPTS = {"val": 400}
"""What weights are chosen by is not what methods are compared by."""
FEATURE_WEIGHTS = (0.1, 1.0, 10.0, 100.0)
TRIAL_SEED, TRIAL_STEPS = 1000, 50
"""Of the short trainings that choose each feature loss's weight; no other run has this seed."""


@dataclass(frozen=True)
class Arm:
    """A way to train a student.

    Attributes:
        task: Weight of the task loss.
        output_kd: Of the output loss.
        feature_kd: Of the feature loss.
        sites: Where features are compared.
        balanced: Whether each site's error is divided by the teacher's power there.
        random_conditioning: Whether captions are swapped.
        random_init: Whether the student starts from random weights.
    """

    task: float = 1.0
    output_kd: float = 1.0
    feature_kd: float = 0.0
    sites: str = "block"
    balanced: bool = False
    random_conditioning: bool = False
    random_init: bool = False

    def overrides(self) -> list[str]:
        """For `load_recipe`."""
        method = "stages.0.method"
        return [
            f"{method}.loss.task={self.task}",
            f"{method}.loss.output_kd={self.output_kd}",
            f"{method}.loss.feature_kd={self.feature_kd}",
            f"{method}.loss.balancing={'teacher-power' if self.balanced else 'none'}",
            f"{method}.sites={self.sites}",
            f"{method}.random_conditioning={str(self.random_conditioning).lower()}",
        ]


FEATURES = {
    "block": Arm(sites="block"),
    "block, balanced": Arm(sites="block", balanced=True),
    "self-attn": Arm(sites="self-attn"),
    "self-attn, balanced": Arm(sites="self-attn", balanced=True),
}
"""Kinds of feature loss, without their weights."""


@dataclass(frozen=True)
class Run:
    """One training and what is drawn along it.

    Attributes:
        folder: Where its drawings go.
        student: Preset.
        arm: How to train.
        seed: Of the training.
        points: Steps after which to draw.
        splits: Of the prompts, with how many of each.
    """

    folder: Path
    student: str
    arm: Arm = field(default_factory=Arm)
    seed: int = 0
    points: tuple[int, ...] = POINTS
    splits: Mapping[str, int] = field(default_factory=lambda: NUM_PROMPTS)

    def drawn(self, step: int) -> Path:
        return self.folder / f"step-{step:04d}.npz"

    @property
    def done(self) -> bool:
        return all(self.drawn(step).is_file() for step in self.points)


def prompts(splits: Mapping[str, int] = NUM_PROMPTS) -> list[str]:
    """Captions of scenes that no training has; of the comparisons, first unseen captions, then unseen combinations."""
    return [scene.caption for split, count in splits.items() for scene in scenes(split, count)]  # type: ignore[arg-type]


def start_worker() -> None:
    """One thread each: as many processes use the machine's cores better, and the result does not depend on how many."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def perform(run: Run) -> float:
    """Train, and draw at each point; returns the seconds it took."""
    started = time.monotonic()
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    student = [f"stages.0.student.blocks={run.student}", f"seed={run.seed}", f"train.max_steps={max(run.points) or 1}"]
    recipe = load_recipe("shapes/sd-small", [*settings, *student, *run.arm.overrides()])
    inputs = check_inputs(recipe)
    pipe = load_pipeline(inputs.teacher)
    ensure_latents(inputs.caching, lambda: pipe)
    parallel = start_parallel("auto")
    method = build_method(recipe, 0, inputs.plans[0], pipe, inputs.teacher, parallel.device)
    if run.arm.random_init:
        torch.manual_seed(run.seed)
        method.trainable.load_state_dict(type(pipe.unet).from_config(method.trainable.config).state_dict())
    losses: dict[str, list[float]] = {}

    def on_step(report: StepReport) -> None:
        for name, value in report.parts.items():
            losses.setdefault(name, []).append(value)

    def on_samples(step: int) -> None:
        if step in run.points:
            with fit.averaged() as unet:
                save_drawn(run.drawn(step), pipe, unet, losses, run.splits)

    if 0 in run.points:
        save_drawn(run.drawn(0), pipe, method.trainable, losses, run.splits)
    if max(run.points):
        fit = Fit(
            method,
            read_latents(inputs.caching, window=recipe.data.shuffle_shards),
            recipe.train,
            checkpoints=Unsaved(),
            parallel=parallel,
            seed=recipe.seed,
            events=Events(step=on_step, samples=on_samples),
        )
        fit.run(StopSignal())
    return time.monotonic() - started


def draw_teacher(path: Path) -> None:
    """What every student is compared with."""
    pipe = load_pipeline(locate("shapes"))
    save_drawn(path, pipe, pipe.unet, {}, NUM_PROMPTS)


def save_drawn(
    path: Path,
    pipe: StableDiffusionPipeline,
    unet: nn.Module,
    losses: Mapping[str, list[float]],
    splits: Mapping[str, int],
) -> None:
    """Write the images of all prompts, and the losses of the steps before."""
    texts = prompts(splits)
    images = torch.stack([image for _, image in draw(with_unet(pipe, unet.eval()), texts, range(len(texts)), DRAWING)])
    arrays = {name: np.array(values, np.float32) for name, values in losses.items()}
    with replace_file(path) as stream:
        np.savez_compressed(stream, images=images.numpy(), **arrays)


def trials(folder: Path) -> Iterator[Run]:
    """Short trainings of the smallest student with each feature loss and weight."""
    for (name, arm), weight in itertools.product(FEATURES.items(), FEATURE_WEIGHTS):
        where = folder / "trials" / name.replace(", ", "-") / f"{weight:g}"
        yield Run(where, "sd-tiny", replace(arm, feature_kd=weight), TRIAL_SEED, (TRIAL_STEPS,), TRIAL_PROMPTS)


def best_weights(folder: Path) -> dict[str, float]:
    """Of each feature loss, the weight whose trial drew most prompts right, the smallest of equals."""
    found: dict[str, dict[float, int]] = {name: {} for name in FEATURES}
    for run, (name, weight) in zip(trials(folder), itertools.product(FEATURES, FEATURE_WEIGHTS), strict=True):
        images = torch.from_numpy(np.load(run.drawn(TRIAL_STEPS))["images"])
        found[name][weight] = sum(verdict.correct for verdict in check(images, prompts(TRIAL_PROMPTS)))
    return {name: max(counts, key=lambda weight: (counts[weight], -weight)) for name, counts in found.items()}


def arms(weights: Mapping[str, float]) -> dict[str, Arm]:
    """Every way to train a student, by the name the page shows."""
    features = {f"+ feature KD ({name})": replace(arm, feature_kd=weights[name]) for name, arm in FEATURES.items()}
    best = features["+ feature KD (block)"]
    return {
        "task loss": Arm(output_kd=0.0),
        "+ output KD": Arm(),
        **features,
        "+ random conditioning": replace(best, random_conditioning=True),
        "random initialisation": replace(best, random_init=True),
    }


def comparisons(folder: Path, weights: Mapping[str, float], seeds: int) -> Iterator[Run]:
    """Every training of the experiment, seed by seed, and what each student draws untrained."""
    for student in STUDENTS:
        yield Run(folder / student / "pruned only", student, points=(0,))
    for seed, (name, arm), student in itertools.product(range(seeds), arms(weights).items(), STUDENTS):
        yield Run(folder / student / name / f"seed-{seed}", student, arm, seed)


def perform_all(runs: Iterable[Run], jobs: int) -> None:
    """Those that are not done, so many at a time, telling what is done and how long the rest may take."""
    left = [run for run in runs if not run.done]
    if not left:
        return
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        futures = {pool.submit(perform, run): run for run in left}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                eta = (time.monotonic() - started) / number * (len(left) - number)
                taken = f"{futures[future].folder}: {future.result():.0f} s"
                print(f"{number}/{len(left)} {taken}, about {eta / 60:.0f} min left", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def require_same_settings(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Record what the runs in a folder have in common, or stop where those in it had something else in common."""
    path, text = folder / f"{name}.json", json.dumps(settings, indent=2) + "\n"
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f"{path}: the runs there were made otherwise; choose another -o, or delete them")
    write_atomically(path, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    start_worker()
    shared = {"train": SETTINGS, "drawing": asdict(DRAWING), "prompts": NUM_PROMPTS, "trial_prompts": TRIAL_PROMPTS}
    require_same_settings(args.output, "settings", {**shared, "teacher": model_digest(locate("shapes"))})
    teacher = args.output / "teacher.npz"
    if not teacher.is_file():
        draw_teacher(teacher)
    perform_all(trials(args.output), args.jobs)
    weights = best_weights(args.output)
    require_same_settings(args.output, "weights", weights)
    perform_all(comparisons(args.output, weights, args.seeds), args.jobs)


if __name__ == "__main__":
    main()
