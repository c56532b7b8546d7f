"""Write files so that a crash leaves the old one or the new one, never half of either; and where to keep them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Where things that can be made again are kept: `$BKD_CACHE`, or `~/.cache/bkd`."""
    return Path(os.environ.get("BKD_CACHE", "~/.cache/bkd")).expanduser()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file as a whole; its folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
