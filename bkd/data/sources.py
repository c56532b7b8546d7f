"""Where a shard comes from: a file here, or an address that is copied whole before it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A shard.

    Attributes:
        path: Of the tar.
    """

    path: Path
    is_remote = False

    @property
    def name(self) -> str:
        return self.path.name

    def identity(self) -> str:
        raise NotImplementedError

    @contextmanager
    def hold(self) -> Iterator[Path]:
        """The shard on this machine, for as long as the block lasts."""
        yield self.path
