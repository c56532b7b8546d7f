"""Train and draw what docs/results.md says of one pass and of adapters: all weights against ranks, by seed.

    python tools/results_guided_runs.py -o FOLDER [--jobs 2] [--seeds 3]

Stop it at any time and start it anew; see tools/experiment.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import experiment
import numpy as np
import torch
from experiment import GUIDANCE_SCALE, NUM_PROMPTS, TRIAL_PROMPTS, TRIAL_SEED, Training, prompts
from numpy.typing import NDArray

from bkd.data.shapes_checker import check

POINTS = (50, 100, 200, 400)
LAST, WINDOW = max(POINTS), 50
"""Steps of every training, and how many of the last ones losses are averaged over."""
RANGE = (1, 8)
SCALE = 5.0
"""Of one-pass students: at the embedded world's usual one, images with and without guidance are too much alike."""
SCALES = (1.0, 2.0, GUIDANCE_SCALE, 8.0)
"""Told besides to students that are told a scale, after the last step."""
RANKS = (4, 16, 64)
TRIAL_STEPS = 100
WHOLE, SMALL, TINY = "guided", "sd-small", "sd-tiny"
BLOCK_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv2"]
END_TARGETS = {"conv_in": 32, "conv_out": 4}
"""The UNet's first and last layer, with the largest rank that they have room for."""
NARROW = {
    WHOLE: "(down_blocks.0|up_blocks.3)..*",
    SMALL: "(down_blocks.0|up_blocks.3)..*",
    TINY: "(down_blocks.0|up_blocks.2)..*",
}
"""Modules of 32 channels, which no larger rank fits."""
RATES = {WHOLE: (3e-4, 1e-3, 3e-3, 8e-3), TINY: (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)}
"""Learning rates to choose from."""


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        student: `guided`: one pass for guidance's two, nothing removed. A preset: its distillation.
        rank: Of adapters over the teacher's own weights; None for all weights.
        told: Whether a one-pass student is told the guidance scale, instead of always having one.
        inside: Whether a one-pass student's adapters are of blocks alone, and not of the UNet's first and last layer.
    """

    student: str
    rank: int | None = None
    told: bool = False
    inside: bool = False

    def __str__(self) -> str:
        if self.rank is None:
            return "all weights"
        return f"adapters, rank {self.rank}" + (", blocks alone" if self.inside else "")

    @property
    def scale(self) -> float:
        """Of guidance, to draw with."""
        return SCALE if self.student == WHOLE else GUIDANCE_SCALE

    @property
    def recipe(self) -> str:
        """Packaged."""
        return "shapes/guided" if self.student == WHOLE else "shapes/sd-small"

    def overrides(self, rate: float) -> tuple[str, ...]:
        """For `load_recipe`."""
        stage = "stages.0"
        if self.student == WHOLE:
            learnt = json.dumps(RANGE) if self.told else SCALE
            chosen = [
                f"{stage}.method.guidance_scale={learnt}",
                f"samples.guidance_scale={SCALE}",
                "train.lr_schedule=cosine",
            ]
        else:
            chosen = [f"{stage}.student.blocks={self.student}", f"{stage}.method.loss.feature_kd=1.0"]
        if self.rank is not None:
            chosen.append(f"{stage}.lora={json.dumps(self._adapters(self.rank))}")
        return (*chosen, f"train.lr={rate}")

    def _adapters(self, rank: int) -> dict[str, Any]:
        ends = {} if self.inside or self.student != WHOLE else END_TARGETS
        largest = {end: most for end, most in {**ends, NARROW[self.student]: 32}.items() if most < rank}
        return {"r": rank, "target_modules": [*BLOCK_TARGETS, *ends], "rank_pattern": largest}

    def training(self, folder: Path, rate: float, seed: int) -> Training:
        """Of the comparison."""
        return self._training(folder, rate, seed, (LAST,) if self.student == WHOLE else POINTS, NUM_PROMPTS)

    def trial(self, folder: Path, rate: float) -> Training:
        """A short one, to choose the rate."""
        return self._training(folder, rate, TRIAL_SEED, (TRIAL_STEPS,), TRIAL_PROMPTS)

    def _training(
        self, folder: Path, rate: float, seed: int, points: tuple[int, ...], splits: Mapping[str, int]
    ) -> Training:
        scales = SCALES if self.told else ()
        return Training(
            folder, self.recipe, self.overrides(rate), seed, points, splits, scale=self.scale, last_scales=scales
        )

    @property
    def tried(self) -> Way:
        """The way that chooses this one's learning rate."""
        return Way(self.student if self.student == WHOLE else TINY, self.rank)


CAPACITIES = (None, *RANKS)
WAYS = (
    *(Way(WHOLE, rank) for rank in CAPACITIES),
    Way(WHOLE, 16, inside=True),
    Way(WHOLE, told=True),
    Way(WHOLE, 16, told=True),
    *(Way(student, rank) for student in (SMALL, TINY) for rank in CAPACITIES),
)


def trials(folder: Path) -> dict[tuple[Way, float], Training]:
    """Short trainings with each learning rate."""
    return {
        (way, rate): way.trial(folder / "trials" / way.student / str(way) / f"{rate:g}", rate)
        for way in dict.fromkeys(way.tried for way in WAYS)
        for rate in RATES[way.student]
    }


def teacher_file(folder: Path, scale: float = SCALE) -> Path:
    """Where the teacher's images are; scale 1 is one pass, without guidance."""
    return folder / "teacher" / f"scale-{scale:g}.npz"


@cache
def images_in(path: Path) -> torch.Tensor:
    """(prompts, 3, 32, 32), uint8."""
    return torch.from_numpy(np.load(path)["images"])


def squared_errors(images: torch.Tensor, others: torch.Tensor) -> NDArray[np.float64]:
    """Mean squared difference of each pair of images, of values from 0 to 1: (prompts,)."""
    return ((images.double() - others.double()) / 255).square().mean(dim=(1, 2, 3)).numpy()


def decibels(errors: NDArray[np.float64]) -> float:
    """Peak signal-to-noise ratio of a set of images."""
    return float(-10 * np.log10(errors.mean()))


def guidance_missing(training: Training) -> float:
    """Error of the last steps against the guided teacher's output, in percent of that of its unguided pass."""
    logged = np.load(training.drawn(max(training.points)))
    student, unguided = (logged[name][-WINDOW:].sum() for name in ("output_kd_loss", "unguided_loss"))
    return 100 * float(student / unguided)


def right(training: Training, step: int) -> float:
    """Percent of prompts drawn right."""
    texts = prompts(training.splits)
    return 100 * float(np.mean([verdict.correct for verdict in check(images_in(training.drawn(step)), texts)]))


def trial_score(training: Training, way: Way) -> float:
    """What a learning rate is chosen by, more is better."""
    return -guidance_missing(training) if way.student == WHOLE else right(training, TRIAL_STEPS)


def best_rates(folder: Path) -> dict[Way, float]:
    """Of each way, the learning rate whose trial was best, the smallest of equals."""
    scores: dict[Way, dict[float, float]] = {}
    for (way, rate), training in trials(folder).items():
        scores.setdefault(way, {})[rate] = trial_score(training, way)
    return {way: max(found, key=lambda rate: (found[rate], -rate)) for way, found in scores.items()}


def comparisons(folder: Path, rates: Mapping[Way, float], seeds: int) -> dict[tuple[Way, int], Training]:
    """Every training of the experiment, seed by seed."""
    return {
        (way, seed): way.training(
            folder / f"{way.student}{'-told' if way.told else ''}" / str(way) / f"seed-{seed}",
            rates[way.tried],
            seed,
        )
        for seed, way in itertools.product(range(seeds), WAYS)
    }


def main() -> None:
    args = experiment.parsed_arguments(__doc__)
    experiment.start(args.output)
    for scale in (SCALE, *SCALES):
        if not (path := teacher_file(args.output, scale)).is_file():
            experiment.draw_teacher(path, scale)
    experiment.perform_all(trials(args.output).values(), args.jobs)
    rates = best_rates(args.output)
    chosen = {f"{way.student}, {way}": rate for way, rate in rates.items()}
    experiment.require_same_settings(args.output, "rates", chosen)
    experiment.perform_all(comparisons(args.output, rates, args.seeds).values(), args.jobs)


if __name__ == "__main__":
    main()
