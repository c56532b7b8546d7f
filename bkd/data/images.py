"""Decode, orient, resize and crop images from unknown hands."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bkd.errors import DataError

MAX_PIXELS = 1 << 20


def decode_image(encoded: bytes, resolution: int) -> Tensor:
    """Decode an image to a square of the training resolution.

    EXIF orientation is applied, transparency is laid on white, the shorter side is resized (Lanczos) and the centre
    is cropped. An image of exactly the right size passes through untouched.

    Args:
        encoded: A JPEG, PNG or WebP file's bytes.
        resolution: Side of the result, in pixels.

    Returns:
        (3, resolution, resolution), uint8, RGB.

    Raises:
        DataError: If the bytes are not a whole image, or the image is so large that it may be an attack.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP")) as opened:
                image = _on_white(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("image cannot be decoded", got=error) from error
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _on_white(image: Image.Image) -> Image.Image:
    # convert("RGB") alone would show whatever colour hides below transparent pixels
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


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
