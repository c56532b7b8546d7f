"""Pictures inside the page: each one once, small ones as they are, large ones within a budget."""

from __future__ import annotations

import base64
import hashlib
import io

import numpy as np
from PIL import Image

BUDGET = 10_000_000
"""Bytes of all pictures; base64 makes four of three, and the page is to stay under 15 MB."""
LOSSLESS_SIDE = 128
"""Pictures up to this side are kept exactly, where there is room."""
QUALITY, SIDES = 85, (1024, 768, 640, 512, 384, 256, 192, 128, 96)
"""Of WebP, and the longest sides to choose from."""
FLAT, WORTH = 0.8, 1.5
"""Drawings are kept exactly, too: the share of their pixels that are as the one to their left, and how many times as
large as the lossy file the exact one may be."""
USUAL_BYTES = 0.15
"""Of a pixel at that quality; the side of all pictures follows from it, so that none looks better for its encoding."""


class Embedded:
    """The pictures of a page, by the digest of their pixels.

    Args:
        count: How many will be added at most; they share the budget equally.
    """

    def __init__(self, count: int) -> None:
        self._allowance = BUDGET // max(count, 1)
        self._files: dict[str, bytes] = {}
        self._shown: set[str] = set()
        self.reduced = 0

    def add(self, picture: Image.Image) -> str:
        """Keep a picture; the same pixels are kept once.

        Args:
            picture: RGB.

        Returns:
            What `source` and the page's script know it by.
        """
        digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:16]
        if digest not in self._files:
            self._files[digest], exact = _encoded(picture, self._allowance)
            self.reduced += not exact
        return digest

    def source(self, digest: str) -> str | None:
        """Its address, the first time; None when the page has it already, and its script copies it from there."""
        if digest in self._shown:
            return None
        self._shown.add(digest)
        return self._url(digest)

    def hidden(self) -> dict[str, str]:
        """Addresses of those that the page does not show at first."""
        return {digest: self._url(digest) for digest in self._files if digest not in self._shown}

    def __len__(self) -> int:
        return len(self._files)

    def _url(self, digest: str) -> str:
        return "data:image/webp;base64," + base64.b64encode(self._files[digest]).decode()


def _encoded(picture: Image.Image, allowance: int) -> tuple[bytes, bool]:
    """A WebP file of at most so many bytes, if the last of `SIDES` allows; and whether it is exact."""
    if (exact := _exact(picture, allowance)) is not None:
        return exact, True
    for side in SIDES:
        if side**2 * USUAL_BYTES > allowance and side != SIDES[-1]:
            continue
        smaller = picture.copy()
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        if len(found := _webp(smaller, quality=QUALITY)) <= allowance:
            break
    return found, False


def _exact(picture: Image.Image, allowance: int) -> bytes | None:
    """The lossless file of a small picture or a drawing, where there is room."""
    small = max(picture.size) <= LOSSLESS_SIDE
    if not small and (max(picture.size) > SIDES[0] or _flatness(picture) < FLAT):
        return None
    found = _webp(picture, lossless=True)
    most = allowance if small else min(allowance, WORTH * len(_webp(picture, quality=QUALITY)))
    return found if len(found) <= most else None


def _flatness(picture: Image.Image) -> float:
    """The share of pixels that are as the one to their left, in every eighth line."""
    lines = np.asarray(picture)[::8]
    return float((lines[:, 1:] == lines[:, :-1]).all(-1).mean())


def _webp(picture: Image.Image, **settings: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", method=2, **settings)
    return stream.getvalue()
