"""Write a student as a stock pipeline folder that appears only when it is complete and proved."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from bkd.diffusion.guidance import StudentKind
from bkd.diffusion.schedulers import student_scheduler
from bkd.errors import OutputError
from bkd.models.folder import ORIGINS, parts_of, read_json, weight_files
from bkd.models.proof import check_reload, probe_output
from bkd.surgery.plan import PLAN_FILE, RemovalPlan

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"}


@contextmanager
def new_student_folder(folder: Path, *, teacher: Path, plan: RemovalPlan, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A pipeline folder in the making, with all but the UNet: the teacher's other parts, and the plan.

    It takes its name when the block ends well, and vanishes when it does not.

    Args:
        folder: Must be free; see `bkd.output_folder.require_free`. Replaced as a whole.
        teacher: Pipeline folder to take the other parts from.
        plan: How the student comes from its teacher.
        facts: More to write into the plan file, such as the teacher's digest.
    """
    with unfinished_folder(folder) as unfinished:
        for part in copy_other_parts(teacher, unfinished, {**json.loads(plan.to_json()), **facts}):
            load_as_float32(part)
        yield unfinished


def copy_other_parts(source: Path, folder: Path, plan: Mapping[str, Any]) -> list[Path]:
    """Copy all of a pipeline but its UNet, and write the plan file.

    Returns:
        The copied parts.
    """
    names = [part for part in parts_of(source) if part != "unet"]
    for part in names:
        shutil.copytree(source / part, folder / part, ignore=_other_weights)
    shutil.copyfile(source / "model_index.json", folder / "model_index.json")
    (folder / PLAN_FILE).write_text(json.dumps(plan, indent=2) + "\n")
    return [folder / part for part in names]


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """A folder beside its place: it takes its name when the block ends well, and vanishes when it does not.

    Args:
        folder: Replaced as a whole.

    Raises:
        OutputError: If it cannot be made.
    """
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two commands that write to one place must not write into each other.
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.unfinished-"))
        unfinished.chmod(0o755)
    except OSError as error:
        raise OutputError(
            "the output folder cannot be made", where=folder, got=error.strerror, remedy="choose another -o"
        ) from error
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for file in filter(Path.is_file, unfinished.rglob("*")):
        file.chmod(0o644)  # safetensors writes files that nobody else can read
    for settings in (*unfinished.glob("*.json"), *unfinished.glob("*/*config.json")):
        _forget_origin(settings)
    replace_folder(unfinished, folder)


def _forget_origin(settings: Path) -> None:
    known = read_json(settings)
    told = {key: value for key, value in known.items() if key not in ORIGINS}
    if told != known:
        settings.write_text(json.dumps(told, indent=2) + "\n")


def plan_facts(folder: Path) -> dict[str, Any] | None:
    """What a pipeline folder's plan file says; None for models that were not made by removal."""
    return read_json(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None


def write_student(
    folder: Path,
    *,
    teacher: Path,
    unet: UNet2DConditionModel,
    plan: RemovalPlan,
    kind: StudentKind,
    facts: Mapping[str, Any],
) -> None:
    """Write a trained student and prove that another process, without `bkd`, computes the same from it.

    Args:
        folder: As for `new_student_folder`; so are `teacher`, `plan` and `facts`.
        unet: The student, on the CPU.
        kind: How it is used.

    Raises:
        ModelError: If the reloaded student computes something else.
    """
    with new_student_folder(folder, teacher=teacher, plan=plan, facts={**facts, **kind.facts()}) as unfinished:
        _write_scheduler(unfinished, kind)
        unet.save_pretrained(unfinished / "unet", safe_serialization=True)
        check_reload(unfinished, probe_output(unet))


def _write_scheduler(folder: Path, kind: StudentKind) -> None:
    """What a stock pipeline draws with, in place of the teacher's."""
    file = folder / "scheduler" / "scheduler_config.json"
    theirs = read_json(file)
    ours = student_scheduler(theirs, kind)
    if ours != theirs:
        file.write_text(json.dumps(ours, indent=2) + "\n")
        index = read_json(folder / "model_index.json")
        index["scheduler"] = ["diffusers", ours["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_as_float32(part: Path) -> None:
    """Have a part load in float32 where nobody says otherwise.

    diffusers then loads its parts in float32, and transformers its own in the dtype that their configuration names: a
    text encoder in float16 and a UNet in float32 do not run together.
    """
    settings = part / "config.json"
    known = read_json(settings) if settings.is_file() else {}
    if changed := {key: "float32" for key in ("dtype", "torch_dtype") if known.get(key) in ("float16", "bfloat16")}:
        settings.write_text(json.dumps({**known, **changed}, indent=2) + "\n")


def _other_weights(part: str, names: list[str]) -> set[str]:
    """Weights in other formats and variants, which a plain load does not read."""
    used = {path.name for path in weight_files(Path(part))}
    return {name for name in names if Path(name).suffix in WEIGHT_SUFFIXES and name not in used}


def replace_folder(new: Path, final: Path) -> None:
    """Move a finished folder to its place; what was there is removed only when the new one can take over."""
    old = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    final.parent.mkdir(parents=True, exist_ok=True)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
