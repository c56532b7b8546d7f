"""Time and peak memory of `bkd prune` on a teacher of real size with random weights.

    python tools/bench_prune.py [--family sd1|sdxl] [--dtype float32|float16] [--blocks sd-small]

The teacher is made first, in a folder of its own; then `bkd prune` runs as a user would run it, and the resident memory
of its whole process tree is sampled every 20 ms. Shared pages of mapped files count once for each process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from architectures import SD1, SDXL
from diffusers import UNet2DConditionModel

from bkd.models.locate import locate


def make_teacher(folder: Path, family: str, dtype: torch.dtype) -> int:
    """A pipeline folder with a UNet of the real architecture and the embedded pipeline's other parts.

    Returns:
        Bytes of the UNet's weights.
    """
    shutil.copytree(locate("shapes"), folder, ignore=shutil.ignore_patterns("unet", "README.md"))
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({"sdxl": SDXL, "sd1": SD1}[family])
    unet = unet.to(dtype).to_empty(device="cpu")
    for parameter in unet.parameters():
        torch.nn.init.trunc_normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    unet.save_pretrained(folder / "unet", safe_serialization=True, max_shard_size="50GB")
    if family == "sdxl":
        add_second_encoder(folder)
    return sum(parameter.nbytes for parameter in unet.parameters())


def add_second_encoder(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, folder / f"{part}_2")
        index[f"{part}_2"] = index[part]
    index |= {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }
    index.pop("safety_checker", None), index.pop("requires_safety_checker", None)
    (folder / "model_index.json").write_text(json.dumps(index))


def tree_memory(process: psutil.Process) -> int:
    """Resident bytes of a process and its descendants."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a command."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command) as running:
        while running.poll() is None:
            try:
                peak = max(peak, tree_memory(psutil.Process(running.pid)))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
    if running.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.monotonic() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd1", "sdxl"), default="sd1")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--blocks", default="sd-small")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        teacher, student = Path(scratch) / "teacher", Path(scratch) / "student"
        size = make_teacher(teacher, args.family, getattr(torch, args.dtype))
        bkd = [sys.executable, "-m", "bkd"]
        for name, command in (
            ("inspect", ["inspect", str(teacher), "--json"]),
            ("prune --dry-run", ["prune", str(teacher), "--blocks", args.blocks, "--dry-run"]),
            ("prune", ["prune", str(teacher), "--blocks", args.blocks, "-o", str(student)]),
        ):
            seconds, peak = measure(bkd + command)
            print(f"{name}: {seconds:.1f} s, peak {peak / 2**20:,.0f} MiB, {peak / size:.2f} x the teacher's UNet")


if __name__ == "__main__":
    main()
