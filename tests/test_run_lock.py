"""Two live runs never share a folder, and a dead one never blocks it."""

import json
import multiprocessing
import os
import socket
import time

import pytest

from bkd.errors import OutputError
from bkd.runs.lock import EXPIRES_SECONDS, LOCK_FILE, hold_run, require_not_held

US = {"host": socket.gethostname(), "pid": os.getppid(), "since": "2026-01-01T00:00:00"}
"""A live process of this machine that is not this one."""


def leave(folder, holder, age=0.0):
    lock = folder / LOCK_FILE
    lock.write_text(json.dumps(holder))
    os.utime(lock, (time.time() - age,) * 2)
    return lock


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_folder_is_held_and_let_go_of(tmp_path):
    with hold_run(tmp_path):
        assert names(tmp_path) == [LOCK_FILE]
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not names(tmp_path)


@pytest.mark.parametrize("holder", [US, {**US, "host": "elsewhere"}])
def test_a_live_holder_is_named(tmp_path, holder):
    leave(tmp_path, holder, age=5)
    for attempt in (lambda: require_not_held(tmp_path), lambda: hold_run(tmp_path).__enter__()):
        with pytest.raises(OutputError, match=rf"process {holder['pid']} on {holder['host']} since 2026") as refused:
            attempt()
        assert "last sign of life 5 s ago" in str(refused.value)
    assert names(tmp_path) == [LOCK_FILE]


@pytest.mark.parametrize(
    ("holder", "age"),
    [
        ({**US, "pid": 2**22 + 1}, 0),  # killed, on this machine
        ({**US, "pid": os.getpid()}, 0),  # a container that was restarted
        ({**US, "host": "elsewhere"}, EXPIRES_SECONDS + 5),
        (US, EXPIRES_SECONDS + 5),
    ],
)
def test_a_dead_holder_is_replaced(tmp_path, holder, age):
    leave(tmp_path, holder, age)
    require_not_held(tmp_path)
    with hold_run(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not names(tmp_path)


def test_a_sign_of_life_is_given_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("bkd.runs.lock.HEARTBEAT_SECONDS", 0.01)
    with hold_run(tmp_path):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK_FILE).stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / LOCK_FILE).stat().st_mtime < 5


def test_a_holder_that_lost_its_lock_leaves_the_new_one_alone(tmp_path):
    with hold_run(tmp_path):
        leave(tmp_path, {**US, "host": "elsewhere"})
    assert names(tmp_path) == [LOCK_FILE]


def rush(folder, start, results):
    start.wait()
    try:
        with hold_run(folder):
            results.put("held")
            time.sleep(1)
    except OutputError:
        results.put("refused")


def test_of_many_that_rush_for_a_dead_lock_one_gets_it(tmp_path):
    leave(tmp_path, {**US, "pid": 2**22 + 1})
    context = multiprocessing.get_context("forkserver")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=rush, args=(tmp_path, start, results)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == ["held"] + ["refused"] * 7
