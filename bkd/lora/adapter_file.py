"""What an adapted training leaves beside its student: the tensors that trained, and what they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from bkd.errors import ModelError
from bkd.files import replace_file
from bkd.lora.adapters import add_adapters, trained_tensors
from bkd.recipe.lora import Lora
from bkd.surgery.plan import RemovalPlan

ADAPTER_FILE = "adapter.safetensors"


@dataclass(frozen=True)
class Adapter:
    """Trained tensors of an adapted student, by the names they train under.

    Attributes:
        tensors: Adapters, and what trained without one; float32.
        lora: How they were made.
        plan: How the student came from the teacher.
        teacher_digest: SHA-256 of the teacher.
    """

    tensors: Mapping[str, Tensor]
    lora: Lora
    plan: RemovalPlan
    teacher_digest: str

    @property
    def beside(self) -> list[str]:
        """Names of tensors that trained without an adapter."""
        return [name for name in self.tensors if ".lora_" not in name]

    def save(self, path: Path) -> None:
        """Write one file, or nothing."""
        facts = {
            "lora": asdict(self.lora),
            "plan": json.loads(self.plan.to_json()),
            "teacher_digest": self.teacher_digest,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with replace_file(path) as stream:
            stream.write(save(tensors, metadata={"bkd": json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """Read one.

        Raises:
            ModelError: If it is not there, or cannot be read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts: dict[str, Any] = json.loads((file.metadata() or {})["bkd"])
            return cls(
                load_file(path),
                TypeAdapter(Lora).validate_json(json.dumps(facts["lora"]), strict=True),
                RemovalPlan.from_json(json.dumps(facts["plan"])),
                facts["teacher_digest"],
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                "this adapter cannot be read", where=path, got=f"{type(error).__name__}: {error}", remedy="train again"
            ) from error

    def put_on(self, student: UNet2DConditionModel) -> None:
        """Give a student these adapters.

        Args:
            student: As the plan builds it, without adapters; changed in place.

        Raises:
            ModelError: If they are another student's.
        """
        add_adapters(student, self.lora)
        ours = trained_tensors(student)
        differing = [
            name
            for name in ours.keys() | self.tensors.keys()
            if name not in ours or name not in self.tensors or ours[name].shape != self.tensors[name].shape
        ]
        if differing:
            raise ModelError(
                "this adapter is another student's", got=f"{len(differing)} tensors differ, such as {min(differing)}"
            )
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                ours[name].copy_(tensor)
