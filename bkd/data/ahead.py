"""Do work in threads ahead of its use, in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
ASK_SECONDS = 0.5
"""How often a reader that waits asks whether it still should."""
LEAVE_SECONDS = 2.0
"""How long a call that runs is waited for at the end, before it is left to itself."""


def map_ahead(function: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int) -> Generator[R, None, None]:
    """`map`, with up to `ahead` results computed by `workers` threads before they are asked for.

    The order is that of `items` whatever the number of workers. An exception is raised where its result was due;
    closing the iterator waits for the calls that run and drops the others.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(remaining, ahead))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def read_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    ahead: int,
    while_waiting: Callable[[], None] = lambda: None,
) -> Generator[R, None, None]:
    """`map` by one thread, for calls that may hang, as on a server that does not answer.

    An exception is raised where its result was due, and ends the thread. A call that hangs holds up neither the
    closing of the iterator nor the end of the process.

    Args:
        function: Called in the thread.
        items: Its arguments.
        ahead: Results computed before they are asked for.
        while_waiting: Called from time to time while the next result is not there; what it raises ends the iterator.
    """
    results: queue.SimpleQueue[Future[R] | None] = queue.SimpleQueue()
    free, closed = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        for item in items:
            free.acquire()
            if closed.is_set():
                return
            result: Future[R] = Future()
            try:
                result.set_result(function(item))
            except BaseException as error:
                result.set_exception(error)
            results.put(result)
            if result.exception():
                return
        results.put(None)

    # Python waits at its end for the threads of a pool, but not for this one.
    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                result = results.get(timeout=ASK_SECONDS)
            except queue.Empty:
                while_waiting()
                continue
            if result is None:
                return
            free.release()
            yield result.result()
    finally:
        closed.set()
        free.release()
        thread.join(LEAVE_SECONDS)
