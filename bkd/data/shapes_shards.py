"""The embedded world on disk: ordinary LAION-aesthetic shards, made on first use.

Nothing behind this file knows that the pictures were drawn by a program.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bkd.data.shapes import SIDE, WORLD_VERSION, Split, render, scene
from bkd.data.shards import NewSample, write_shards

NUM_TRAIN = 10_000
NUM_THEME = 2_000


def ensure_shapes_shards(cache: Path, *, split: Split = "train", num_samples: int = NUM_TRAIN, seed: int = 0) -> Path:
    """The folder of the embedded world's shards, written now if this machine has none yet.

    Args:
        cache: Folder for things that can be made again.
        split: Which scenes.
        num_samples: How many; another number is another folder.
        seed: Which world.
    """
    folder = cache / f"shapes-v{WORLD_VERSION}-seed{seed}-{split}-{num_samples}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as unfinished:
            made = Path(unfinished) / "shards"
            write_shards(shapes_samples(split, num_samples, seed=seed), made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, and its shards are the same
                    raise
    return folder


def shapes_samples(split: Split, num_samples: int, *, seed: int = 0) -> Iterator[NewSample]:
    """Captioned PNGs (JPEG would blur colours at this size) with the metadata a LAION-aesthetic download has."""
    from PIL import Image

    for index in range(num_samples):
        drawn = scene(split, index, seed=seed)
        stream = io.BytesIO()
        Image.fromarray(render(drawn)).save(stream, "PNG")
        image = stream.getvalue()
        spread = hashlib.sha256(image).digest()  # plausible, reproducible scores
        yield NewSample(
            image=image,
            extension="png",
            caption=drawn.caption,
            metadata={
                "url": f"shapes://{WORLD_VERSION}/{seed}/{split}/{index}",
                "width": SIDE,
                "height": SIDE,
                "original_width": SIDE,
                "original_height": SIDE,
                "AESTHETIC_SCORE": round(5 + 3 * spread[0] / 255, 3),
                "similarity": round(0.25 + 0.15 * spread[1] / 255, 4),
                "pwatermark": round(0.3 * spread[2] / 255, 4),
                "punsafe": round(0.01 * spread[3] / 255, 5),
                "exif": "{}",
                "sha256": hashlib.sha256(image).hexdigest(),
            },
        )
