"""Copies of remote files on this machine: whole, in a folder of bounded size, shared by processes, fetched ahead.

One lock file for each copy is all the bookkeeping: who reads a copy holds it jointly, who fetches or removes it holds
it alone, and the system lets go of what a dead process held. In it lies what the server said of the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from bkd.data.indexing import INDEX_SUFFIX
from bkd.data.remote import RemoteFile, describe, fetch, public_name
from bkd.errors import DataError
from bkd.progress import silent

LOCK_SUFFIX = ".lock"
WAIT_SECONDS = 60.0
"""For other processes to let go of a copy."""
POLL_SECONDS = 0.1


class NoRoom(Exception):
    """Everything that could be removed is in use, or wanted."""


class LocalCopies:
    """Local copies of remote files.

    Args:
        folder: For the copies; made when missing, and shared by all processes of a machine.
        max_bytes: For all of them.
        fetch: Copies a file whole or not at all.
        describe: Asks for a file's size and version; once in each process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        fetch: Callable[..., None] = fetch,
        describe: Callable[[str], RemoteFile] = describe,
    ) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._fetch, self._ask = fetch, describe
        self._known: dict[str, RemoteFile] = {}
        self._wanted: tuple[str, ...] = ()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def describe(self, url: str) -> RemoteFile:
        """A file's size and version.

        Raises:
            DataError: If the server does not say.
        """
        if url not in self._known:
            self._known[url] = self._ask(url)
        return self._known[url]

    @contextmanager
    def hold(self, url: str) -> Iterator[Path]:
        """The copy of a file, fetched if need be; it stays for as long as the block lasts.

        Raises:
            DataError: If it cannot be fetched, there is no room for it, or somebody reads an older version of it.
        """
        with self._copied(url, spare=()) as path:
            yield path

    def want(self, urls: Sequence[str]) -> None:
        """Say what will be needed next, in order; it is fetched in the background as far as there is room for it.

        What cannot be fetched is tried again, and refused, when it is held.
        """
        if tuple(urls) == self._wanted or self._closed:
            return
        self._wanted = tuple(urls)
        self._news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="remote shards", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Fetch nothing more in the background; the copies stay."""
        self._closed = True
        self._news.set()

    def _work(self) -> None:
        while self._news.wait() and not self._closed:
            self._news.clear()
            wanted = self._wanted
            for url in wanted:
                if self._closed or wanted != self._wanted:
                    break
                try:
                    with self._copied(url, spare=wanted):
                        pass
                except NoRoom:
                    break
                except Exception:  # it comes up again, and is raised, when the file is held
                    continue

    @contextmanager
    def _copied(self, url: str, *, spare: Sequence[str]) -> Iterator[Path]:
        """The copy of a file, held jointly.

        Args:
            url: Address.
            spare: What must not be removed to make room; if there is any, no room is `NoRoom` at once.
        """
        remote = self.describe(url)
        path = self._folder / local_name(url)
        with _opened(_lock_file(path)) as lock:
            give_up = None
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits for whoever fetches it
            while not _is_copy_of(path, lock, remote):
                if _try_alone(lock):
                    if not _is_copy_of(path, lock, remote):  # nobody else was faster
                        self._fetch_copy(url, path, lock, remote, spare)
                else:  # somebody was faster, or reads an older version
                    give_up = give_up or time.monotonic() + WAIT_SECONDS
                    if time.monotonic() > give_up:
                        raise DataError(
                            "another process reads an older version of a remote file",
                            where=public_name(url),
                            remedy="run the same command again when that process has ended",
                        )
                    time.sleep(POLL_SECONDS)
                fcntl.flock(lock, fcntl.LOCK_SH)  # it may be removed between the two locks, hence the loop
            os.utime(lock.fileno())
            yield path

    def _fetch_copy(self, url: str, path: Path, lock: IO[str], remote: RemoteFile, spare: Sequence[str]) -> None:
        _remove(path)
        self._make_room(url, path, lock, remote, spare)
        try:
            self._fetch(url, path, progress=self._require_open if spare else silent)
            size = path.stat().st_size
            if size != remote.size:
                self._known.pop(url, None)
                _remove(path)
                raise DataError(
                    "remote file changed while it was copied",
                    where=public_name(url),
                    got=f"{size:,} bytes, {remote.size:,} just before",
                    remedy="run the same command again when nobody writes to it any more",
                )
        finally:
            if not path.is_file():
                lock.truncate(0)

    def _require_open(self, done: int, total: int) -> None:
        """Ends a copy in the background when nobody will need it."""
        if self._closed:
            raise NoRoom

    def _make_room(self, url: str, path: Path, lock: IO[str], remote: RemoteFile, spare: Sequence[str]) -> None:
        """Remove copies, the least recently used first, until this one fits; its lock file then claims the room."""
        if remote.size > self._max_bytes:
            raise self._too_small(url, remote.size, "this file alone")
        give_up = time.monotonic() + WAIT_SECONDS
        while True:
            with _opened(self._folder / f"room{LOCK_SUFFIX}") as room:
                fcntl.flock(room, fcntl.LOCK_EX)
                if self._remove_others(path, remote.size, {local_name(other) for other in spare}):
                    lock.seek(0)
                    lock.truncate()
                    lock.write(json.dumps(asdict(remote)))
                    lock.flush()
                    return
            if spare:
                raise NoRoom
            if time.monotonic() > give_up:
                raise self._too_small(url, remote.size, "this file, with all others that are in use")
            time.sleep(POLL_SECONDS)

    def _remove_others(self, path: Path, size: int, spare: set[str]) -> bool:
        sizes = {copy: taken for copy in self._copies() if copy != path and (taken := _taken(copy))}
        excess = sum(sizes.values()) + size - self._max_bytes
        wanted = {local_name(other) for other in self._wanted}
        for copy in sorted(sizes, key=lambda copy: (copy.name in wanted, _last_use(copy))):
            if excess <= 0:
                break
            if copy.name not in spare and _remove_if_unused(copy):
                excess -= sizes[copy]
        return excess <= 0

    def _copies(self) -> Iterator[Path]:
        for lock in self._folder.glob(f"*-*{LOCK_SUFFIX}"):
            yield lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))

    def _too_small(self, url: str, size: int, what: str) -> DataError:
        return DataError(
            "the cache for remote shards is too small",
            where=public_name(url),
            got=f"{size / 2**30:.2f} GiB for {what}",
            allowed=f"{self._max_bytes / 2**30:.2f} GiB",
            remedy="raise data.remote_cache_gib",
        )


def local_name(url: str) -> str:
    """A name for a copy: a digest of the address without the file's name, then that name.

    Files of one folder get the same digest, so a shard and its `_stats.json` lie side by side; others never meet.
    """
    name = public_name(url).rpartition("/")[2]
    before, _, after = url.partition(f"/{name}")
    digest = hashlib.sha256("\n".join((before, after)).encode()).hexdigest()
    return f"{digest[:16]}-{name}"


def _lock_file(path: Path) -> Path:
    return path.with_name(path.name + LOCK_SUFFIX)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """A lock file; what is locked through it is let go of at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        yield lock


def _is_copy_of(path: Path, lock: IO[str], remote: RemoteFile) -> bool:
    lock.seek(0)
    with suppress(ValueError, TypeError, OSError):
        return RemoteFile(**json.loads(lock.read())).is_same(remote) and path.stat().st_size == remote.size
    return False


def _taken(path: Path) -> int:
    """Bytes that a copy takes, or will when it has been fetched."""
    with suppress(OSError):
        return path.stat().st_size
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(_lock_file(path).read_text())["size"])
    return 0


def _last_use(path: Path) -> float:
    with suppress(OSError):
        return _lock_file(path).stat().st_mtime
    return 0.0


def _remove_if_unused(path: Path) -> bool:
    with _opened(_lock_file(path)) as lock:
        if not _try_alone(lock):
            return False
        _remove(path)
        lock.truncate(0)
        return True


def _try_alone(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path) -> None:
    for part in (path, path.with_name(path.name + INDEX_SUFFIX)):
        part.unlink(missing_ok=True)
