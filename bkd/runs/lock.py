"""One live run per folder: a lock that says who holds it, and expires when its holder is gone.

A lock of the operating system would not do: run folders lie on network file systems, and what a lost machine held must
not block the next one for ever. So the holder touches its lock file again and again; one that has not been touched for
a while, or whose process is gone from this machine, is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from bkd.errors import OutputError

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 10.0
EXPIRES_SECONDS = 120.0


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Hold a run folder, which must exist, for as long as the context lasts.

    Raises:
        OutputError: If another live process holds it.
    """
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().isoformat(timespec="seconds")}
    lock, candidate = folder / LOCK_FILE, folder / f".{LOCK_FILE}.{ours['host']}.{ours['pid']}"
    _take(lock, candidate, ours)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(lock, ours, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(lock) == ours:
            lock.unlink(missing_ok=True)


def require_not_held(folder: Path) -> None:
    """Refuse a folder that a live run holds.

    Raises:
        OutputError: Naming host, process, start and last sign of life.
    """
    lock = folder / LOCK_FILE
    holder = _read(lock)
    if holder is None:
        return
    probe = folder / f".{LOCK_FILE}.probe.{os.getpid()}"
    try:
        age = _age(lock, probe)
    finally:
        probe.unlink(missing_ok=True)
    if age is not None and _is_alive(holder, age):
        _refuse(lock, holder, age)


def _take(lock: Path, candidate: Path, ours: dict[str, Any]) -> None:
    """Make the lock ours, by a link: file systems make those only where there is nothing yet."""
    candidate.write_text(json.dumps(ours))
    try:
        while True:
            with suppress(FileExistsError):
                os.link(candidate, lock)
                return
            holder, age = _read(lock), _age(lock, candidate)
            if holder is None or age is None:
                continue  # it was let go of just now
            if _is_alive(holder, age):
                _refuse(lock, holder, age)
            _remove(lock, holder)
    finally:
        candidate.unlink(missing_ok=True)


def _remove(lock: Path, holder: dict[str, Any]) -> None:
    """Remove a dead holder's lock; one that another process has just made instead is put back."""
    aside = lock.with_name(f".{LOCK_FILE}.dead.{os.getpid()}")
    with suppress(FileNotFoundError):
        lock.rename(aside)
        if _read(aside) != holder:
            with suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _beat(lock: Path, ours: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # a file system that is away for a moment
            if _read(lock) == ours:
                os.utime(lock)


def _read(lock: Path) -> dict[str, Any] | None:
    try:
        holder: dict[str, Any] = json.loads(lock.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {"host": "unknown", "pid": 0, "since": "unknown"}
    return holder


def _age(lock: Path, probe: Path) -> float | None:
    """Seconds since the last sign of life, by the clock of the file system: machines' clocks differ."""
    probe.touch()
    try:
        return probe.stat().st_mtime - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_alive(holder: dict[str, Any], age: float) -> bool:
    if age > EXPIRES_SECONDS:
        return False
    if holder["host"] != socket.gethostname():
        return True
    if holder["pid"] == os.getpid():
        return False  # left by a process that had our number, as in a restarted container
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refuse(lock: Path, holder: dict[str, Any], age: float) -> None:
    raise OutputError(
        "another process is working on this run",
        where=lock.parent,
        got=f"process {holder['pid']} on {holder['host']} since {holder['since']}; last sign of life {age:.0f} s ago",
        remedy=f"wait for it or stop it; without a sign of life for {EXPIRES_SECONDS:.0f} s its place can be taken",
    )
