"""From a student to what its user hands on: a pipeline folder in another dtype, a single file, or a LoRA file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bkd.diffusion.guidance import StudentKind
from bkd.errors import ModelError
from bkd.export.source import Source, checked_teacher
from bkd.files import proved_file
from bkd.lora.adapter_file import ADAPTER_FILE, Adapter
from bkd.lora.adapters import scaled_tensors
from bkd.models.folder import read_json, unet_config, weight_files
from bkd.models.load import load_noise_schedule, load_unet
from bkd.models.original_layout import original_tensors, require_expressible
from bkd.models.proof import check_lora, check_original, check_reload, probe_output
from bkd.models.single_file import pipeline_class
from bkd.models.student_folder import copy_other_parts, unfinished_folder
from bkd.output_folder import check_output, require_new_file
from bkd.runs.folder import RunFolder
from bkd.surgery.build import build_student
from bkd.surgery.plan import PLAN_FILE

PIPELINE = "bkd export RUN --format pipeline"


def export_pipeline(
    model: Path, output: Path, dtype: torch.dtype, *, raw: bool = False, overwrite: bool = False
) -> None:
    """Write a student as a stock pipeline folder, every part of it in one dtype.

    Adapters are merged: the student of a run always is what stock diffusers loads.

    Args:
        model: A finished run, or a student's folder.
        output: Folder to make.
        dtype: Of all weights.
        raw: Take the weights of the last step, and not their averages.
        overwrite: Replace an earlier student there.

    Raises:
        BkdError: If the run is not finished, the folder is in use, or the written student computes something else when
            it is reloaded in a process without `bkd`; nothing is left behind then.
    """
    source = Source.of(model, raw=raw)
    check_output(source.folder, output, overwrite=overwrite)
    with unfinished_folder(output) as folder:
        plan = read_json(source.folder / PLAN_FILE) | ({"weights": "raw"} if raw else {})
        for part in copy_other_parts(source.folder, folder, plan):
            _cast(part, dtype)
        unet = source.unet(dtype)
        unet.save_pretrained(folder / "unet", safe_serialization=True)
        check_reload(folder, probe_output(unet))


def _cast(part: Path, dtype: torch.dtype) -> None:
    """Rewrite the weights of one part of a pipeline folder."""
    for file in weight_files(part):
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(file).items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)


def export_single_file(
    model: Path, output: Path, dtype: torch.dtype, *, raw: bool = False, overwrite: bool = False
) -> Path:
    """Write a student's UNet, autoencoder and text encoders as one file in the original Stable Diffusion layout.

    Args:
        model: A finished run, or a student's folder.
        output: `.safetensors` file to write.
        dtype: Of all weights.
        raw: Take the weights of the last step, and not their averages.
        overwrite: Replace the file.

    Returns:
        The pipeline folder whose configuration the file is read with.

    Raises:
        BkdError: If the layout cannot express the student, or `from_single_file`, in a process without `bkd`, reads
            something else from the file; nothing is left behind then.
    """
    require_new_file(output, ".safetensors", overwrite=overwrite)
    source = Source.of(model, raw=raw)
    require_expressible(source.folder)
    kind = pipeline_class(unet_config(source.folder))
    pipe = kind.from_pretrained(
        source.folder, unet=source.unet(dtype), torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )
    with proved_file(output) as file:
        save_file(original_tensors(pipe), file, metadata={"format": "pt"})
        check_original(file, source.folder, kind.__name__, probe_output(pipe.unet))
    return source.folder


def export_lora(model: Path, output: Path, *, raw: bool = False, overwrite: bool = False) -> StudentKind:
    """Write a run's adapters as a file for the model they were trained on: `pipe.load_lora_weights` takes it.

    Every alpha / r is multiplied into its up-projection, and all adapters have one rank: the file needs no metadata,
    and loads the same everywhere.

    Args:
        model: A finished run, of a stage with `lora`.
        output: `.safetensors` file to write.
        raw: Take the weights of the last step, and not their averages.
        overwrite: Replace the file.

    Returns:
        How the original model is to be used with them.

    Raises:
        BkdError: If a LoRA file cannot express the student, the teacher is another one, or the file loaded on it
            computes something else; nothing is left behind then.
    """
    require_new_file(output, ".safetensors", overwrite=overwrite)
    source = Source.of(model, raw=raw)
    run = _require_adapters_of_one_stage(source, model)
    adapter = source.adapter(run)
    teacher = checked_teacher(run, adapter)
    _require_expressible(run, adapter, teacher)
    student = build_student(load_unet(teacher), adapter.plan)
    adapter.put_on(student)
    tensors = {f"unet.{name}": tensor for name, tensor in scaled_tensors(student).items()}
    with proved_file(output) as file:
        save_file(tensors, file, metadata={"format": "pt"})
        check_lora(file, teacher, probe_output(student))
    return StudentKind.of(run.student)


def _require_adapters_of_one_stage(source: Source, model: Path) -> RunFolder:
    run = source.run
    if run is None or not (run.path / ADAPTER_FILE).is_file():
        raise ModelError(
            "this run trained the weights themselves, and not adapters"
            if run
            else "a student's folder has no adapters",
            where=model,
            remedy=f"{PIPELINE}, or train with lora: in the stage",
        )
    if (count := len(run.recipe().stages)) > 1:
        raise ModelError(
            "these adapters belong to a model that the run made itself",
            where=run.path / ADAPTER_FILE,
            got=f"adapters of stage {count}, over the student of stage {count - 1}",
            allowed="runs of one stage",
            remedy=PIPELINE,
        )
    return run


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
