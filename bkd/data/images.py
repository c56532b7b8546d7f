"""Decode, orient, resize and crop images from unknown hands."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bkd.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = 0x0112
"""Tag of EXIF."""
UPRIGHT = 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
MAX_PIXELS = 1 << 20
# Images above Pillow's limit are refused here; its warning would say so a second time.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class DecodedImage:
    """A training image, and what was done to get it.

    Attributes:
        pixels: (3, resolution, resolution), uint8, RGB; not contiguous.
        original_size: (height, width) before resizing, in pixels, as displayed.
        crop_top_left: (top, left) of the square in the resized image, in pixels.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def decode_image(encoded: bytes, resolution: int, orientation: int = UPRIGHT) -> DecodedImage:
    """Decode an image to a square of the training resolution.

    EXIF orientation is applied, transparency is laid on white, of animations the first picture is taken, the shorter
    side is resized (Lanczos) and the centre is cropped. An image of exactly the right size passes through untouched.

    Args:
        encoded: A JPEG, PNG or WebP file's bytes.
        resolution: Side of the result, in pixels.
        orientation: EXIF's number, for an image that has lost its own.

    Raises:
        DataError: If the bytes are not a whole image, or the image is so large that it may be an attack.
    """
    image = open_image(encoded, orientation)
    width, height = image.size
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    scale = resolution / min(width, height)
    crop = tuple(round((side * scale - resolution) / 2) for side in (height, width))
    # Colours stay side by side in memory: sorting them out takes as long as a fifth of the decoding.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return DecodedImage(pixels, (height, width), (crop[0], crop[1]))


def open_image(encoded: bytes, orientation: int = UPRIGHT) -> Image.Image:
    """A whole image as RGB, upright, without transparency.

    Args:
        encoded: A JPEG, PNG or WebP file's bytes.
        orientation: EXIF's number, for an image that has lost its own.

    Raises:
        DataError: As `decode_image`.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            if Image.MAX_IMAGE_PIXELS and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels")
            if opened.format == "PNG":
                with Image.open(io.BytesIO(encoded), formats=("PNG",)) as png:
                    png.verify()  # PNG's checksums; decoding alone does not look at those of pixels
            opened.load()
            turn = TURNS.get(opened.getexif().get(ORIENTATION, orientation))
            return _rgb(opened if turn is None else opened.transpose(turn))
    except UnidentifiedImageError as error:
        raise DataError("image cannot be decoded", got="no " + ", ".join(FORMATS)) from error
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise DataError("image cannot be decoded", got=str(error) or type(error).__name__) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # convert("RGB") alone would show whatever colour hides below transparent pixels
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def images_at_once(side: int, most: int) -> int:
    """How many images to encode or draw in one pass: as many pixels as four images of 512 px, which fit a small GPU.

    Args:
        side: Of the images, in pixels.
        most: However small they are.
    """
    return max(1, min(most, MAX_PIXELS // side**2))


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1, as the autoencoder wants it."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """float -1..1 to uint8 0..255, rounded; what lies outside is clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
