"""What the images of tools/results_steps_runs.py show: accuracy, shapes-FID, diversity, and what became of edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import results_steps_runs as runs
import torch
from experiment import NUM_PROMPTS, prompts
from measures import Interval, mean, shown, spread
from numpy.typing import NDArray
from results_steps_runs import NUM_NOISES, NUM_SCENES

from bkd.data.shapes import JITTER, Object, Scene, quadrant_slices, scene, scenes
from bkd.data.shapes_checker import check, rendered
from bkd.eval.fidelity import FeatureStatistics, frechet_distance
from bkd.eval.shapes_features import load_shapes_features, shapes_features

NUM_REFERENCE, REFERENCE_SEED = 5000, 1
HALF_PIXEL = 0.5


@cache
def images_in(path: Path, name: str = "images") -> torch.Tensor:
    """(N, 3, 32, 32), uint8."""
    return torch.from_numpy(np.load(path)[name])


@cache
def correct(path: Path) -> NDArray[np.int64]:
    """Whether each image shows what its caption says: (prompts,)."""
    return np.array([verdict.correct for verdict in check(images_in(path), prompts())], np.int64)


def accuracy(paths: Sequence[Path]) -> Interval:
    return mean(np.stack([correct(path) for path in paths]))


@cache
def reference() -> FeatureStatistics:
    """Renders of another world of the same kind, in the proportions of the prompts."""
    total = sum(NUM_PROMPTS.values())
    drawn = [
        scene(split, index, seed=REFERENCE_SEED)  # type: ignore[arg-type]
        for split, count in NUM_PROMPTS.items()
        for index in range(NUM_REFERENCE * count // total)
    ]
    return FeatureStatistics.of(shapes_features(load_shapes_features(), rendered(drawn)))


@cache
def distance(path: Path) -> float:
    """Shapes-FID of a file of images."""
    features = shapes_features(load_shapes_features(), images_in(path))
    return float(frechet_distance(FeatureStatistics.of(features), reference()))


def fid(paths: Sequence[Path]) -> Interval:
    return spread(distance(path) for path in paths)


def _pairwise(features: torch.Tensor) -> float:
    """Mean distance of two images of one caption, over captions."""
    groups = features.unflatten(0, (NUM_SCENES, NUM_NOISES))
    pairs = torch.cdist(groups, groups).sum(dim=(1, 2)) / (NUM_NOISES * (NUM_NOISES - 1))
    return float(pairs.mean())


@cache
def diversity_of_renders() -> float:
    """Of the world itself: the same captions, objects anywhere that the caption allows."""
    rng = np.random.default_rng(0)
    drawn = []
    for one in scenes("test", NUM_SCENES):
        for _ in range(NUM_NOISES):
            moved = [
                Object(**{**vars(o), "dx": int(rng.choice(JITTER)), "dy": int(rng.choice(JITTER))}) for o in one.objects
            ]
            drawn.append(Scene(background=one.background, objects=tuple(moved)))
    return _pairwise(shapes_features(load_shapes_features(), rendered(drawn)))


def diversity(paths: Sequence[Path]) -> Interval:
    """Percent of that of renders."""
    network = load_shapes_features()
    return spread(100 * _pairwise(shapes_features(network, images_in(path))) / diversity_of_renders() for path in paths)


class Edited(NamedTuple):
    """What became of scenes: each (scenes,), 0 or 1.

    Attributes:
        whole: Everything is as the second caption says.
        changed: The edited attribute is.
        kept: All others are.
        still: No object has moved by more than half a pixel.
        again: Decoded with the first caption, the image shows what it did.
    """

    whole: NDArray[np.int64]
    changed: NDArray[np.int64]
    kept: NDArray[np.int64]
    still: NDArray[np.int64]
    again: NDArray[np.int64]


def edit_header(first: str, attribute: str) -> list[str]:
    """Of a table of `edit_row`s."""
    return [first, "all right", f"{attribute} changed", "the rest kept", "nothing moved", "back again"]


def edit_row(title: str, seeds: Iterable[Edited]) -> list[str]:
    """Percent of the scenes, and intervals."""
    return [title, *(shown(mean(np.stack(outcomes))) for outcomes in zip(*seeds, strict=True))]


@cache
def edited(path: Path, kind: str = "color") -> Edited:
    return judged(images_in(path), images_in(path, "again"), kind)


def judged(images: torch.Tensor, decoded: torch.Tensor, kind: str = "color") -> Edited:
    """Of edits of one kind, and the scenes decoded with their own captions: uint8, (N, 3, 32, 32) each."""
    before, after = runs.edits(kind)
    attribute = "color" if kind == "color" else "shape"
    verdicts = check(images, [one.caption for one in after])
    others = [all(ok for name, ok in v.attributes.items() if name != attribute) for v in verdicts]
    again = check(decoded, [one.caption for one in before])
    return Edited(
        np.array([v.correct for v in verdicts], np.int64),
        np.array([v.attributes[attribute] for v in verdicts], np.int64),
        np.array(others, np.int64),
        np.array([_still(*one) for one in zip(images, before, after, strict=True)], np.int64),
        np.array([v.correct for v in again], np.int64),
    )


def _still(image: torch.Tensor, before: Scene, after: Scene) -> bool:
    """Whether every object lies where it lay, to half a pixel: of all places, the one whose render is nearest.

    An object that was not changed is looked for as it was.
    """
    places = [(dx, dy) for dx in JITTER for dy in JITTER]
    for number, one in enumerate(after.objects):
        rows, columns = quadrant_slices(one.position)
        kinds = (one, before.objects[number])
        moved = [_with(after, number, replace(kind, dx=dx, dy=dy)) for kind in kinds for dx, dy in places]
        errors = (rendered(moved).float() - image.float())[:, :, rows, columns].square().mean(dim=(1, 2, 3))
        dx, dy = places[int(errors.argmin()) % len(places)]
        if np.hypot(dx - one.dx, dy - one.dy) / 2 > HALF_PIXEL:  # jitter is in half pixels
            return False
    return True


def _with(wanted: Scene, number: int, other: Object) -> Scene:
    objects = [other if place == number else one for place, one in enumerate(wanted.objects)]
    return replace(wanted, objects=tuple(objects))
