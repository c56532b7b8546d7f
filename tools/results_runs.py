"""Train and draw what docs/results.md says of methods: every student, method and seed, at a few numbers of steps.

    python tools/results_runs.py -o FOLDER [--jobs 2] [--seeds 3]

Stop it at any time and start it anew; see tools/experiment.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import experiment
import numpy as np
import torch
from experiment import NUM_PROMPTS, POINTS, TRIAL_PROMPTS, TRIAL_SEED, TRIAL_STEPS, Training, prompts

from bkd.data.shapes_checker import check

STUDENTS = ("sd-small", "bk-small", "sd-tiny")
FEATURE_WEIGHTS = (0.1, 1.0, 10.0, 100.0)


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

    def training(
        self,
        folder: Path,
        student: str,
        seed: int = 0,
        points: tuple[int, ...] = POINTS,
        splits: Mapping[str, int] = NUM_PROMPTS,
    ) -> Training:
        """Of a student."""
        overrides = (f"stages.0.student.blocks={student}", *self.overrides())
        return Training(folder, "shapes/sd-small", overrides, seed, points, splits, random_init=self.random_init)


FEATURES = {
    "block": Arm(sites="block"),
    "block, balanced": Arm(sites="block", balanced=True),
    "self-attn": Arm(sites="self-attn"),
    "self-attn, balanced": Arm(sites="self-attn", balanced=True),
}
"""Kinds of feature loss, without their weights."""


def trials(folder: Path) -> Iterator[Training]:
    """Short trainings of the smallest student with each feature loss and weight."""
    for (name, arm), weight in itertools.product(FEATURES.items(), FEATURE_WEIGHTS):
        where = folder / "trials" / name.replace(", ", "-") / f"{weight:g}"
        weighted = replace(arm, feature_kd=weight)
        yield weighted.training(where, "sd-tiny", TRIAL_SEED, (TRIAL_STEPS,), TRIAL_PROMPTS)


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


def comparisons(folder: Path, weights: Mapping[str, float], seeds: int) -> Iterator[Training]:
    """Every training of the experiment, seed by seed, and what each student draws untrained."""
    for student in STUDENTS:
        yield Arm().training(folder / student / "pruned only", student, points=(0,))
    for seed, (name, arm), student in itertools.product(range(seeds), arms(weights).items(), STUDENTS):
        yield arm.training(folder / student / name / f"seed-{seed}", student, seed)


def main() -> None:
    args = experiment.parsed_arguments(__doc__)
    experiment.start(args.output)
    teacher = args.output / "teacher.npz"
    if not teacher.is_file():
        experiment.draw_teacher(teacher)
    experiment.perform_all(trials(args.output), args.jobs)
    weights = best_weights(args.output)
    experiment.require_same_settings(args.output, "weights", weights)
    experiment.perform_all(comparisons(args.output, weights, args.seeds), args.jobs)


if __name__ == "__main__":
    main()
