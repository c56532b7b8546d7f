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
from bench_prune import make_teacher
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

LEVELS = 4
PRESETS = ("sd-small", "sd-tiny")


def bkd(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "bkd", *map(str, arguments)], check=True)


def make_other_parts_real(folder: Path) -> None:
    """Text encoder and autoencoder of Stable Diffusion 1.x, with random weights, in place of small ones."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * LEVELS,
        up_block_types=["UpDecoderBlock2D"] * LEVELS,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        sample_size=512,
    ).save_pretrained(folder / "vae")


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
