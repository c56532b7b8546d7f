"""Name shards, and write them as img2dataset does: KEY.jpg|png, KEY.txt and KEY.json in numbered tars."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from bkd.data.stats import stats_file
from bkd.errors import DataError
from bkd.files import replace_file, write_atomically

SAMPLES_PER_SHARD = 10_000
KEY_DIGITS = 9
Record = Mapping[str, Any]
"""A sample for webdataset: `__key__`, and bytes for each extension."""


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
        DataError: If nothing matches.
    """
    from braceexpand import braceexpand

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
            remedy="check the path; a folder of pictures becomes shards with `bkd data pack`",
        )
    return sorted(set(found))


def write_shards(samples: Iterable[NewSample], folder: Path, *, per_shard: int = SAMPLES_PER_SHARD) -> list[Path]:
    """Write samples into `folder` as 00000.tar, 00001.tar, …; the same samples give the same bytes.

    A shard appears under its name only when it is whole. Beside each lies img2dataset's `_stats.json`.
    """
    remaining = iter(samples)
    written = []
    for shard, first in enumerate(remaining):
        path = folder / shard_name(shard)
        records = (to_record(shard, row, s) for row, s in enumerate(chain([first], islice(remaining, per_shard - 1))))
        write_shard(path, records)
        written.append(path)
    return written


def shard_name(number: int) -> str:
    """img2dataset's: `00012.tar`."""
    return f"{number:05d}.tar"


def write_shard(path: Path, records: Iterable[Record], **stats: Any) -> int:
    """Write one shard and, after it, its `_stats.json`; the two appear only when the shard is whole.

    Args:
        path: Where to.
        records: The samples; equal records give equal bytes.
        stats: Recorded beside `successes` and `sha256`.

    Returns:
        How many samples were written.

    Raises:
        DataError: If the disk is full; nothing is left of this shard then.
    """
    import webdataset as wds

    count = 0
    stats_file(path).unlink(missing_ok=True)
    try:
        with replace_file(path) as stream:
            summed = _Summed(stream)
            with wds.TarWriter(summed, mtime=0, encoder=False) as writer:
                for record in records:
                    writer.write(record)
                    count += 1
        facts = {"count": count, "successes": count, "sha256": summed.digest.hexdigest(), **stats}
        write_atomically(stats_file(path), json.dumps(facts, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            raise DataError(
                "no space left for the shard",
                where=path,
                got=f"{error.strerror}; {free / 1e9:,.1f} GB free",
                remedy="make room and run the same command again: finished shards are kept",
            ) from None
        raise
    return count


class _Summed:
    """A stream that is written to, and the SHA-256 of what went through."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._stream.write(data)


def to_record(shard: int, row: int, sample: NewSample) -> Record:
    """A sample as webdataset writes it."""
    key = sample_key(shard, row)
    metadata = {**sample.metadata, "caption": sample.caption, "key": key, "status": "success", "error_message": None}
    return {
        "__key__": key,
        sample.extension: sample.image,
        "txt": sample.caption.encode("utf-8"),
        "json": json.dumps(metadata).encode(),
    }


def sample_key(shard: int, row: int) -> str:
    """img2dataset's keys: the shard's number, then the row, in a fixed number of digits."""
    return f"{shard:05d}{row:0{KEY_DIGITS - 5}d}"
