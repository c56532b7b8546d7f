"""Peak memory of one kind of call, in a process that does nothing else: `python -m bkd.eval.peak_memory JSON`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bkd.fresh_process import measured_alone, process_peak


def measure_peak(
    folder: Path, case: Mapping[str, Any], *, num_inference_steps: int, guidance_scale: float, device: torch.device
) -> dict[str, Any]:
    """Load a model in a fresh process, make a call twice, and ask what it took.

    Args:
        folder: Pipeline folder.
        case: `part`, `batch` and `dtype` of the call.
        num_inference_steps: Of a pipeline.
        guidance_scale: Of a pipeline.
        device: Where.

    Returns:
        `peak_bytes`, by the allocator on CUDA, resident memory of the process, libraries included, elsewhere; and
        `before_bytes`, what of it was there before the model was loaded. Or why there is nothing: `skipped`.
    """
    job = {
        "folder": str(folder),
        "case": dict(case),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return measured_alone("bkd.eval.peak_memory", json.dumps(job))


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: by the allocator on CUDA, by this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak()


def _measure(job: Mapping[str, Any]) -> dict[str, int]:
    from bkd.eval.speed import Case, SpeedWish, call_of
    from bkd.models.load import DTYPES, load_pipeline

    device, case = torch.device(job["device"]), Case(**job["case"])
    torch.set_num_threads(job["threads"])
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else process_peak()
    pipe = load_pipeline(Path(job["folder"]), dtype=DTYPES[case.dtype], device=device)
    wish = SpeedWish(num_inference_steps=job["num_inference_steps"], guidance_scale=job["guidance_scale"])
    call = call_of(case, pipe, wish)
    for _ in range(2):
        call()
    return {"peak_bytes": peak_bytes(device), "before_bytes": before}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(json.loads(sys.argv[1]))) + "\n")
