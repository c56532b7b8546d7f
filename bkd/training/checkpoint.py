"""Checkpoints of a stage: written whole or not at all, verified before they are used.

<step>/trainable.safetensors  ema.safetensors  optimizer.pt  manifest.json

The manifest names what the run was made of and the digest of every file, and is written last; the folder gets its name
when everything is on the disk. So a kill, a full disk or a lost byte costs the newest checkpoint at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bkd.errors import OutputError, TrainingError
from bkd.files import file_digest

MANIFEST = "manifest.json"
TRAINABLE, EMA, OPTIMIZER = "trainable.safetensors", "ema.safetensors", "optimizer.pt"
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that step `step + 1` needs; random numbers and data order are functions of the step.

    Attributes:
        step: Optimizer steps done.
        trainable: Trainable parameters by name, in full.
        ema: Their averages by name; empty without EMA.
        optimizer: State of each parameter by name.
        scaler: The loss scaler's state, for float16 training.
    """

    step: int
    trainable: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: Where they lie.
        identity: What a checkpoint belongs to: name -> digest, of plan, teacher and data.
        keep: How many to keep.
        force: Whether to continue from checkpoints of another identity.
        on_damaged: Told of each checkpoint that cannot be used, in a sentence.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str] | None = None,
        *,
        keep: int = 2,
        force: bool = False,
        on_damaged: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder, self._identity, self._keep = folder, dict(identity or {}), keep
        self._force, self._on_damaged = force, on_damaged

    def save(self, checkpoint: Checkpoint) -> None:
        """Write one, and remove all but the newest.

        Raises:
            OutputError: If it cannot be written; those before it stay as they are.
        """
        final = self._folder / f"{checkpoint.step:08d}"
        unfinished = final.with_name(final.name + UNFINISHED)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(left)
            unfinished.mkdir()
            self._write(unfinished, checkpoint)
            if final.exists():  # a damaged one, or one of a forced run
                self._discard(final)
            unfinished.rename(final)
            _sync(self._folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            steps = [int(path.name) for path in _in(self._folder)]
            raise OutputError(
                "the checkpoint could not be written",
                where=final,
                got=getattr(error, "strerror", None) or error,
                remedy="make room and run the same command: it continues "
                + (f"after step {steps[-1]}" if steps else "from the start"),
            ) from error
        for old in _in(self._folder)[: -self._keep]:
            self._discard(old)

    def newest(self) -> int | None:
        """Step of the newest valid checkpoint, every byte of it verified; None before the first.

        Raises:
            OutputError: If there are checkpoints and none is valid, or the newest valid one belongs to something else.
        """
        found = _in(self._folder)
        for folder in reversed(found):
            problem = _problem(folder)
            if problem is None:
                self._require_ours(folder)
                return int(folder.name)
            self._on_damaged(f"checkpoint {folder.name} is damaged and is left out: {problem}")
        if found:
            raise OutputError(
                "no checkpoint of this run is valid",
                where=self._folder,
                got=f"{len(found)} damaged",
                remedy="restore one, or add --overwrite to start again",
            )
        return None

    def load(self, step: int) -> Checkpoint:
        """One that `newest` has found, on the CPU."""
        folder = self._folder / f"{step:08d}"
        manifest = json.loads((folder / MANIFEST).read_text())
        averages = folder / EMA
        return Checkpoint(
            step=step,
            trainable=load_file(folder / TRAINABLE),
            ema=load_file(averages) if averages.exists() else {},
            optimizer=torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True),
            scaler=manifest["scaler"],
        )

    def _write(self, folder: Path, checkpoint: Checkpoint) -> None:
        save_file(_contiguous(checkpoint.trainable), folder / TRAINABLE)
        if checkpoint.ema:
            save_file(_contiguous(checkpoint.ema), folder / EMA)
        torch.save(dict(checkpoint.optimizer), folder / OPTIMIZER)
        manifest = {
            "step": checkpoint.step,
            "identity": self._identity,
            "scaler": dict(checkpoint.scaler),
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "files": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
        }
        (folder / MANIFEST).write_text(json.dumps({**manifest, "digest": _digest(manifest)}, indent=2) + "\n")
        for path in (*folder.iterdir(), folder):
            _sync(path)

    def _discard(self, folder: Path) -> None:
        """Under another name first: a kill halfway must not leave something that looks like a checkpoint."""
        doomed = folder.with_name(f"{folder.name}.removed{UNFINISHED}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _require_ours(self, folder: Path) -> None:
        theirs = json.loads((folder / MANIFEST).read_text())["identity"]
        differing = [name for name in self._identity if theirs.get(name) != self._identity[name]]
        if differing and not self._force:
            raise OutputError(
                f"this checkpoint was made with another {' and another '.join(differing)}",
                where=folder,
                got="; ".join(f"{name} {theirs.get(name)}" for name in differing),
                allowed="; ".join(f"{name} {self._identity[name]}" for name in differing),
                remedy="choose another -o, or add --force to continue from these weights all the same",
            )


def _in(folder: Path) -> list[Path]:
    """A stage's checkpoints, the newest last, whether they are damaged or not."""
    return sorted(path for path in folder.glob("*") if path.name.isdigit() and path.is_dir())


def newest_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape in the newest checkpoint of a stage, whether it is damaged or not; empty without one."""
    for checkpoint in reversed(_in(folder)):
        with suppress(OSError, SafetensorError), safe_open(checkpoint / TRAINABLE, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    return {}


def require_fitting(theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Refuse a checkpoint whose weights are those of another student; `--force` may lead here.

    Args:
        theirs: Parameter name -> shape in the checkpoint.
        ours: The same of the student.
        where: To find the checkpoint.

    Raises:
        TrainingError: Naming one that differs.
    """
    if differing := [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]:
        raise TrainingError(
            "the checkpoint's weights do not fit this student",
            where=where,
            got=f"{len(differing)} tensors differ, such as {min(differing)}",
            remedy="give the student the blocks and adapters it had, or --overwrite to start again",
        )


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        digest = manifest.pop("digest")
        if digest != _digest(manifest) or manifest["step"] != int(folder.name):
            return f"{MANIFEST} has changed"
        for name, expected in manifest["files"].items():
            if file_digest(folder / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
