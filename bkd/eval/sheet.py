"""Where the tiles of a comparison picture lie: it carries that itself, so that they can be taken out again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin
from pydantic import PositiveInt, TypeAdapter, ValidationError

from bkd.errors import DataError

GAP = 8
TEXT_KEY = "bkd-sheet"
"""Of the PNG text that holds the layout."""


@dataclass(frozen=True)
class Sheet:
    """A row of tiles for each model, a column for each prompt.

    Attributes:
        models: Their names, from the top.
        prompts: From the left.
        side: Of an image as it was drawn, in pixels.
        tile: Of the same image in the picture, enlarged by a whole factor.
        left: Where the first column begins.
    """

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    side: PositiveInt
    tile: PositiveInt
    left: PositiveInt

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a tile."""
        return self.left + column * (self.tile + GAP), GAP + row * (self.tile + GAP)

    def text(self) -> PngImagePlugin.PngInfo:
        """For `pnginfo` of a picture."""
        info = PngImagePlugin.PngInfo()
        info.add_itxt(TEXT_KEY, json.dumps(asdict(self)))
        return info

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether all tiles lie within a picture of that size, and none is of more pixels than it shows."""
        left, top = self.corner(len(self.models) - 1, len(self.prompts) - 1)
        whole = bool(self.models and self.prompts) and self.side <= self.tile
        return whole and left + self.tile <= size[0] and top + self.tile <= size[1]

    def take(self, picture: Image.Image, row: int, column: int) -> Image.Image:
        """An image as it was drawn."""
        left, top = self.corner(row, column)
        tile = picture.crop((left, top, left + self.tile, top + self.tile))
        return tile.resize((self.side, self.side), Image.Resampling.NEAREST)


def read_sheet(path: Path) -> Sheet | None:
    """Where the tiles of a comparison picture lie, its pixels unread; None where it does not say so, or cannot be.

    Raises:
        DataError: If the file is no picture.
    """
    with _opened(path) as picture:
        try:
            sheet = TypeAdapter(Sheet).validate_json(picture.info.get(TEXT_KEY, ""))
        except ValidationError:
            return None
        return sheet if sheet.fits(picture.size) else None


def read_picture(path: Path) -> Image.Image:
    """A comparison picture as a whole, RGB.

    Raises:
        DataError: If the file is no whole picture.
    """
    with _opened(path) as picture:
        return picture.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            "this picture cannot be read", where=path, got=error, remedy="move it away, or restore it"
        ) from None
