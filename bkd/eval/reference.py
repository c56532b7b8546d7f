"""What images are compared with: statistics that somebody published, or a folder of real images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bkd.errors import DataError
from bkd.eval.fidelity import FeatureStatistics
from bkd.eval.images import BATCH, read_pixels
from bkd.eval.inception import NUM_FEATURES
from bkd.files import file_digest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Reference:
    """A reference set that was looked at, but not read through.

    Attributes:
        path: An `.npz` of pytorch-fid, or a folder of images.
        files: The folder's images, in order; empty for statistics.
        side: Pixels to which the images are resized.
        digest: Of the statistics; of the images' names and sizes, for a folder.
    """

    path: Path
    files: tuple[Path, ...]
    side: int
    digest: str

    @property
    def statistics(self) -> FeatureStatistics | None:
        """As published; None for a folder."""
        return None if self.files else FeatureStatistics.load(self.path)

    def batches(self) -> Iterator[Tensor]:
        """The folder's images in batches (B, 3, side, side), uint8."""
        for start in range(0, len(self.files), BATCH):
            yield torch.stack([read_pixels(path, self.side) for path in self.files[start : start + BATCH]])


def find_reference(path: Path, *, side: int, resized: bool) -> Reference:
    """Look at a reference set before anything is drawn.

    Args:
        path: An `.npz` with `mu` and `sigma`, or a folder of images, searched with all its folders.
        side: Of the images that will be compared with it, in pixels.
        resized: Whether both sides are brought to it on purpose; images of other sizes are refused otherwise.

    Raises:
        DataError: If it is missing, empty, of another network, or its images have other sizes.
    """
    digest = reference_digest(path)
    if path.suffix == ".npz":
        _check_statistics(path)
        return Reference(path, (), side, digest)
    files = _images_in(path)
    _check_sizes(files, side, resized)
    return Reference(path, files, side, digest)


def reference_digest(path: Path) -> str:
    """Of statistics, the file's SHA-256; of a folder, that of its images' names and sizes.

    Raises:
        DataError: If there is nothing.
    """
    if path.suffix == ".npz":
        if not path.is_file():
            raise DataError("no such file of reference statistics", where=path)
        return file_digest(path)
    listed = "".join(f"{file.relative_to(path)} {file.stat().st_size}\n" for file in _images_in(path))
    return hashlib.sha256(listed.encode()).hexdigest()


def _images_in(path: Path) -> tuple[Path, ...]:
    if not path.is_dir():
        raise DataError(
            "no reference images or statistics there",
            where=path,
            allowed="a folder of images, or an .npz of pytorch-fid (python -m pytorch_fid --save-stats IMAGES FILE)",
        )
    files = tuple(sorted(found for found in path.rglob("*") if found.suffix.lower() in SUFFIXES))
    if not files:
        raise DataError("a reference folder without images", where=path, allowed=", ".join(SUFFIXES))
    return files


def _check_statistics(path: Path) -> None:
    found = FeatureStatistics.load(path).num_features
    if found != NUM_FEATURES:
        raise DataError(
            "these statistics are of other features than FID's",
            where=path,
            got=f"{found} features",
            allowed=f"{NUM_FEATURES}, of InceptionV3's last pooling layer",
            remedy="python -m pytorch_fid --save-stats IMAGES FILE, with its default --dims 2048",
        )


def _check_sizes(files: tuple[Path, ...], side: int, resized: bool) -> None:
    """Every image must be whole. Resizing changes FID by whole points; it is never done unasked."""
    with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock alone
        sizes = list(pool.map(_size, files))
    other = Counter(size for size in sizes if size != (side, side))
    if other and not resized:
        example = next(file for file, size in zip(files, sizes, strict=True) if size != (side, side))
        common = ", ".join(f"{count:,} of {w} x {h}" for (w, h), count in other.most_common(3))
        raise DataError(
            "reference images of another size than those they are compared with",
            where=example,
            got=f"{other.total():,} of {len(files):,} images: {common}",
            allowed=f"{side} x {side}",
            remedy=f"--resize 256 brings both sides to 256 px (as BK-SDM does), --resize {side} the reference alone",
        )


def _size(file: Path) -> tuple[int, int]:
    """Width and height."""
    height, width = read_pixels(file).shape[1:]
    return width, height
