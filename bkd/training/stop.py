"""Requests to stop: Ctrl-C, and the signals by which schedulers announce that they will take the machine away."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; `kill`, container platforms; SLURM's `--signal=USR1@300`."""


class Interrupted(Exception):
    """A request to stop was granted: a checkpoint has been written, and the same command continues."""


class StopSignal:
    """Turns the first signal into a request to stop after the current step; a second Ctrl-C stops at once."""

    def __enter__(self) -> StopSignal:
        self.requested = False
        self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
