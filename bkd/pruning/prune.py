"""prune: a teacher's folder and a list of units in, a student's folder out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from bkd.diffusion.guidance import StudentKind
from bkd.errors import SurgeryError
from bkd.models.folder import model_digest, prompt_length, unet_config
from bkd.models.load import load_unet
from bkd.models.proof import check_finite, check_reload, check_tensors, probe_output
from bkd.models.student_folder import new_student_folder, plan_facts
from bkd.models.unet_weights import check_unet_weights, stored_dtype
from bkd.output_folder import check_output
from bkd.surgery.build import build_student
from bkd.surgery.compatibility import compatibility_notes
from bkd.surgery.cost import UNetCost, unet_cost
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.unet import plan_removal


@dataclass(frozen=True)
class Pruning:
    """A planned removal, what it saves, and what users of the student should know."""

    plan: RemovalPlan
    before: UNetCost
    after: UNetCost
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """What a finished pruning proved.

    Attributes:
        teacher_digest: SHA-256.
        num_tensors: How many were compared with the teacher's own.
        ignored: Tensors in the teacher's files that its configuration does not know.
    """

    teacher_digest: str
    num_tensors: int
    ignored: tuple[str, ...]


def plan_pruning(teacher: Path, blocks: str, *, strict: bool = False) -> Pruning:
    """What pruning would do, from the configuration alone.

    Args:
        teacher: Pipeline folder; its weights are not looked at.
        blocks: Presets and units, separated by commas.
        strict: Refuse partners that were not named.

    Raises:
        SurgeryError: If a unit is unknown, the removal cannot be expressed, or nothing is removed.
    """
    plan = plan_removal(unet_config(teacher), blocks, strict=strict)
    if not plan.removed:
        raise SurgeryError(
            "nothing would be removed", got=f"--blocks '{blocks}'", remedy="`bkd inspect` lists presets and units"
        )
    return with_cost(teacher, plan)


def with_cost(teacher: Path, plan: RemovalPlan) -> Pruning:
    """A plan with the cost of the UNet before and after it, and with notes for the student's users."""
    config, tokens = unet_config(teacher), prompt_length(teacher)
    return Pruning(
        plan,
        before=unet_cost(config, num_tokens=tokens),
        after=unet_cost(config, plan, num_tokens=tokens),
        notes=compatibility_notes(config, plan),
    )


def prune(
    teacher: Path,
    name: str,
    pruning: Pruning,
    output: Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> Written:
    """Write the pruned student as a stock pipeline folder, in the dtype its teacher is stored in, and prove it.

    Weights are read from mapped files and written through; what stays in memory is about the student's own size.

    Args:
        teacher: Pipeline folder.
        name: How the user calls the teacher; written into the plan file.
        pruning: As planned for this teacher.
        output: Folder to make.
        revision: Of a teacher from the Hub; written into the plan file.
        overwrite: Replace what is there.
        write_more: Called with the unfinished folder, to write files that belong to the student.

    Raises:
        BkdError: If the folder is in use, or the written student fails a proof; nothing is left behind then.
    """
    check_output(teacher, output, overwrite=overwrite)
    digest, ignored = model_digest(teacher), check_unet_weights(teacher)
    facts = {
        "teacher": name,
        "teacher_revision": revision,
        "teacher_digest": digest,
        "teacher_plan": plan_facts(teacher),
        **StudentKind.of(teacher).facts(),
        "cost_before": asdict(pruning.before),
        "cost_after": asdict(pruning.after),
    }
    with new_student_folder(output, teacher=teacher, plan=pruning.plan, facts=facts) as folder:
        expected = _write_unet(teacher, pruning.plan, folder / "unet")
        num_tensors = check_tensors(folder, teacher, pruning.plan)
        check_reload(folder, expected)
        write_more(folder)
    return Written(digest, num_tensors, ignored)


def _write_unet(teacher: Path, plan: RemovalPlan, part: Path) -> Tensor:
    """Write the student's UNet; returns what it computes. Its memory is free again before the reload needs some."""
    student = build_student(load_unet(teacher, stored_dtype(teacher)), plan, share_base=True)
    check_finite(student, plan, teacher)
    student.save_pretrained(part, safe_serialization=True)
    return probe_output(student)
