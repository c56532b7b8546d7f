"""Checkpoints of a stage: written whole or not at all, found again by the number of their step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that step `step + 1` needs; random numbers and data order are functions of the step.

    Attributes:
        step: Optimizer steps done.
        trainable: Trainable parameters by name.
        ema: Their averages by name; empty without EMA.
        optimizer: The optimizer's state dict.
        scaler: The loss scaler's state, for float16 training.
    """

    step: int
    trainable: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/<step>/` and remove all but the newest `keep` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{checkpoint.step:08d}"
    unfinished = folder / f"{final.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    save_file(_contiguous(checkpoint.trainable), unfinished / "trainable.safetensors")
    save_file(_contiguous(checkpoint.ema), unfinished / "ema.safetensors")
    torch.save(dict(checkpoint.optimizer), unfinished / "optimizer.pt")
    state = {"step": checkpoint.step, "scaler": dict(checkpoint.scaler), "num_threads": torch.get_num_threads()}
    (unfinished / STATE_FILE).write_text(json.dumps(state))
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_newest_checkpoint(folder: Path, device: torch.device) -> Checkpoint | None:
    """The checkpoint with the most steps, or None before the first."""
    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    state = json.loads((newest / STATE_FILE).read_text())
    return Checkpoint(
        step=state["step"],
        trainable=load_file(newest / "trainable.safetensors", device=str(device)),
        ema=load_file(newest / "ema.safetensors", device=str(device)),
        optimizer=torch.load(newest / "optimizer.pt", map_location=device, weights_only=True),
        scaler=state["scaler"],
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"*/{STATE_FILE}") if path.parent.name.isdigit())


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
