"""Index of a tar shard: every sample's members by offset, after checking that the archive is whole.

A truncated tar reads without an error in most readers, down to a last sample that lacks its caption. So a shard is
walked once, refused if anything is wrong with it, and then read by offset.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bkd.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
END_OF_ARCHIVE = 1024
"""A tar ends with two blocks of zeros."""


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: where each of its members lies.

    Attributes:
        shard: The tar file.
        key: The members' common name.
        members: Extension -> (offset, size) in bytes.
    """

    shard: Path
    key: str
    members: Mapping[str, tuple[int, int]]

    @property
    def image_extension(self) -> str | None:
        return next((ext for ext in IMAGE_EXTENSIONS if ext in self.members), None)

    def read(self, extension: str) -> bytes:
        offset, size = self.members[extension]
        with self.shard.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)


def index_shard(path: Path) -> list[Sample]:
    """The samples of one shard, in the order of the archive.

    Raises:
        DataError: If the file is missing, compressed, truncated or not a tar, or holds no samples of image and caption.
    """
    if not path.is_file():
        raise DataError("shard missing", where=path, remedy="check the path; brace patterns must match existing files")
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in _members(path):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")  # webdataset's rule: a key ends at its first dot
        members = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if extension.lower() in members:
            raise DataError("shard corrupt: the same member twice", where=path, got=name)
        members[extension.lower()] = (offset, size)
    indexed = [Sample(path, key, members) for key, members in samples.items()]
    usable = [s for s in indexed if s.image_extension and "txt" in s.members]
    if not usable:
        raise DataError(
            "shard holds no samples of image and caption",
            where=path,
            got=", ".join(sorted({ext for s in indexed for ext in s.members})) or "no members",
            allowed=f"KEY.{'|'.join(IMAGE_EXTENSIONS)} with KEY.txt, as img2dataset writes them",
        )
    return usable


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, data offset and size of every regular file; refuses an archive that is not whole."""
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            end = 0
            for member in archive:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if end > length:
                    raise DataError(
                        "shard truncated",
                        where=path,
                        got=f"'{member.name}' ends beyond the file",
                        remedy="download it again",
                    )
                if member.isfile():
                    yield member.name, member.offset_data, member.size
                elif not member.isdir():
                    raise DataError("shard holds a link or device", where=path, got=member.name)
    except tarfile.TarError as error:
        raise DataError(
            "shard corrupt: not a readable tar",
            where=path,
            got=error,
            remedy="download it again; compressed tars must be unpacked first",
        ) from error
    with path.open("rb") as stream:
        stream.seek(end)
        tail = stream.read()
    if len(tail) < END_OF_ARCHIVE or any(tail[:END_OF_ARCHIVE]):
        raise DataError("shard truncated", where=path, got="no end-of-archive mark", remedy="download it again")
