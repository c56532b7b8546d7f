"""RemovalPlan: what a student is, as pure data.

A model is a configuration and weights. A plan says how the student's configuration differs from its teacher's, which
teacher tensor each student tensor starts from, and which activations of the two belong together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from bkd.errors import ModelError, SurgeryError

Sites = Literal["block", "bk", "layer", "self-attn"]
"""Which activations feature KD compares: after every block (Segmind), BK-SDM's choice of them, after every layer
(SSD-1B), or every self-attention (KOALA)."""

T = TypeVar("T")
PLAN_FILE = "bkd_plan.json"
GUIDANCE_INPUT = "time_embedding.cond_proj.weight"
"""The stock UNet's projection of the embedded guidance scale."""


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
        added: Tensors that the teacher lacks; they start as zeros.
    """

    name: str
    removed: tuple[str, ...]
    overrides: Mapping[str, Any]
    renamed: Mapping[str, str]
    feature_pairs: Mapping[Sites, tuple[FeaturePair, ...]]
    partners: tuple[str, ...] = ()
    removed_modules: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether the student has its teacher's architecture."""
        return not (self.removed or self.added)

    def at_size(self, sample_size: int, native: int) -> RemovalPlan:
        """The same student, for latents of another size.

        Args:
            sample_size: Side of the latents that it is trained on.
            native: Side of those that the teacher was trained on.
        """
        # A plan that was read may still have the size of an earlier training.
        others = {key: value for key, value in self.overrides.items() if key != "sample_size"}
        return replace(self, overrides=others if sample_size == native else {**others, "sample_size": sample_size})

    def with_guidance_input(self, dim: int) -> RemovalPlan:
        """The same student with an input for the guidance scale, which changes nothing until it is trained.

        Args:
            dim: Length of the scale's embedding.

        Source:
            Meng et al. 2022, arXiv:2210.03142, section 3.1: Fourier features of w, added to the timestep embedding.
        """
        overrides = {**self.overrides, "time_cond_proj_dim": dim}
        return replace(self, overrides=overrides, added=(*self.added, GUIDANCE_INPUT))

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
        units = {key: tuple(raw.get(key, ())) for key in ("removed", "partners", "removed_modules", "added")}
        return cls(**{**raw, **units, "feature_pairs": pairs})


@dataclass(frozen=True)
class Lineage:
    """The plans that lead from a student back to one of its teachers, the student's own first."""

    plans: tuple[RemovalPlan, ...]

    def source_of(self, student_key: str) -> str:
        """As `RemovalPlan.source_of`, through all of them."""
        for plan in self.plans:
            student_key = plan.source_of(student_key)
        return student_key

    def removed_modules(self) -> tuple[str, ...]:
        """Modules of the last teacher that the student lacks."""
        removed: tuple[str, ...] = ()
        for plan in self.plans:
            removed = (*(plan.source_of(module) for module in removed), *plan.removed_modules)
        return removed


def plan_entry(folder: Path, key: str, kind: type[T]) -> T | None:
    """What the plan file beside a student says of how it is used.

    Args:
        folder: Pipeline folder.
        key: Of the file.
        kind: Dataclass of what stands there.

    Returns:
        None for folders without that file, or files without such an entry.

    Raises:
        ModelError: If it cannot be read, as one that a later release wrote.
    """
    path = folder / PLAN_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return None if facts.get(key) is None else TypeAdapter(kind).validate_python(facts[key])
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(
            f"'{key}' of this plan file cannot be read",
            where=path,
            got=" ".join(str(error).splitlines()[1:3]) if isinstance(error, ValidationError) else error,
            remedy="the bkd that wrote it, or a whole copy of the student's folder",
        ) from error


def load_plan(folder: Path) -> RemovalPlan:
    """The plan beside a student that `bkd` wrote.

    Raises:
        SurgeryError: If the file is damaged.
    """
    plan, _ = load_plans(folder)[0]
    return plan


def load_plans(folder: Path) -> list[tuple[RemovalPlan, str]]:
    """The plan beside a student and those of the teachers before it, each with the SHA-256 of its teacher.

    Raises:
        SurgeryError: If the file is damaged.
    """
    found = []
    try:
        facts = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        while facts is not None:
            found.append((RemovalPlan.from_json(json.dumps(facts)), facts.get("teacher_digest", "")))
            facts = facts.get("teacher_plan")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SurgeryError(
            "this plan file cannot be read",
            where=folder / PLAN_FILE,
            got=f"{type(error).__name__}: {error}",
            remedy="prune again, or remove the file and name the teacher with --teacher",
        ) from error
    return found
