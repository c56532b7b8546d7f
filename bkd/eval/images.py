"""Images drawn for a measurement, on disk: found again by the next call, looked at by people and other tools."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bkd.data.images import open_image
from bkd.errors import DataError
from bkd.files import replace_file, write_atomically

IDENTITY_FILE = "drawn.json"
IMAGE_FOLDER = re.compile(r"[A-Za-z0-9._-]*-[0-9a-f]{12}")
"""Names of the folders that are made here."""
BATCH = 50
ALLOWED = "a whole JPEG, PNG or WebP file"


@dataclass(frozen=True)
class Saving:
    """What becomes of an image before it is measured.

    Attributes:
        format: `png` keeps it. `jpeg` is BK-SDM's: Pillow's default quality of 75, before and after resizing.
        side: Pixels it is resized to, bicubic, whatever its aspect; kept as drawn when not given.
    """

    format: Literal["png", "jpeg"] = "png"
    side: int | None = None

    @property
    def suffix(self) -> str:
        return "jpg" if self.format == "jpeg" else "png"

    def encode(self, image: Image.Image) -> bytes:
        """The file's bytes."""
        if self.side and image.size != (self.side, self.side):
            if self.format == "jpeg":
                image = Image.open(io.BytesIO(self._as_file(image)))
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return self._as_file(image)

    def _as_file(self, image: Image.Image) -> bytes:
        stream = io.BytesIO()
        image.save(stream, format=self.format.upper())
        return stream.getvalue()


class ImageFolder:
    """The images of one model for one list of prompts, numbered.

    Args:
        root: Folder of all such folders.
        name: Of the model, for people.
        identity: Everything the images depend on; images of anything else are never mistaken for these.
        saving: What becomes of each image.
        count: How many prompts there are.
    """

    def __init__(self, root: Path, name: str, identity: Mapping[str, Any], saving: Saving, count: int) -> None:
        self._identity = json.dumps(identity, indent=2, sort_keys=True) + "\n"
        digest = hashlib.sha256(self._identity.encode()).hexdigest()[:12]
        self.path = root / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')}-{digest}"
        self.count, self._saving = count, saving

    def missing(self) -> list[int]:
        """Numbers of the images that have not been drawn."""
        there = {path.name for path in self.path.glob(f"*.{self._saving.suffix}") if path.stat().st_size}
        return [number for number in range(self.count) if self._file(number).name not in there]

    def add(self, number: int, pixels: Tensor) -> None:
        """Write one image, (3, H, W), uint8; a crash leaves all of it or nothing."""
        if not (self.path / IDENTITY_FILE).is_file():
            write_atomically(self.path / IDENTITY_FILE, self._identity)
        encoded = self._saving.encode(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        with replace_file(self._file(number), one_of_many=True) as stream:
            stream.write(encoded)

    def batches(self, numbers: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Images in batches (50 or fewer, 3, H, W), uint8; the same batches at every call.

        Args:
            numbers: Which; all of them when not given.
        """
        chosen = range(self.count) if numbers is None else numbers
        for start in range(0, len(chosen), BATCH):
            yield torch.stack([read_pixels(self._file(number)) for number in chosen[start : start + BATCH]])

    def read(self, numbers: Sequence[int] | None = None) -> Tensor:
        """Images (N, 3, H, W), uint8, at once.

        Args:
            numbers: Which; all of them when not given.
        """
        return torch.cat(list(self.batches(numbers)))

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.{self._saving.suffix}"


def read_pixels(path: Path, side: int | None = None) -> Tensor:
    """An image file as (3, H, W), uint8, RGB.

    Args:
        path: A JPEG, PNG or WebP file; grayscale becomes RGB, transparency is laid on white.
        side: Pixels it is resized to, bicubic, whatever its aspect.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        image = open_image(path.read_bytes())
    except (DataError, OSError) as error:
        got = error.got if isinstance(error, DataError) else error
        raise DataError(
            "image cannot be read", where=path, got=got, allowed=ALLOWED, remedy="replace it, or move it away"
        ) from None
    if side and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
