"""metrics.jsonl: one line per logged step, every loss term unweighted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bkd.files import write_atomically


class MetricsLog:
    """Append-only record of a run.

    Args:
        path: The file; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, stage: int, step: int) -> None:
        """Drop what was logged after `step` of `stage`: those steps are about to be repeated."""
        kept = [line for line in read_metrics(self._path) if (line["stage"], line["step"]) <= (stage, step)]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: Mapping[str, Any]) -> None:
        # JSON knows no NaN: a step that float16 scaling skipped is logged as null.
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
        with self._path.open("a") as stream:
            stream.write(json.dumps(finite) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All logged lines; a last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if isinstance(line, dict):
            lines.append(line)
    return lines
