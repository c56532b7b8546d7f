"""Memory of training at the size of Stable Diffusion 1.x, counted from configurations alone.

    python tools/bench_memory.py [RECIPE] [--batches 1 2 4 8 16] [key=value …]

What follows goes to `bkd bench memory RECIPE --count`; the teacher is a folder without weights, made for the occasion.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from architectures import SD1
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from bkd.locate import locate

LEVELS = 4


def make_configurations(folder: Path) -> None:
    """A pipeline folder of Stable Diffusion 1.x's sizes, without weights."""
    shutil.copytree(locate("shapes"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    text.architectures = ["CLIPTextModel"]
    text.save_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        UNet2DConditionModel(**SD1).save_config(folder / "unet")
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * LEVELS,
            up_block_types=["UpDecoderBlock2D"] * LEVELS,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
        ).save_config(folder / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="sd15/guided-lora")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    args, wishes = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        teacher = Path(scratch) / "teacher"
        make_configurations(teacher)
        batches = [word for batch in args.batches for word in ("--batch", str(batch))]
        command = [sys.executable, "-m", "bkd", "bench", "memory", args.recipe, f"teacher.id={teacher}", *wishes]
        subprocess.run([*command, "--count", *batches], check=True)


if __name__ == "__main__":
    main()
