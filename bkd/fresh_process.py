"""Measuring in a process of its own, whose memory nothing has touched before."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def measured_alone(module: str, argument: str) -> dict[str, Any]:
    """What a module prints as its last line, a JSON object, when run with one argument.

    Returns:
        It; or `skipped`: why there is nothing.
    """
    done = subprocess.run([sys.executable, "-m", module, argument], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return {"skipped": f"the process was ended by {signal.Signals(-done.returncode).name}; out of memory?"}
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def process_peak() -> int:
    """Most resident bytes of this process so far.

    Linux hands `ru_maxrss` on from the process that started this one; its own count is in /proc.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
