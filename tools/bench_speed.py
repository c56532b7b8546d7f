"""Speed of students against their teacher, at the size of Stable Diffusion 1.x, with random weights.

    python tools/bench_speed.py -o FOLDER [--students sd-small sd-tiny guided] [arguments of bkd bench speed]

The teacher is made first, then pruned as a user would do it; what is not named above goes to `bkd bench speed`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from architectures import SD1_TEXT, SD1_VAE
from bench_prune import make_teacher
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from bkd.runs.stage_setup import GUIDANCE_DIM

PRESETS = ("sd-small", "sd-tiny")


def bkd(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "bkd", *map(str, arguments)], check=True)


def make_other_parts_real(folder: Path) -> None:
    """Text encoder and autoencoder of Stable Diffusion 1.x, with random weights, in place of small ones."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(CLIPTextConfig(**SD1_TEXT)).save_pretrained(folder / "text_encoder")
    AutoencoderKL(**SD1_VAE).save_pretrained(folder / "vae")


def make_guided(teacher: Path, folder: Path) -> None:
    """The teacher with an input for the guidance scale: what a guided student is before it has learnt anything."""
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("unet"))
    unet = UNet2DConditionModel.from_pretrained(
        teacher / "unet", time_cond_proj_dim=GUIDANCE_DIM, low_cpu_mem_usage=False
    )
    unet.save_pretrained(folder / "unet")


def make_student(teacher: Path, name: str, folder: Path) -> Path:
    if name == "guided":
        make_guided(teacher, folder)
    else:
        bkd("prune", teacher, "--blocks", name, "-o", folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--students", nargs="+", choices=(*PRESETS, "guided"), default=PRESETS)
    args, wishes = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        teacher = Path(scratch) / "teacher"
        make_teacher(teacher, "sd1", torch.float32)
        make_other_parts_real(teacher)
        students = [make_student(teacher, name, Path(scratch) / name) for name in args.students]
        bkd("bench", "speed", teacher, *students, "-o", args.output, *wishes)


if __name__ == "__main__":
    main()
