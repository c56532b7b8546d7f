"""Memory of training at the size of Stable Diffusion 1.x, counted from configurations, or measured on random weights.

    python tools/bench_memory.py [key=value …] [--recipe sd15/guided-lora] [--batches 1 2 4 8 16] [--measure]

The first go to `bkd bench memory RECIPE`, with `--count` or without; the teacher is made for the occasion.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from architectures import SD1, SD1_TEXT, SD1_VAE
from bench_prune import make_teacher
from bench_speed import make_other_parts_real
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from bkd.models.locate import locate


def make_configurations(folder: Path) -> None:
    """A pipeline folder of Stable Diffusion 1.x's sizes, without weights."""
    shutil.copytree(locate("shapes"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    text = CLIPTextConfig(**SD1_TEXT)
    text.architectures = ["CLIPTextModel"]
    text.save_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        UNet2DConditionModel(**SD1).save_config(folder / "unet")
        AutoencoderKL(**SD1_VAE).save_config(folder / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="sd15/guided-lora")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--measure", action="store_true", help="real steps, in fresh processes")
    args, wishes = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        teacher = Path(scratch) / "teacher"
        if args.measure:
            make_teacher(teacher, "sd1", torch.float32)
            make_other_parts_real(teacher)
        else:
            make_configurations(teacher)
        batches = [word for batch in args.batches for word in ("--batch", str(batch))]
        command = [sys.executable, "-m", "bkd", "bench", "memory", args.recipe, f"teacher.id={teacher}", *wishes]
        sys.exit(subprocess.run([*command, *batches, *([] if args.measure else ["--count"])]).returncode)


if __name__ == "__main__":
    main()
