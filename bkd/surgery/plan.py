"""RemovalPlan: what a student is, as pure data.

A model is a configuration and weights. A plan says how the student's configuration differs from its teacher's, which
teacher tensor each student tensor starts from, and which activations of the two belong together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Sites = Literal["block", "bk"]
"""Which activations feature KD compares: after every block (Segmind), or BK-SDM's own choice."""

PLAN_FILE = "bkd_plan.json"


@dataclass(frozen=True)
class FeaturePair:
    """Two modules whose outputs should agree, by module path."""

    teacher: str
    student: str


@dataclass(frozen=True, kw_only=True)
class RemovalPlan:
    """How to make a student from a teacher; a plan that removes nothing describes the teacher itself.

    Attributes:
        name: The preset's name, or the list of removed units.
        removed: What the student lacks; see `bkd.surgery.units`.
        partners: Those of the removed units that nobody named but that had to go along.
        removed_modules: The teacher's modules that the student lacks, by module path.
        overrides: Keyword arguments for `from_config`, read back from the built model and compared.
        renamed: Student module prefix -> teacher module prefix; what is not listed keeps its name.
        feature_pairs: For each choice of sites, the pairs from input to output.
    """

    name: str
    removed: tuple[str, ...]
    overrides: Mapping[str, Any]
    renamed: Mapping[str, str]
    feature_pairs: Mapping[Sites, tuple[FeaturePair, ...]]
    partners: tuple[str, ...] = ()
    removed_modules: tuple[str, ...] = ()

    def source_of(self, student_key: str) -> str:
        """The teacher's name for a tensor or module of the student: one map for weights and for LoRA tensors."""
        parts = student_key.split(".")
        for length in range(len(parts), 0, -1):
            prefix = ".".join(parts[:length])
            if prefix in self.renamed:
                return ".".join([self.renamed[prefix], *parts[length:]])
        return student_key

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RemovalPlan:
        """Read a plan; the further facts of a plan file, such as costs, are left aside."""
        raw = {key: value for key, value in json.loads(text).items() if key in cls.__dataclass_fields__}
        pairs = {sites: tuple(FeaturePair(**pair) for pair in listed) for sites, listed in raw["feature_pairs"].items()}
        units = {key: tuple(raw.get(key, ())) for key in ("removed", "partners", "removed_modules")}
        return cls(**{**raw, **units, "feature_pairs": pairs})


def load_plan(folder: Path) -> RemovalPlan:
    """The plan beside a student that `bkd` wrote."""
    return RemovalPlan.from_json((folder / PLAN_FILE).read_text())
