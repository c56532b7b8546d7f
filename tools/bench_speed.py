"""Speed of the presets against their teacher, at the size of Stable Diffusion 1.x, with random weights.

    python tools/bench_speed.py -o FOLDER [arguments of bkd bench speed]

The teacher is made first, then pruned as a user would do it; what follows `-o FOLDER` goes to `bkd bench speed`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from architectures import SD1_TEXT, SD1_VAE
from bench_prune import make_teacher
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args, wishes = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        teacher, students = Path(scratch) / "teacher", [Path(scratch) / preset for preset in PRESETS]
        make_teacher(teacher, "sd1", torch.float32)
        make_other_parts_real(teacher)
        for preset, student in zip(PRESETS, students, strict=True):
            bkd("prune", teacher, "--blocks", preset, "-o", student)
        bkd("bench", "speed", teacher, *students, "-o", args.output, *wishes)


if __name__ == "__main__":
    main()
