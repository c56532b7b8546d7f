"""Write files so that a crash leaves the old one or the new one, never half of either; and where to keep them."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bkd.errors import OutputError


def cache_folder() -> Path:
    """Where things that can be made again are kept: `$BKD_CACHE`, or `~/.cache/bkd`."""
    return Path(os.environ.get("BKD_CACHE", "~/.cache/bkd")).expanduser()


def require_writable(folder: Path) -> None:
    """Refuse an output folder that could not be made.

    Raises:
        OutputError: If it is a file, or lies where nothing can be written.
    """
    if folder.is_file():
        raise OutputError("the output folder is a file", where=folder, remedy="choose another -o")
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OutputError("nothing can be written there", where=there, got=f"-o {folder}", remedy="choose another -o")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file as a whole; its folder is made when missing."""
    with replace_file(path) as stream:
        stream.write(text.encode("utf-8"))


@contextmanager
def replace_file(path: Path, *, one_of_many: bool = False) -> Iterator[BinaryIO]:
    """Write a file as a whole: it gets its name when the block ends well, and is removed when it does not.

    Processes that write the same file at the same time do not meet: the last one's stays.

    Args:
        path: The file.
        one_of_many: Whether it is one of thousands that are easily made again: then nothing waits for the disk, and
            what killed processes left is not looked for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not one_of_many:
        _remove_abandoned(path)
    unfinished = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{threading.get_ident()}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            if not one_of_many:
                os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def proved_file(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder beside its place, for readers that go by names or must see it whole.

    It gets to its place when the block ends well, and is removed when it does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    prefix, suffix = f".{path.name}.{_host()}.{os.getpid()}.", ".unfinished"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix, suffix=suffix) as beside:
        unfinished = Path(beside) / path.name
        yield unfinished
        unfinished.chmod(0o644)  # safetensors writes files that nobody else can read
        with unfinished.open("rb") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(path)


def _remove_abandoned(path: Path) -> None:
    """Delete what processes of this machine that were killed had written of a file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_host()}.*.unfinished"):
        process = left.name.split(".")[-3]
        if Path("/proc").exists() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _host() -> str:
    """Folders may be shared by machines, on which process numbers mean others."""
    return socket.gethostname().replace(".", "-")
