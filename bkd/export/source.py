"""What an export starts from: a student's folder and its UNet, with averaged weights or with those of the last step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from bkd.errors import ModelError
from bkd.lora.adapter_file import ADAPTER_FILE, Adapter
from bkd.lora.adapters import merged
from bkd.models.folder import model_digest
from bkd.models.load import load_unet
from bkd.models.locate import locate, locate_teacher
from bkd.runs.folder import STARTING_STUDENT, RunFolder, finished_or_student
from bkd.runs.stage_setup import start_student, with_trained
from bkd.training.checkpoint import Checkpoints


@dataclass(frozen=True)
class Source:
    """A student to hand on.

    Attributes:
        folder: Its pipeline folder.
        run: The finished run that made it; None where a folder is all there is.
        raw: Trained tensors of the last step by name, in place of their averages; None for the student as it is.
    """

    folder: Path
    run: RunFolder | None
    raw: Mapping[str, Tensor] | None

    @classmethod
    def of(cls, path: Path, *, raw: bool = False) -> Source:
        """What a run or a student's folder holds.

        Args:
            path: Of either.
            raw: Whether the weights of the last step are wanted, and not their averages.

        Raises:
            BkdError: If it is neither, is not finished, or keeps no raw weights.
        """
        run = finished_or_student(path)
        return cls(locate(path), run, _last_step(path, run) if raw else None)

    def unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """On the CPU, adapters merged."""
        if self.raw is None:
            return load_unet(self.folder, dtype)
        assert self.run is not None  # nothing else keeps raw weights
        adapted = self.run.recipe().stages[-1].lora is not None
        unet = with_trained(self._start(self.run) if adapted else load_unet(self.folder), self.raw)
        return (merged(unet) if adapted else unet).to(dtype)

    def adapter(self, run: RunFolder) -> Adapter:
        """What trained through adapters, with the weights wanted."""
        adapter = Adapter.load(run.path / ADAPTER_FILE)
        return adapter if self.raw is None else replace(adapter, tensors=self.raw)

    def _start(self, run: RunFolder) -> UNet2DConditionModel:
        """The adapted network that the last stage began with."""
        recipe, adapter = run.recipe(), self.adapter(run)
        stage = recipe.stages[-1]
        if stage.student.path is not None:
            _require_same_start(run, stage.student.path)
        teacher = checked_teacher(run, adapter)
        return start_student(load_unet(teacher), adapter.plan, stage, recipe.seed)


def checked_teacher(run: RunFolder, adapter: Adapter) -> Path:
    """The folder of the teacher that a run's adapters were trained on.

    Raises:
        ModelError: If it is not what it was.
    """
    recipe = run.recipe()
    teacher = run.students(recipe)[-2] if len(recipe.stages) > 1 else locate_teacher(recipe.teacher)
    if (digest := model_digest(teacher)) != adapter.teacher_digest:
        raise ModelError(
            "these adapters were trained on another teacher",
            where=run.path / ADAPTER_FILE,
            got=f"{teacher}, SHA-256 {digest}",
            allowed=adapter.teacher_digest,
            remedy="bring the original back, or bkd export RUN --format pipeline",
        )
    return teacher


def _require_same_start(run: RunFolder, path: str) -> None:
    if (digest := model_digest(locate(path))) != (known := run.facts().get(STARTING_STUDENT)):
        raise ModelError(
            "the model that these adapters lie over has changed",
            where=path,
            got=f"SHA-256 {digest}",
            allowed=known,
            remedy="bring the original back, or leave --weights out",
        )


def _last_step(path: Path, run: RunFolder | None) -> Mapping[str, Tensor]:
    """The trained tensors as the optimizer left them, from the newest checkpoint of the last stage."""
    if run is None:
        raise ModelError(
            "a student's folder holds one set of weights",
            where=path,
            got="--weights raw",
            remedy="name the run that made it, or leave --weights out",
        )
    last = run.recipe().last_train
    if not last.ema:
        raise ModelError(
            "this run trained without averaging: its student's weights are the raw ones",
            where=path,
            got="train.ema 0, and --weights raw",
            remedy="leave --weights out",
        )
    checkpoints = Checkpoints(run.checkpoints(len(run.recipe().stages) - 1))
    newest = checkpoints.newest()
    if newest != last.max_steps:
        raise ModelError(
            "this run keeps no checkpoint of its last step, where the raw weights would be",
            where=path / "checkpoints",
            got="none" if newest is None else f"step {newest}",
            allowed=f"step {last.max_steps}",
            remedy="leave --weights out",
        )
    return checkpoints.load(newest).trainable
