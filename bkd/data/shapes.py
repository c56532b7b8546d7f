"""The embedded world: small captioned scenes, drawn by a pure function of (version, seed, split, index).

A scene is one or two objects (shape, colour, size, position) on a plain background, 32 x 32 pixels. Every
object lies inside its own quadrant and is shifted by a jitter that its caption does not mention, so one caption
describes a distribution of images, as captions do.

Three kinds of held-out scenes make the measurements honest:

* ``val`` and ``test`` hold captions that never occur in ``train``;
* ``novel`` holds scenes with a (shape, colour, position) combination that occurs in no other split, although every
  pair of those attributes does (Okawa et al. 2023, arXiv:2310.09336).

A theme, for fine-tuning: every scene of ``theme`` has a shape that no other split has and no teacher knows, not even by
its word; captions of ``theme-test`` never occur in ``theme``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

EMBEDDED = "shapes"
"""What the world, its shards and its teacher are called."""
WORLD_VERSION = 1
SIDE = 32
QUADRANT = SIDE // 2

THEME_SHARDS = "shapes-theme"
"""What the shards of split `theme` are called."""

Split = Literal["train", "val", "test", "novel", "theme", "theme-test"]
SPLITS: tuple[Split, ...] = get_args(Split)

BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 50),
}
SHAPES = ("circle", "square", "triangle")
THEME_SHAPE = "diamond"
ALL_SHAPES = (*SHAPES, THEME_SHAPE)
RADII: dict[str, float] = {"small": 4.0, "large": 6.5}
"""Half the side, in pixels, of the square box that holds the object."""
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
JITTER = (-2, -1, 0, 1, 2)
"""Allowed shifts of an object's centre from its quadrant's centre, in half pixels."""
SUPERSAMPLING = 8

HELD_OUT = frozenset(
    {
        ("circle", "red", "top left"),
        ("square", "green", "top right"),
        ("triangle", "blue", "bottom left"),
        ("circle", "yellow", "bottom right"),
        ("square", "blue", "bottom right"),
    }
)
"""Five of the 48 (shape, colour, position) combinations: only split ``novel`` has them."""


@dataclass(frozen=True, kw_only=True)
class Object:
    """One object of a scene; `dx` and `dy` are its jitter in half pixels, right and down."""

    shape: str
    color: str
    size: str
    position: str
    dx: int = 0
    dy: int = 0

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.color} {self.shape} at the {self.position}"

    @property
    def described(self) -> tuple[str, str, str, str]:
        """What a caption says of the object: everything but the jitter."""
        return (self.position, self.shape, self.color, self.size)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and one or two objects in different quadrants, in the order the caption names them."""

    background: str
    objects: tuple[Object, ...]

    @property
    def caption(self) -> str:
        return " and ".join(o.phrase for o in self.objects) + f" on a {self.background} background"

    @property
    def described(self) -> tuple[str, tuple[tuple[str, str, str, str], ...]]:
        """What the caption says, in an order of its own: equal for two scenes that the same words describe."""
        return (self.background, tuple(sorted(o.described for o in self.objects)))

    @property
    def is_novel(self) -> bool:
        return any((o.shape, o.color, o.position) in HELD_OUT for o in self.objects)


def scene(split: Split, index: int, *, seed: int = 0) -> Scene:
    """Scene `index` of `split`: the same on every machine, for ever (the version is part of the draw).

    Args:
        split: One of `SPLITS`.
        index: 0 or more; there is no last one.
        seed: Another seed is another world of the same kind.
    """
    # Random.random() is the one stream Python promises never to change.
    draw = random.Random(f"shapes/{WORLD_VERSION}/{seed}/{split}/{index}").random
    for _ in count():
        candidate = _draw_scene(draw)
        if split in ("theme", "theme-test"):
            candidate = _themed(candidate)
        if _split_of(candidate) == split:
            return candidate
    raise AssertionError("unreachable")


def scenes(split: Split, num_scenes: int, *, seed: int = 0) -> Iterator[Scene]:
    """The first `num_scenes` scenes of a split."""
    return (scene(split, index, seed=seed) for index in range(num_scenes))


def _draw_scene(draw: Callable[[], float]) -> Scene:
    def pick(options: Sequence[T]) -> T:
        return options[int(draw() * len(options))]

    positions = list(POSITIONS)
    objects = []
    for _ in range(pick((1, 2))):
        position = pick(positions)
        positions.remove(position)
        objects.append(
            Object(
                shape=pick(SHAPES),
                color=pick(tuple(COLORS)),
                size=pick(tuple(RADII)),
                position=position,
                dx=pick(JITTER),
                dy=pick(JITTER),
            )
        )
    return Scene(background=pick(tuple(BACKGROUNDS)), objects=tuple(objects))


def _themed(plain: Scene) -> Scene:
    """The same scene with its first object in the theme's shape."""
    first, *others = plain.objects
    return replace(plain, objects=(replace(first, shape=THEME_SHAPE), *others))


def _split_of(candidate: Scene) -> Split:
    if candidate.is_novel:
        return "novel"
    bucket = hashlib.sha256(repr(candidate.described).encode()).digest()[0]
    if any(o.shape == THEME_SHAPE for o in candidate.objects):
        return "theme-test" if bucket < 40 else "theme"
    return "val" if bucket < 16 else "test" if bucket < 40 else "train"


@cache
def coverage(shape: str, size: str, dx: int, dy: int) -> NDArray[np.float32]:
    """Share of each pixel of a quadrant that the object covers: (16, 16), 0..1, anti-aliased.

    Args:
        shape: One of `ALL_SHAPES`.
        size: A key of `RADII`.
        dx: Shift of the centre to the right, in half pixels.
        dy: Shift of the centre downwards, in half pixels.
    """
    fine = (np.arange(QUADRANT * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - QUADRANT / 2
    r = RADII[size]
    x, y = (fine[None, :] - dx / 2) / r, (fine[:, None] - dy / 2) / r
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(np.abs(x), np.abs(y)) <= 1,
        "triangle": (y <= 1) & (2 * np.abs(x) <= y + 1),
        "diamond": np.abs(x) + np.abs(y) <= 1,
    }[shape]
    s = SUPERSAMPLING
    covered: NDArray[np.float32] = inside.reshape(QUADRANT, s, QUADRANT, s).mean((1, 3), dtype=np.float32)
    return covered


def quadrant_slices(position: str) -> tuple[slice, slice]:
    """Rows and columns of the quadrant that `position` names."""
    row, column = divmod(POSITIONS.index(position), 2)
    return (
        slice(row * QUADRANT, (row + 1) * QUADRANT),
        slice(column * QUADRANT, (column + 1) * QUADRANT),
    )


def render(drawn: Scene) -> NDArray[np.uint8]:
    """Draw a scene: (32, 32, 3), uint8, RGB."""
    image: NDArray[np.float32] = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = BACKGROUNDS[drawn.background]
    for o in drawn.objects:
        rows, columns = quadrant_slices(o.position)
        alpha = coverage(o.shape, o.size, o.dx, o.dy)[..., None]
        image[rows, columns] += alpha * (np.array(COLORS[o.color], np.float32) - image[rows, columns])
    pixels: NDArray[np.uint8] = image.round().astype(np.uint8)
    return pixels
