"""Requests to stop: Ctrl-C, and the signals by which schedulers announce that they will take the machine away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; `kill`, container platforms; SLURM's `--signal=USR1@300`."""


class Interrupted(Exception):
    """A request to stop was granted: all that was done is on the disk, and the same command continues."""


class StopSignal:
    """Turns signals into a request to stop, for as long as the context lasts.

    It is granted at once, by `Interrupted`, where nothing is lost by that: whatever is written before training is
    written whole or not at all. While steps are trained it waits for the end of one; a Ctrl-C after that does not.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waits = False

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For as long as this lasts, requests are kept in `requested`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self._waits:
            raise Interrupted
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
