"""What KEY.json says of a sample: LAION's fields under the names that downloads give them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

ALIASES: dict[str, tuple[str, ...]] = {
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "aesthetics"),
    "similarity": ("similarity", "clip_similarity"),
    "pwatermark": ("pwatermark", "watermark"),
    "punsafe": ("punsafe", "nsfw_score"),
    "width": ("width",),
    "height": ("height",),
    "original_width": ("original_width", "WIDTH"),
    "original_height": ("original_height", "HEIGHT"),
}
"""Numeric fields by our name: the names in KEY.json that mean it, the first present one counts."""
LANGUAGE_NAMES = ("language", "LANGUAGE", "lang")
ORIENTATIONS = {
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}
"""exifread's words for EXIF's numbers."""
MAX_NAME = 64


def parse_metadata(data: bytes | None) -> dict[str, Any] | None:
    """KEY.json as a mapping; None where there is none that can be read."""
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, numbers of thousands of digits, endless brackets
        return None
    return found if isinstance(found, dict) else None


def number_of(metadata: Mapping[str, Any], field: str) -> float:
    """A numeric field; NaN where it is missing, null, infinite or not a number."""
    value = next((metadata[name] for name in ALIASES[field] if metadata.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def language_of(metadata: Mapping[str, Any]) -> str:
    """The caption's language, in lower case; empty where it is not said."""
    value = next((metadata[name] for name in LANGUAGE_NAMES if isinstance(metadata.get(name), str)), "")
    return str(value).lower()[:MAX_NAME]


def orientation_of(metadata: Mapping[str, Any]) -> int:
    """EXIF orientation of the picture that was downloaded, 1 for upright.

    img2dataset stores pictures as they lie and drops their EXIF; what it said is a JSON text inside KEY.json, in the
    words of the package exifread.
    """
    found = parse_metadata(str(metadata.get("exif", "")).encode("utf-8", "replace")) or {}
    return ORIENTATIONS.get(str(found.get("Image Orientation")), 1)


def caption_of(text: bytes | None) -> str | None:
    """A caption file's text without surrounding space; None where it is empty or not UTF-8."""
    if text is None:
        return None
    try:
        return text.decode("utf-8").strip() or None
    except UnicodeDecodeError:
        return None
