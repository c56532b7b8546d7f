"""Weights that somebody else published, from files on this machine, without running code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from bkd.errors import DataError

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Which of several is meant, as open_clip decides it."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def find_clip_weights(clip: Path, *, example: str) -> Path:
    """The weight file that a path to an open_clip model means.

    Args:
        clip: Folder with `open_clip_config.json` and weights, or a weight file.
        example: What to download where there is none.

    Raises:
        DataError: If there is none, or more than one.
    """
    if clip.is_file() and clip.suffix in WEIGHT_SUFFIXES:
        return clip
    if not clip.is_dir():
        raise DataError(
            "no CLIP weights there",
            where=clip,
            got="another kind of file" if clip.exists() else "no such file or folder",
            allowed=f"a folder with {CONFIG_FILE}, or a weight file ({', '.join(WEIGHT_SUFFIXES)})",
            remedy=f"download {example} and give its path; names on the Hub are not looked up",
        )
    found = sorted(path for path in clip.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    found = [clip / name for name in WEIGHT_FILES if clip / name in found][:1] or found
    if len(found) != 1:
        raise DataError(
            "several weight files, and it is not clear which" if found else "a CLIP folder without weights",
            where=clip,
            got=", ".join(path.name for path in found or sorted(clip.iterdir())) or "an empty folder",
            allowed=" or ".join(WEIGHT_FILES),
            remedy="give the path of the one that is meant" if found else f"download {example}",
        )
    return found[0]


def read_tensors(file: Path, *, remedy: str | None = None) -> dict[str, Tensor]:
    """Named tensors of a file, on the CPU.

    Args:
        file: `.safetensors`, or a PyTorch file that holds tensors and nothing else.
        remedy: What to do about a file that holds code.

    Raises:
        DataError: If it is damaged, or holds anything else.
    """
    if _is_torchscript(file):
        raise DataError("a TorchScript archive, which holds code", where=file, remedy=remedy)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            # Many published weights exist only as pickles. weights_only makes tensors and plain containers of them
            # and executes no code; anything else in the file is an error.
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make readers raise nearly anything
        # torch's own sentence would advise to let the file run code.
        reason = "not tensors alone" if isinstance(error, UnpicklingError) else str(error) or type(error).__name__
        reason = reason.strip().splitlines()[0]
        raise DataError("weights cannot be read", where=file, got=reason, remedy="download the file again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise DataError("a weight file must hold named tensors and nothing else", where=file)
    return tensors


def _is_torchscript(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # no archive, or a damaged one: its reader says what is wrong
        return False
