"""Do work in threads ahead of its use, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
ASK_SECONDS = 0.5


def map_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    ahead: int,
    while_waiting: Callable[[], None] = lambda: None,
) -> Generator[R, None, None]:
    """`map`, with up to `ahead` results computed by `workers` threads before they are asked for.

    The order is that of `items` whatever the number of workers. An exception is raised where its result was due;
    closing the iterator waits for the calls that run and drops the others.

    Args:
        function: Called in the threads.
        items: Its arguments.
        workers: Threads.
        ahead: Results.
        while_waiting: Called twice a second while a result that is due is not there. What it raises ends the
            iterator without waiting for the calls that run.
    """
    remaining = iter(items)
    pool, waits = ThreadPoolExecutor(workers), True
    try:
        pending: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(remaining, ahead))
        while pending:
            waits = False
            while not wait([pending[0]], timeout=ASK_SECONDS).done:
                while_waiting()
            waits = True
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)
