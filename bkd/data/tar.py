"""Walk a tar from end to end, believing nothing: every header is checked, every byte is read and summed up.

Most readers stop at the first header they do not understand and call that the end, so a truncated shard reads without
an error, down to a last sample that lacks its caption. Here the archive is whole or refused.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from bkd.errors import DataError

BLOCK = tarfile.BLOCKSIZE
MAX_HELD = 1 << 20
"""Members up to this size are handed out with their bytes; larger ones are read in pieces of it."""
MAX_EXTENDED_HEADER = 1 << 16
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
REFUSED_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_LONGLINK: "a link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}
"""First bytes of what shards are sometimes packed with."""


@dataclass(frozen=True)
class Member:
    """A regular file of an archive.

    Attributes:
        name: Relative, without `..`, with `/` between folders.
        offset: Of its first byte in the archive.
        size: In bytes.
        checksum: CRC-32 of its bytes.
        data: Its bytes, where there are at most `MAX_HELD`.
    """

    name: str
    offset: int
    size: int
    checksum: int
    data: bytes | None


class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None: ...


def walk(path: Path, digest: Digest | None = None) -> Iterator[Member]:
    """Every regular file of an archive, in its order, read once from end to end.

    Args:
        path: The tar.
        digest: Is given every byte of the file.

    Raises:
        DataError: If the file is missing, compressed, no tar, truncated, damaged or has bytes after its end, or if a
            member is a link or device or has an absolute name or one with `..`.
    """
    with _open(path) as stream:
        yield from _Walker(path, stream, path.stat().st_size, digest).members()


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise DataError("shard missing", where=path, remedy="check the path; brace patterns must match existing files")
    return path.open("rb")


class _Walker:
    def __init__(self, path: Path, stream: BinaryIO, length: int, digest: Digest | None) -> None:
        self._path, self._stream, self._length, self._digest = path, stream, length, digest
        self._position = 0

    def members(self) -> Iterator[Member]:
        renamed: dict[str, str] = {}  # what extended headers say of the member that follows them
        while (header := self._header()) is not None:
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                renamed |= self._pax(self._extended(header))
            elif header.type == tarfile.XGLTYPE:
                self._extended(header)
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                renamed["path"] = self._extended(header).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type in REGULAR:
                yield self._member(renamed.get("path", header.name), self._size(header, renamed))
                renamed = {}
            elif header.type == tarfile.DIRTYPE:
                renamed = {}
            else:
                kind = REFUSED_KINDS.get(header.type, "a member of a kind that shards do not have")
                raise self._damaged(f"shard holds {kind}", header.name)
        self._end(pending=bool(renamed))

    def _header(self) -> tarfile.TarInfo | None:
        block = self._read(BLOCK) if self._position + BLOCK <= self._length else b""
        if not block:
            raise self._truncated("no end-of-archive mark")
        if not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            if self._position == BLOCK:
                raise self._no_tar(block) from None
            raise self._damaged("shard corrupt: damaged header", f"{error} at byte {self._position - BLOCK}") from None
        return header

    def _no_tar(self, block: bytes) -> DataError:
        packed = next((kind for mark, kind in COMPRESSED.items() if block.startswith(mark)), None)
        return DataError(
            "shard corrupt: not a readable tar",
            where=self._path,
            got=f"{packed}-compressed" if packed else f"a file that starts with {block[:16]!r}",
            allowed="an uncompressed .tar",
            remedy="unpack it" if packed else "download it again",
        )

    def _size(self, header: tarfile.TarInfo, renamed: dict[str, str]) -> int:
        text = renamed.get("size", str(header.size))
        if not text.isascii() or not text.isdigit():
            raise self._damaged("shard corrupt: impossible size", f"'{header.name}': {text[:40]}")
        return int(text[:20])

    def _member(self, name: str, size: int) -> Member:
        while name.startswith("./"):
            name = name[2:]
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise self._damaged("shard holds an absolute name or one that leaves its folder", name)
        offset = self._position
        if offset + size > self._length:
            raise self._truncated(f"'{name}' ends beyond the file")
        data = self._read(size) if size <= MAX_HELD else None
        checksum = zlib.crc32(data) if data is not None else self._checksum(size)
        self._skip_padding(size)
        return Member(name, offset, size, checksum, data)

    def _checksum(self, size: int) -> int:
        checksum = 0
        while size:
            piece = self._read(min(size, MAX_HELD))
            checksum = zlib.crc32(piece, checksum)
            size -= len(piece)
        return checksum

    def _extended(self, header: tarfile.TarInfo) -> bytes:
        size = self._size(header, {})
        if size > MAX_EXTENDED_HEADER:
            raise self._damaged("shard corrupt: oversized header", f"{size:,} bytes")
        data = self._read(size)
        self._skip_padding(size)
        return data

    def _pax(self, data: bytes) -> dict[str, str]:
        """Records of the form `LENGTH KEY=VALUE\\n`, where LENGTH counts all of it."""
        found: dict[str, str] = {}
        while data.strip(b"\0"):
            digits, space, _ = data[:20].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
            if not space or not equals or not len(digits) + 1 < length <= len(data):
                raise self._damaged("shard corrupt: damaged header", f"extended header at byte {self._position}")
            found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
            data = data[length:]
        return {key: value for key, value in found.items() if key in ("path", "size")}

    def _end(self, *, pending: bool) -> None:
        """A tar ends with two blocks of zeros, and writers pad with more; anything else would go unseen."""
        if pending:
            raise self._truncated("a header without its member")
        if self._length - self._position < BLOCK:
            raise self._truncated("half an end-of-archive mark")
        while piece := self._read(min(MAX_HELD, self._length - self._position)):
            if piece.count(0) != len(piece):
                raise DataError(
                    "shard corrupt: bytes after the end of the archive",
                    where=self._path,
                    got=f"after byte {self._position}",
                    remedy="archives that were joined with `cat` must be split again; else download it again",
                )

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) != size:
            raise self._truncated("the file ends inside a member")
        if self._digest is not None:
            self._digest.update(data)
        self._position += size
        return data

    def _skip_padding(self, size: int) -> None:
        self._read(-size % BLOCK)

    def _truncated(self, got: str) -> DataError:
        return DataError("shard truncated", where=self._path, got=got, remedy="download it again")

    def _damaged(self, what: str, got: str) -> DataError:
        return DataError(what, where=self._path, got=got, remedy="download it again, from a source you trust")
