"""Make indexes, and keep them: beside the shard, or in the cache where its folder cannot be written to."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bkd.data.index import EXTENSIONS, NO_MEMBER, Contents, Extents, ShardIndex, forget_open_shards
from bkd.data.metadata import ALIASES, MAX_NAME, caption_of, language_of, number_of, parse_metadata
from bkd.data.stats import shard_stats, stats_file
from bkd.data.tar import Member, walk
from bkd.errors import DataError
from bkd.files import replace_file
from bkd.progress import Progress, silent

INDEX_VERSION = 1
INDEX_SUFFIX = ".bkdindex"
MAX_NAMES = 200
"""Metadata names and foreign extensions that are counted by name; a shard may hold any number of them."""
MAX_LANGUAGES = 256
NAME = re.compile(rf"(?P<key>.+?)\.(?P<extension>{'|'.join(map(re.escape, EXTENSIONS))})", re.IGNORECASE | re.DOTALL)
"""A key ends where a known extension begins, so it may contain dots."""


def index_shards(paths: Sequence[Path], cache: Path, progress: Progress = silent) -> list[ShardIndex]:
    """The indexes of some shards, made where there is none yet.

    Args:
        paths: Tar files.
        cache: Folder for indexes of shards whose own folder cannot be written to.
        progress: Called after each shard.

    Raises:
        DataError: If a shard is missing, truncated, damaged or holds what no shard should.
    """
    found = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for index in pool.map(lambda path: index_shard(path, cache), paths):
            found.append(index)
            progress(len(found), len(paths))
    return found


def index_shard(path: Path, cache: Path | None = None) -> ShardIndex:
    """One shard's index, read if it is current, else made and kept."""
    places = [path.with_name(path.name + INDEX_SUFFIX)]
    if cache is not None:
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
        places.append(cache / "indexes" / (name + INDEX_SUFFIX))
    for place in places:
        if (kept := _load(place, path)) is not None:
            return kept
    stamp = _stamp(path)
    forget_open_shards()
    index = build_index(path)
    for place in places:
        try:
            _save(place, index, stamp)
            break
        except OSError:  # a folder that cannot be written to; without any place the index is made again next time
            continue
    return index


def build_index(path: Path) -> ShardIndex:
    """Walk a shard and index it.

    Raises:
        DataError: If the archive is not whole, or is not the one that was written (`_stats.json`, where bkd wrote it).
    """
    expected = shard_stats(path).get("sha256")
    digest = hashlib.sha256()
    building = _Building(path)
    for member in walk(path, digest if expected else None):
        building.add(member)
    if expected and expected != digest.hexdigest():
        raise DataError(
            "shard corrupt: these are not the bytes that were written",
            where=path,
            got=f"SHA-256 {digest.hexdigest()[:12]}…",
            allowed=f"{str(expected)[:12]}…, says {stats_file(path).name}",
            remedy="copy it again from where it was made",
        )
    return building.finish()


class _Building:
    """Columns of an index that grow by a row for every new key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[bytes, int] = {}
        self._places: dict[str, tuple[array[int], array[int], array[int]]] = {}
        self._fields: dict[str, array[float]] = {}
        self._caption_lengths: array[int] = array("i")
        self._languages: array[int] = array("B")
        self._language_names: dict[str, int] = {"": 0}
        self._metadata_fields: Counter[str] = Counter()
        self._foreign: Counter[str] = Counter()
        self._num_metadata = 0

    def add(self, member: Member) -> None:
        folder, slash, base = member.name.rpartition("/")
        match = NAME.fullmatch(base)
        if match is None:
            self._count(self._foreign, base.rpartition(".")[2] if "." in base else "(none)")
            return
        extension = match["extension"].lower()
        row = self._row((folder + slash + match["key"]).encode("utf-8", "surrogateescape"))
        offsets, sizes, checksums = self._columns(extension)
        if row < len(sizes) and sizes[row] != NO_MEMBER:
            raise DataError("shard corrupt: the same member twice", where=self._path, got=member.name)
        if member.size >= NO_MEMBER:
            raise DataError("shard corrupt: a member of more than 4 GiB", where=self._path, got=member.name)
        _fill(offsets, row, 0)
        _fill(sizes, row, NO_MEMBER)
        _fill(checksums, row, 0)
        offsets[row], sizes[row], checksums[row] = member.offset, member.size, member.checksum
        if extension == "txt":
            self._caption_lengths[row] = len(caption_of(member.data) or "") or -1
        elif extension == "json":
            self._add_metadata(row, member.data)

    def _row(self, key: bytes) -> int:
        row = self._rows.setdefault(key, len(self._rows))
        if row == len(self._caption_lengths):
            self._caption_lengths.append(-1)
            self._languages.append(0)
        return row

    def _columns(self, extension: str) -> tuple[array[int], array[int], array[int]]:
        return self._places.setdefault(extension, (array("Q"), array("I"), array("I")))

    def _add_metadata(self, row: int, data: bytes | None) -> None:
        metadata = parse_metadata(data)
        if metadata is None:
            return
        self._num_metadata += 1
        for name, value in metadata.items():
            if value is not None:
                self._count(self._metadata_fields, name)
        for name in ALIASES:
            value = number_of(metadata, name)
            if value == value:
                column = self._fields.setdefault(name, array("f"))
                _fill(column, row, np.nan)
                column[row] = value
        language = language_of(metadata)
        if len(self._language_names) < MAX_LANGUAGES or language in self._language_names:
            self._languages[row] = self._language_names.setdefault(language, len(self._language_names))

    @staticmethod
    def _count(counter: Counter[str], name: str) -> None:
        name = name[:MAX_NAME]
        counter[name if name in counter or len(counter) < MAX_NAMES else "(others)"] += 1

    def finish(self) -> ShardIndex:
        last = len(self._rows) - 1
        for offsets, sizes, checksums in self._places.values():
            _fill(offsets, last, 0)
            _fill(sizes, last, NO_MEMBER)
            _fill(checksums, last, 0)
        for column in self._fields.values():
            _fill(column, last, np.nan)
        return ShardIndex(
            path=self._path,
            keys=np.array(list(self._rows), dtype=np.bytes_) if self._rows else np.zeros(0, "S1"),
            members={
                name: Extents(np.array(o, np.uint64), np.array(s, np.uint32), np.array(c, np.uint32))
                for name, (o, s, c) in self._places.items()
            },
            fields={name: np.array(column, np.float32) for name, column in self._fields.items()},
            languages=np.array(self._languages, np.uint8),
            language_names=tuple(self._language_names),
            caption_lengths=np.array(self._caption_lengths, np.int32),
            contents=Contents(self._num_metadata, dict(self._metadata_fields), dict(self._foreign)),
        )


def _fill(column: array[Any], row: int, value: float) -> None:
    """Lengthen a column so that it has this row."""
    if len(column) <= row:
        column.extend([value] * (row + 1 - len(column)))


def _stamp(path: Path) -> dict[str, int]:
    try:
        status = path.stat()
    except OSError:
        return {}
    return {"version": INDEX_VERSION, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _save(place: Path, index: ShardIndex, stamp: dict[str, int]) -> None:
    facts = {**stamp, "language_names": index.language_names, "contents": asdict(index.contents)}
    columns: dict[str, Any] = {
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        "keys": index.keys,
        "languages": index.languages,
        "caption_lengths": index.caption_lengths,
    }
    for name, places in index.members.items():
        columns |= {
            f"offsets/{name}": places.offsets,
            f"sizes/{name}": places.sizes,
            f"checksums/{name}": places.checksums,
        }
    columns |= {f"field/{name}": column for name, column in index.fields.items()}
    with replace_file(place) as stream:
        np.savez_compressed(stream, **columns)


def _load(place: Path, shard: Path) -> ShardIndex | None:
    """A kept index; None where there is none, it is of another version or shard, or it is damaged."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            columns = {name: kept[name] for name in kept.files}
        facts = json.loads(columns["facts"].tobytes())
        if {name: facts[name] for name in ("version", "size", "mtime_ns")} != _stamp(shard):
            return None
        names = [name.removeprefix("sizes/") for name in columns if name.startswith("sizes/")]
        members = {n: Extents(columns[f"offsets/{n}"], columns[f"sizes/{n}"], columns[f"checksums/{n}"]) for n in names}
        return ShardIndex(
            path=shard,
            keys=columns["keys"],
            members=members,
            fields={n.removeprefix("field/"): column for n, column in columns.items() if n.startswith("field/")},
            languages=columns["languages"],
            language_names=tuple(facts["language_names"]),
            caption_lengths=columns["caption_lengths"],
            contents=Contents(**facts["contents"]),
        )
    except Exception:  # damaged archives make numpy and zipfile raise nearly anything
        return None
