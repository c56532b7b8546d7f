"""The exact checker of the embedded world: reads an image back into a scene and compares it with its caption.

It knows nothing of models. Clean renders are read perfectly; the blur and ringing of a VAE are tolerated, an object of
the wrong kind, a missing or an additional one is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bkd.data.shapes import (
    ALL_SHAPES,
    BACKGROUNDS,
    COLORS,
    JITTER,
    POSITIONS,
    QUADRANT,
    RADII,
    SHAPES,
    SIDE,
    THEME_SHAPE,
    Object,
    Scene,
    coverage,
    render,
)
from bkd.errors import DataError

ATTRIBUTES = ("background", "count", "position", "shape", "color", "size", "clean")
MIN_AREA = 12.0
"""Covered pixels below which a quadrant counts as empty; the smallest object covers 32."""
MIN_IOU = 0.65
"""Least overlap, intersection over union of soft masks, between an object and the shape it is read as."""
MAX_RESIDUE = 6.0
"""Covered pixels an empty quadrant may show before the image counts as unclean."""


@dataclass(frozen=True)
class Verdict:
    """What the checker found in one image; `correct` means every attribute agrees with the caption.

    `attributes` maps each of `ATTRIBUTES` to whether it agrees. Shape, colour and size are compared for every object
    the caption names, at its position; `clean`: each object has a known outline, and empty places are empty.
    """

    seen: Scene
    attributes: dict[str, bool]

    @property
    def correct(self) -> bool:
        return all(self.attributes.values())


def parse_caption(caption: str) -> Scene:
    """Read a caption of the embedded world.

    Raises:
        DataError: If the caption is not one that the world writes.
    """
    match = re.fullmatch(r"(.+) on a (\w+) background", caption.strip())
    clauses = match.group(1).split(" and ") if match else []
    found = [re.fullmatch(r"a (\w+) (\w+) (\w+) at the (\w+ \w+)", clause) for clause in clauses]
    objects = [
        Object(size=m[1], color=m[2], shape=m[3], position=m[4])
        for m in found
        if m and m[1] in RADII and m[2] in COLORS and m[3] in ALL_SHAPES and m[4] in POSITIONS
    ]
    distinct = len({o.position for o in objects}) == len(clauses)
    if not match or match.group(2) not in BACKGROUNDS or len(objects) != len(clauses) or not distinct:
        raise DataError(
            what="not a caption of the embedded shapes world",
            got=caption,
            allowed="'a small red circle at the top left [and a large blue square …] on a gray background'",
        )
    return Scene(background=match.group(2), objects=tuple(objects))


def rendered(drawn: Iterable[Scene]) -> Tensor:
    """Scenes as the checker reads images: (B, 3, 32, 32), uint8."""
    return torch.from_numpy(np.stack([render(one) for one in drawn])).permute(0, 3, 1, 2).contiguous()


def check(pixels: Tensor, captions: Sequence[str]) -> list[Verdict]:
    """Compare images with their captions.

    Args:
        pixels: (B, 3, 32, 32), uint8.
        captions: B captions of the embedded world.

    Raises:
        DataError: If a caption is not of this world, or the images have another size.
    """
    if pixels.dtype != torch.uint8 or pixels.shape != (len(captions), 3, SIDE, SIDE):
        raise DataError(
            what="images the shapes checker cannot read",
            got=f"{tuple(pixels.shape)} {pixels.dtype} for {len(captions)} captions",
            allowed=f"uint8 of shape (B, 3, {SIDE}, {SIDE}), one per caption",
        )
    expected = [parse_caption(caption) for caption in captions]
    # A blurred circle is near a diamond: only where a caption speaks of one is an object read as one.
    themed = [any(o.shape == THEME_SHAPE for o in wanted.objects) for wanted in expected]
    return [_compare(*found, wanted) for found, wanted in zip(_read(pixels, themed), expected, strict=True)]


def _compare(seen: Scene, clean: bool, wanted: Scene) -> Verdict:
    by_position = {o.position: o for o in seen.objects}
    pairs = [(by_position.get(o.position), o) for o in wanted.objects]
    agree = {
        name: all(s is not None and getattr(s, name) == getattr(o, name) for s, o in pairs)
        for name in ("shape", "color", "size")
    }
    return Verdict(
        seen,
        {
            "background": seen.background == wanted.background,
            "count": len(seen.objects) == len(wanted.objects),
            "position": set(by_position) == {o.position for o in wanted.objects},
            **agree,
            "clean": clean,
        },
    )


@lru_cache(maxsize=2)
def _templates(shapes: tuple[str, ...]) -> tuple[list[tuple[str, str]], Tensor]:
    """Every (shape, size), and its masks at each jitter: (K, 256), float32, in the same order."""
    names, masks = [], []
    for shape in shapes:
        for size in RADII:
            for dy in (-3, *JITTER, 3):  # one step beyond the world's own jitter: generated objects may stray
                for dx in (-3, *JITTER, 3):
                    names.append((shape, size))
                    masks.append(torch.from_numpy(coverage(shape, size, dx, dy)).flatten())
    return names, torch.stack(masks)


def _palette(colors: dict[str, tuple[int, int, int]]) -> Tensor:
    return torch.tensor(list(colors.values()), dtype=torch.float32)


def _read(pixels: Tensor, themed: Sequence[bool]) -> list[tuple[Scene, bool]]:
    """Read images back: for each, the scene it shows and whether it shows nothing else.

    Args:
        pixels: (B, 3, 32, 32), uint8.
        themed: B times, whether objects may have the theme's shape.
    """
    images = pixels.float().permute(0, 2, 3, 1)
    edge = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
    ground = edge.median(dim=1).values  # (B, 3)
    backgrounds = torch.cdist(ground, _palette(BACKGROUNDS)).argmin(dim=1)

    half = images.reshape(-1, 2, QUADRANT, 2, QUADRANT, 3).permute(0, 1, 3, 2, 4, 5)
    quadrants = half.reshape(len(images), 4, QUADRANT * QUADRANT, 3)  # in the order of POSITIONS
    results = []
    for quadrant, base, background, theme in zip(quadrants, ground, backgrounds.tolist(), themed, strict=True):
        shapes = ALL_SHAPES if theme else SHAPES
        patches = zip(quadrant, POSITIONS, strict=True)
        found = [_read_quadrant(patch, base, position, shapes) for patch, position in patches]
        objects = tuple(o for o, _ in found if o is not None)
        results.append(
            (Scene(background=list(BACKGROUNDS)[background], objects=objects), all(clean for _, clean in found))
        )
    return results


def _read_quadrant(patch: Tensor, ground: Tensor, position: str, shapes: tuple[str, ...]) -> tuple[Object | None, bool]:
    """The object in one quadrant, if any, and whether the quadrant shows only that.

    Args:
        patch: (256, 3), float32, 0..255.
        ground: (3,), the image's background.
        position: The quadrant's.
        shapes: That an object may be read as.
    """
    palette = _palette(COLORS)
    towards = palette - ground  # (4, 3)
    # Coverage under each colour hypothesis: how far each pixel has moved from the background towards that colour.
    alpha = ((patch - ground) @ towards.T / towards.square().sum(dim=1)).clamp(0, 1)  # (256, 4)
    error = (patch[:, None] - (ground + alpha[..., None] * towards)).square().sum(dim=(0, 2))  # (4,)
    color = int(error.argmin())
    mask = alpha[:, color]
    changed = (patch - ground).norm(dim=1) / towards[color].norm()
    if float(changed.clamp(max=1).gt(0.5).sum()) < MIN_AREA:
        return None, bool(changed.gt(0.25).sum() <= MAX_RESIDUE)
    names, templates = _templates(shapes)
    overlap = torch.minimum(mask, templates).sum(dim=1) / torch.maximum(mask, templates).sum(dim=1)
    best = int(overlap.argmax())
    shape, size = names[best]
    found = Object(shape=shape, color=list(COLORS)[color], size=size, position=position)
    return found, bool(overlap[best] >= MIN_IOU)
