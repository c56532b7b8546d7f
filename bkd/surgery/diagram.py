"""A UNet as a drawing: what is kept, what is removed, and, where there are scores, what each removal would change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from bkd.surgery.anatomy import Anatomy, Block, Layout, Stack
from bkd.surgery.canvas import Box, Canvas, Dots, Shape, Words
from bkd.surgery.units import Unit

WIDTH, TOP, ROW = 800, 64, 76
RESNET, ATTENTION, HEIGHT, GAP, INDENT, MARGIN = 26, 44, 34, 12, 26, 24
LAYER = RESNET + ATTENTION + GAP
KEPT = {"resnet": "#3b6ea5", "attention": "#e08a1e"}
GONE, LINE, TEXT, SOFT, FAINT = "#f3f3f1", "#b9b9b4", "#33332f", "#77776f", "#9a9a92"
CLASSES = {TEXT: "ink", SOFT: "muted", FAINT: "muted", GONE: "empty"}
"""Names of those that a dark page must replace."""


def diagram(
    anatomy: Anatomy, kept: Layout, title: str, *, subtitle: str = "", scores: Mapping[Unit, float] | None = None
) -> Canvas:
    """The drawing, to be taken as SVG or as PNG.

    Args:
        anatomy: The teacher's.
        kept: What the student keeps.
        title: Above the drawing.
        subtitle: A second line.
        scores: Unit -> output change; printed beneath its box, and for an attention the least of its transformer
            layers'.
    """
    shapes = (
        Words(MARGIN, 26, title, 16, TEXT, bold=True),
        Words(MARGIN, 44, subtitle, 11, TEXT),
        *_levels(anatomy, kept, scores or {}),
        *_mid(anatomy, kept, scores or {}),
        *_legend(TOP + ROW * (anatomy.num_levels + 1) + 14, bool(scores)),
    )
    return Canvas(WIDTH, TOP + ROW * (anatomy.num_levels + 1) + (42 if scores else 28), title, shapes, CLASSES)


def _levels(anatomy: Anatomy, kept: Layout, scores: Mapping[Unit, float]) -> Iterator[Shape]:
    for level in range(anatomy.num_levels):
        y, inset = TOP + ROW * level, MARGIN + INDENT * level
        down, up = anatomy.whole.down[level], anatomy.whole.up[level]
        right = WIDTH - inset - LAYER * len(up.layers) + GAP
        left_end = inset + LAYER * len(down.layers) - GAP
        middle = y + HEIGHT / 2
        yield Dots(left_end, middle, right, LINE)
        gone = level >= kept.num_levels
        ours = (Block((), None), Block((), None)) if gone else (kept.down[level], kept.up[level])
        yield from _block(inset, y, f"down.{level}", down, ours[0], scores)
        yield from _block(right, y, f"up.{anatomy.up_index(level)}", up, ours[1], scores)
        label = f"level {level} · {anatomy.channels[level]} channels" + (" · removed" if gone else "")
        yield _text((left_end + right) / 2, middle - 5, label, anchor="middle", colour=SOFT)
        yield from _score((left_end + right) / 2, middle + 13, f"level.{level}", scores, anchor="middle")


def _block(x: float, y: float, name: str, whole: Block, kept: Block, scores: Mapping[Unit, float]) -> Iterator[Shape]:
    for layer in whole.layers:
        stays, unit = layer in kept.layers, f"{name}.{layer}"
        yield from _box(x, y, RESNET, "R", "resnet", 1.0 if stays else 0.0)
        if whole.stacks is not None:
            stack = whole.stack_of(layer)
            ours = kept.stack_of(layer) if stays and kept.stacks is not None else None
            yield from _attention(x + RESNET, y, stack, ours)
        yield _text(x, y + HEIGHT + 11, unit, colour=TEXT if stays else FAINT)
        yield from _score(x, y + HEIGHT + 22, unit, scores)
        if whole.stacks is not None:
            yield from _least_score(x, y + HEIGHT + 33, f"{unit}.t", scores)
        x += LAYER


def _mid(anatomy: Anatomy, kept: Layout, scores: Mapping[Unit, float]) -> Iterator[Shape]:
    whole, ours = anatomy.whole.mid, kept.mid
    if whole is None:
        return
    y, x = TOP + ROW * anatomy.num_levels, WIDTH / 2 - RESNET - ATTENTION / 2
    yield from _box(x, y, RESNET, "R", "resnet", float(ours is not None))
    if whole.stack is not None:
        yield from _attention(x + RESNET, y, whole.stack, ours.stack if ours is not None else None)
        stays = ours is not None and ours.stack is not None
        yield from _box(x + RESNET + ATTENTION, y, RESNET, "R", "resnet", float(stays))
    yield _text(x, y + HEIGHT + 11, "mid", colour=TEXT if ours is not None else FAINT)
    yield from _score(x, y + HEIGHT + 22, "mid", scores)
    yield from _least_score(x, y + HEIGHT + 33, "mid.t", scores)


def _score(
    x: float, y: float, unit: Unit, scores: Mapping[Unit, float], *, anchor: Literal["start", "middle"] = "start"
) -> Iterator[Shape]:
    if unit in scores:
        yield _text(x, y, f"{scores[unit]:.2g}", anchor=anchor, colour="#a3341f")


def _least_score(x: float, y: float, prefix: str, scores: Mapping[Unit, float]) -> Iterator[Shape]:
    """Of the transformer layers of one attention."""
    found = [score for unit, score in scores.items() if unit.startswith(prefix)]
    if found:
        yield _text(x, y, f"{min(found):.2g}", colour="#b06000")


def _attention(x: float, y: float, whole: Stack, kept: Stack | None) -> Iterator[Shape]:
    """A box filled as far as its transformer layers are kept; none at all where the attention is gone."""
    if kept is None:
        return _box(x, y, ATTENTION, f"A {len(whole)}", "attention", 0.0)
    label = f"A {len(whole)}" if kept == whole else f"A {len(kept)}/{len(whole)}"
    return _box(x, y, ATTENTION, label, "attention", len(kept) / max(1, len(whole)))


def _box(x: float, y: float, width: int, label: str, kind: str, share: float) -> Iterator[Shape]:
    yield Box(x, y, width, HEIGHT, GONE, KEPT[kind] if share else LINE, dashed=not share)
    if share:
        yield Box(x, y, round(width * share, 1), HEIGHT, KEPT[kind])
    colour = {0.0: FAINT, 1.0: "#ffffff"}.get(share, TEXT)
    yield _text(x + width / 2, y + 21, label, anchor="middle", colour=colour)


def _legend(y: float, scored: bool) -> Iterator[Shape]:
    words = "R resnet · A n attention with n transformer layers · filled: kept · dashed: removed · dotted: skips"
    yield _text(MARGIN, y, words, colour=SOFT)
    if scored:
        more = "red: output change without the unit and its partner · orange: without one transformer layer"
        yield _text(MARGIN, y + 13, more, colour=SOFT)


def _text(x: float, y: float, text: str, *, anchor: Literal["start", "middle"] = "start", colour: str = TEXT) -> Words:
    return Words(x, y, text, 10, colour, anchor)
