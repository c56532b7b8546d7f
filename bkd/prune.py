"""prune: a teacher's folder and a preset in, a student's folder out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from bkd.cost import UNetCost, unet_cost
from bkd.errors import OutputError
from bkd.models import load_unet, model_digest, prompt_length, stored_dtype, unet_config
from bkd.student_folder import require_free, write_student
from bkd.surgery.build import build_student
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.unet import plan_removal


@dataclass(frozen=True)
class Pruning:
    """A planned removal and what it saves."""

    plan: RemovalPlan
    before: UNetCost
    after: UNetCost


def plan_pruning(teacher: Path, blocks: str) -> Pruning:
    """What pruning would do, from the configuration alone.

    Raises:
        SurgeryError: If the preset is unknown or does not fit the teacher.
    """
    config = unet_config(teacher)
    plan = plan_removal(config, blocks)
    tokens = prompt_length(teacher)
    return Pruning(plan, unet_cost(config, num_tokens=tokens), unet_cost(config, plan, num_tokens=tokens))


def prune(teacher: Path, name: str, blocks: str, output: Path, *, overwrite: bool = False) -> Pruning:
    """Write the pruned student as a stock pipeline folder, in the dtype its teacher is stored in.

    Args:
        teacher: Pipeline folder.
        name: How the user calls the teacher; written into the plan file.
        blocks: A preset.
        output: Folder to make.
        overwrite: Replace what is there.

    Raises:
        BkdError: If the preset does not fit, the folder is in use, or the written student fails its reload check.
    """
    pruning = plan_pruning(teacher, blocks)
    if output.resolve() == teacher.resolve():
        raise OutputError("the output folder is the teacher itself", where=output, remedy="choose another -o")
    require_free(output, overwrite=overwrite, marker="model_index.json")
    student = build_student(load_unet(teacher, stored_dtype(teacher)), pruning.plan)
    facts = {
        "teacher": name,
        "teacher_digest": model_digest(teacher),
        "cost_before": asdict(pruning.before),
        "cost_after": asdict(pruning.after),
    }
    write_student(output, teacher=teacher, unet=student, plan=pruning.plan, facts=facts)
    return pruning
