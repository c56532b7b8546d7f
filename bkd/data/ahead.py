"""Do work in threads ahead of its use, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
