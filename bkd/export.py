"""From a finished run to what its user hands on: a pipeline folder in another dtype, or a LoRA file."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from bkd.errors import ModelError
from bkd.files import replace_file
from bkd.guidance import StudentKind
from bkd.locate import locate
from bkd.lora.adapter_file import ADAPTER_FILE, Adapter
from bkd.lora.adapters import scaled_tensors
from bkd.model_folder import model_digest, parts_of, weight_files
from bkd.models import load_noise_schedule, load_unet
from bkd.output_folder import check_output, require_new_file
from bkd.proof import check_lora, check_reload, probe_output
from bkd.run_folder import RunFolder, require_finished
from bkd.student_folder import unfinished_folder
from bkd.surgery.build import build_student
from bkd.surgery.plan import PLAN_FILE

PIPELINE = "bkd export RUN --format pipeline"


def export_pipeline(run: RunFolder, output: Path, dtype: torch.dtype, *, overwrite: bool = False) -> None:
    """Write a run's student as a stock pipeline folder, every part of it in one dtype.

    Adapters are merged: the student of a run always is what stock diffusers loads.

    Args:
        run: A finished one.
        output: Folder to make.
        dtype: Of all weights.
        overwrite: Replace an earlier student there.

    Raises:
        BkdError: If the run is not finished, the folder is in use, or the written student computes something else when
            it is reloaded in a process without `bkd`; nothing is left behind then.
    """
    require_finished(run)
    student = locate(run.path)
    check_output(student, output, overwrite=overwrite)
    with unfinished_folder(output) as folder:
        for part in parts_of(student):
            shutil.copytree(student / part, folder / part)
            _cast(folder / part, dtype)
        for name in ("model_index.json", PLAN_FILE):
            shutil.copyfile(student / name, folder / name)
        check_reload(folder, probe_output(load_unet(student, dtype)))


def _cast(part: Path, dtype: torch.dtype) -> None:
    """Rewrite the weights of one part of a pipeline folder."""
    for file in weight_files(part):
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(file).items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)


def export_lora(run: RunFolder, output: Path, *, overwrite: bool = False) -> StudentKind:
    """Write a run's adapters as a file for the model they were trained on: `pipe.load_lora_weights` takes it.

    Every alpha / r is multiplied into its up-projection, and all adapters have one rank: the file needs no metadata,
    and loads the same everywhere.

    Args:
        run: A finished one, of a stage with `lora`.
        output: `.safetensors` file to write.
        overwrite: Replace the file.

    Returns:
        How the original model is to be used with them.

    Raises:
        BkdError: If a LoRA file cannot express the student, the teacher is another one, or the file loaded on it
            computes something else; nothing is left behind then.
    """
    require_finished(run)
    locate(run.path)
    require_new_file(output, ".safetensors", overwrite=overwrite)
    recipe = run.recipe()
    if not (run.path / ADAPTER_FILE).is_file():
        raise ModelError(
            "this run trained the weights themselves, and not adapters",
            where=run.path,
            remedy=f"{PIPELINE}, or train with lora: in the stage",
        )
    if len(recipe.stages) > 1:
        raise ModelError(
            "these adapters belong to a model that the run made itself",
            where=run.path / ADAPTER_FILE,
            got=f"adapters of stage {len(recipe.stages)}, over the student of stage {len(recipe.stages) - 1}",
            allowed="runs of one stage",
            remedy=PIPELINE,
        )
    adapter = Adapter.load(run.path / ADAPTER_FILE)
    teacher = locate(recipe.teacher.id, revision=recipe.teacher.revision, config=recipe.teacher.config)
    if model_digest(teacher) != adapter.teacher_digest:
        raise ModelError(
            "these adapters were trained on another teacher",
            where=run.path / ADAPTER_FILE,
            got=f"{recipe.teacher.id}, SHA-256 {model_digest(teacher)}",
            allowed=adapter.teacher_digest,
            remedy="bring the original back, or " + PIPELINE,
        )
    _require_expressible(run, adapter, teacher)
    student = build_student(load_unet(teacher), adapter.plan)
    adapter.put_on(student)
    tensors = {f"unet.{name}": tensor for name, tensor in scaled_tensors(student).items()}
    _write(output, tensors, teacher, student)
    return StudentKind.of(run.student)


def _require_expressible(run: RunFolder, adapter: Adapter, teacher: Path) -> None:
    plan, reasons = adapter.plan, []
    if (start := run.recipe().stages[-1].student.path) is not None:
        reasons.append(f"the adapters belong to the weights of {start}, not to the original model's")
    if plan.added:
        reasons.append("the student has an input for the guidance scale, which the original model lacks")
    if plan.removed:
        reasons.append(f"the student lacks {', '.join(plan.removed)}, which the original model has")
    if beside := [name for name in adapter.beside if name not in plan.added]:
        reasons.append(f"{len(beside)} tensors trained without adapters, such as {beside[0]}")
    ours, theirs = (load_noise_schedule(folder).prediction_type for folder in (run.student, teacher))
    if ours != theirs:
        reasons.append(f"the student predicts {ours}, and the original model's scheduler expects {theirs}")
    if reasons:
        raise ModelError(
            "a LoRA file for the original model cannot express this student",
            where=run.path,
            got="; ".join(reasons),
            allowed="students of the teacher's architecture, one guidance scale, adapters alone",
            remedy=PIPELINE,
        )


def _write(output: Path, tensors: dict[str, Tensor], teacher: Path, student: UNet2DConditionModel) -> None:
    """Once the teacher, with such a file, has computed what the student does."""
    content = save(tensors, metadata={"format": "pt"})
    with tempfile.TemporaryDirectory() as scratch:
        tried = Path(scratch) / "lora.safetensors"
        tried.write_bytes(content)
        check_lora(tried, teacher, probe_output(student))
    with replace_file(output) as stream:
        stream.write(content)
