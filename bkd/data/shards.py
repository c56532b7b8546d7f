"""Name shards, and write them as img2dataset does: KEY.jpg|png, KEY.txt and KEY.json in numbered tars."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bkd.errors import DataError

SAMPLES_PER_SHARD = 10_000
KEY_DIGITS = 9


@dataclass(frozen=True, kw_only=True)
class NewSample:
    """One sample to be written.

    Attributes:
        image: The encoded image.
        extension: `jpg`, `png` or `webp`.
        caption: Written as KEY.txt.
        metadata: Further fields of KEY.json; key, caption and status are added.
    """

    image: bytes
    extension: str
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def expand_shards(spec: str) -> list[Path]:
    """The tar files that SHARDS means: a file, a folder, a glob or a brace pattern; sorted, without duplicates.

    Raises:
        DataError: If nothing matches, or a shell command or URL is given.
    """
    from braceexpand import braceexpand

    if spec.startswith("pipe:") or "://" in spec:
        raise DataError(
            "shards must be files on this machine",
            got=spec.split(":", 1)[0] + ":…",
            allowed="a .tar, a folder of them, a glob, or a brace pattern such as shards/{00000..00099}.tar",
            remedy="download the shards first; commands in `pipe:` are never run",
        )
    found: list[Path] = []
    try:
        patterns = list(braceexpand(spec))
    except ValueError:  # braceexpand.UnbalancedBracesError
        raise DataError(
            "a brace in the shard pattern has no partner", where=spec, remedy="quote it: 'x/{00..99}.tar'"
        ) from None
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found += path.glob("*.tar")
        elif path.is_file():
            found.append(path)
        elif any(c in pattern for c in "*?["):
            found += Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))
        else:
            found.append(path)
    if not found:
        raise DataError(
            "no shards found",
            where=spec,
            allowed="a .tar, a folder of them, a glob, or a brace pattern",
            remedy="check the path",
        )
    return sorted(set(found))


def write_shards(samples: Iterable[NewSample], folder: Path, *, per_shard: int = SAMPLES_PER_SHARD) -> list[Path]:
    """Write samples into `folder` as 00000.tar, 00001.tar, …; the same samples give the same bytes.

    A shard appears under its name only when it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remaining = iter(samples)
    written = []
    for shard, first in enumerate(remaining):
        path = folder / f"{shard:05d}.tar"
        _write_shard(path, shard, chain([first], islice(remaining, per_shard - 1)))
        written.append(path)
    return written


def _write_shard(path: Path, shard: int, samples: Iterable[NewSample]) -> None:
    import webdataset as wds

    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as stream:
        with wds.TarWriter(stream, mtime=0) as writer:
            for index, sample in enumerate(samples):
                writer.write(_members(shard, index, sample))
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(path)


def _members(shard: int, index: int, sample: NewSample) -> dict[str, Any]:
    # img2dataset's keys: the shard number, then the row, in a fixed number of digits.
    key = f"{shard:05d}{index:0{KEY_DIGITS - 5}d}"
    metadata = {**sample.metadata, "caption": sample.caption, "key": key, "status": "success", "error_message": None}
    return {
        "__key__": key,
        sample.extension: sample.image,
        "txt": sample.caption,
        "json": json.dumps(metadata).encode(),
    }
