"""A few kinds of shapes, as an SVG document or as the pixels of a PNG: not everything that shows pictures reads SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

SCALE = 2
"""Pixels of a PNG for each unit."""
DASH = 3


@dataclass(frozen=True)
class Box:
    """A rectangle; without a stroke where none is given."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    stroke: str | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Words:
    """A line of text; `x` is its start or its middle, `y` its baseline."""

    x: float
    y: float
    text: str
    size: int
    colour: str
    anchor: Literal["start", "middle"] = "start"
    bold: bool = False


@dataclass(frozen=True)
class Dots:
    """A dotted horizontal line."""

    x: float
    y: float
    right: float
    stroke: str


Shape = Box | Words | Dots


@dataclass(frozen=True)
class Canvas:
    """A drawing: the later shapes lie on the earlier ones.

    Attributes:
        width: In units.
        height: Likewise.
        title: For those who cannot see it.
        shapes: What is drawn, on white.
        classes: Of the SVG's shapes, by their colour: what a page may give colours of its own.
    """

    width: int
    height: int
    title: str
    shapes: Sequence[Shape]
    classes: Mapping[str, str] = field(default_factory=dict)

    def svg(self) -> str:
        """The document."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="system-ui, sans-serif" font-size="10">'
        )
        background = (
            f'<title>{escape(self.title)}</title><rect class="paper" width="100%" height="100%" fill="#ffffff"/>'
        )
        return "\n".join([head, background, *(_svg(shape, self.classes) for shape in self.shapes), "</svg>\n"])

    def png(self) -> bytes:
        """The file, `SCALE` pixels for each unit."""
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (self.width * SCALE, self.height * SCALE), "#ffffff")
        draw = ImageDraw.Draw(picture)
        for shape in self.shapes:
            _paint(draw, shape)
        stream = io.BytesIO()
        picture.quantize(64, dither=Image.Dither.NONE).save(stream, format="PNG", optimize=True)
        return stream.getvalue()


def _svg(shape: Shape, classes: Mapping[str, str]) -> str:
    if isinstance(shape, Dots):
        return f'<path d="M{shape.x},{shape.y}H{shape.right}" stroke="{shape.stroke}" stroke-dasharray="2 4"/>'
    if isinstance(shape, Box):
        stroke = f' stroke="{shape.stroke}"' if shape.stroke else ""
        dashes = f' stroke-dasharray="{DASH} {DASH}"' if shape.dashed else ""
        size = f'width="{shape.width:g}" height="{shape.height:g}"'
        return f'<rect x="{shape.x}" y="{shape.y}" {size} {_fill(shape.fill, classes)}{stroke}{dashes}/>'
    weight = ' font-weight="600"' if shape.bold else ""
    look = f'font-size="{shape.size}" text-anchor="{shape.anchor}" {_fill(shape.colour, classes)}{weight}'
    return f'<text x="{shape.x}" y="{shape.y}" {look}>{escape(shape.text)}</text>'


def _fill(colour: str, classes: Mapping[str, str]) -> str:
    return f'fill="{colour}"' + (f' class="{classes[colour]}"' if colour in classes else "")


def _paint(draw: ImageDraw, shape: Shape) -> None:
    from PIL import ImageFont

    if isinstance(shape, Words):
        font = ImageFont.load_default(size=shape.size * SCALE)
        text = shape.text.replace("→", "to")  # this font has no arrow
        anchor = "ms" if shape.anchor == "middle" else "ls"
        draw.text((shape.x * SCALE, shape.y * SCALE), text, shape.colour, font, anchor, stroke_width=shape.bold / 2)
    elif isinstance(shape, Dots):
        for x in range(int(shape.x), int(shape.right), 6):
            draw.line([(x * SCALE, shape.y * SCALE), ((x + 2) * SCALE, shape.y * SCALE)], shape.stroke, SCALE)
    else:
        corners = [v * SCALE for v in (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)]
        draw.rectangle(corners, shape.fill, None if shape.dashed else shape.stroke, SCALE)
        if shape.dashed and shape.stroke:
            _dashes(draw, corners, shape.stroke)


def _dashes(draw: ImageDraw, corners: Sequence[float], stroke: str) -> None:
    """A dashed frame, which PIL has not."""
    left, top, right, bottom = map(round, corners)
    dash = DASH * SCALE
    for x in range(left, right, 2 * dash):
        for y in (top, bottom):
            draw.line([(x, y), (min(x + dash, right), y)], stroke, SCALE)
    for y in range(top, bottom, 2 * dash):
        for x in (left, right):
            draw.line([(x, y), (x, min(y + dash, bottom))], stroke, SCALE)
