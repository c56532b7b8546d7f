"""Peak memory of one kind of call, in a process that does nothing else: `python -m bkd.eval.peak_memory JSON`."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bkd.errors import ModelError


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that a model took.

    Attributes:
        peak_bytes: By the allocator on CUDA; resident memory of the process, libraries included, elsewhere.
        before_bytes: Of it, what was there before the model was loaded.
    """

    peak_bytes: int
    before_bytes: int


def measure_peak(
    folder: Path, case: Mapping[str, Any], *, num_inference_steps: int, guidance_scale: float, device: torch.device
) -> PeakMemory:
    """Load a model in a fresh process, make a call twice, and ask what it took.

    Args:
        folder: Pipeline folder.
        case: `part`, `batch` and `dtype` of the call.
        num_inference_steps: Of a pipeline.
        guidance_scale: Of a pipeline.
        device: Where.

    Raises:
        ModelError: If the process fails, as it does when memory runs out.
    """
    job = {
        "folder": str(folder),
        "case": dict(case),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "bkd.eval.peak_memory", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ModelError("peak memory could not be measured", where=folder, got=said[-1], remedy="add --no-memory")
    return PeakMemory(**json.loads(done.stdout.strip().splitlines()[-1]))


def process_peak() -> int:
    """Most resident bytes of this process so far.

    Linux hands `ru_maxrss` on from the process that started this one; its own count is in /proc.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measure(job: Mapping[str, Any]) -> PeakMemory:
    from bkd.eval.speed import Case, SpeedWish, call_of
    from bkd.models import DTYPES, load_pipeline

    device, case = torch.device(job["device"]), Case(**job["case"])
    torch.set_num_threads(job["threads"])
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else process_peak()
    pipe = load_pipeline(Path(job["folder"]), dtype=DTYPES[case.dtype], device=device)
    wish = SpeedWish(num_inference_steps=job["num_inference_steps"], guidance_scale=job["guidance_scale"])
    call = call_of(case, pipe, wish)
    for _ in range(2):
        call()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak()
    return PeakMemory(peak, before)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(vars(_measure(json.loads(sys.argv[1])))) + "\n")
