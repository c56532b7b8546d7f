"""`00000_stats.json` beside `00000.tar`: what the writer of a shard says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bkd.data.metadata import parse_metadata


def stats_file(shard: Path) -> Path:
    """img2dataset's name for it."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}_stats.json")


def shard_stats(shard: Path) -> dict[str, Any]:
    """`successes` (samples in the tar), and from bkd `sha256` of the tar; empty where there is no such file."""
    try:
        return parse_metadata(stats_file(shard).read_bytes()) or {}
    except OSError:
        return {}
