"""`bkd doctor`, `bkd inspect`, `bkd prune`, `bkd remap`: environment, anatomy, surgery."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bkd.cli.console import console, prepare, progress_view, table

if TYPE_CHECKING:
    from bkd.pruning.importance import Selection

Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a Hub id.")]
SingleFileConfig = Annotated[
    Optional[str], typer.Option(help="For a single file: a pipeline folder or Hub id of the same family.")
]
MODEL_FORMS = "shapes, a run, a pipeline folder, a single .safetensors file or a Hub id"


def doctor() -> None:
    """Show versions, device and disk, and what does not fit together."""
    import platform
    import shutil

    from bkd.environment import PACKAGES, installed_version, torchvision_problem

    rows = [("python", platform.python_version()), *((name, installed_version(name) or "missing") for name in PACKAGES)]
    problem = torchvision_problem()
    rows.append(("torchvision and torch", problem or "match"))
    rows += [
        ("device", "unknown" if problem else _device()),
        ("disk free", f"{shutil.disk_usage('.').free / 1e9:.0f} GB"),
    ]
    console.print(table("bkd doctor", ("", "found"), rows))
    missing = [name for name, found in rows if found == "missing"]
    if problem or missing:
        _fail_doctor(problem, missing)


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def _fail_doctor(problem: str | None, missing: list[str]) -> None:
    from bkd.environment import TORCHVISION_REMEDY
    from bkd.errors import EnvironmentProblem

    if problem:
        raise EnvironmentProblem(problem, remedy=TORCHVISION_REMEDY)
    raise EnvironmentProblem(
        f"packages are missing: {', '.join(missing)}", remedy=f"pip install {' '.join(missing)}, all from one index"
    )


def inspect(
    model: Annotated[str, typer.Argument(help=f"{MODEL_FORMS}.")],
    teacher: Annotated[Optional[str], typer.Option(help="Say what MODEL lacks of this one; infers its plan.")] = None,
    revision: Revision = None,
    config: SingleFileConfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show a UNet's units, which may go, and what presets would leave."""
    folder = _located(model, revision, config, weights=False)
    prepare()
    from bkd.diffusion.guidance import StudentKind
    from bkd.models.locate import locate
    from bkd.pruning.inspect import inspect_model

    found = inspect_model(folder, locate(teacher, weights=False) if teacher else None)
    if as_json:
        console.print_json(data=found)
    else:
        _show_anatomy(model, found, str(StudentKind.of(folder)))


def _show_anatomy(model: str, found: dict[str, Any], drawn_with: str) -> None:
    from bkd.cli.anatomy_view import preset_table, unit_table

    console.print(unit_table(model, found))
    if problem := found["weights_problem"]:
        console.print(f"note: this is what the configuration says; {problem}")
    if origin := found["student_of"]:
        how = "taken to be" if origin["inferred"] else "a student by plan"
        lacks = f"which lacks {', '.join(origin['removed'])}" if origin["removed"] else "with all blocks"
        console.print(f"{how} '{origin['plan']}', {lacks}")
    if drawn_with:
        console.print(f"drawn with: {drawn_with}")
    if found["presets"]:
        console.print(preset_table(found))


def prune(
    teacher: Annotated[str, typer.Argument(help=f"{MODEL_FORMS}.")],
    blocks: Annotated[
        Optional[str], typer.Option(help="Presets and units, separated by commas; see `bkd inspect`.")
    ] = None,
    keep: Annotated[
        Optional[str], typer.Option(help="Instead of --blocks: choose what stays by score: 0.65 or 480M.")
    ] = None,
    macs: Annotated[bool, typer.Option("--macs", help="--keep counts MACs instead of parameters.")] = False,
    calibration: Annotated[Optional[str], typer.Option(help="Shards to score with; shapes for the embedded.")] = None,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Samples of them to use.")] = 64,
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Folder to write.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse units that can only go with others not named.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show plan and cost; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the output folder.")] = False,
    revision: Revision = None,
    config: SingleFileConfig = None,
) -> None:
    """Remove blocks from a UNet and write a stock pipeline folder."""
    _check_options(blocks, keep, calibration, strict, macs, can_write=output is not None or dry_run)
    folder = _located(teacher, revision, config, weights=keep is not None or not dry_run)
    _check_wish(folder, blocks, strict, output, overwrite)
    prepare()
    from bkd.cli.anatomy_view import show_pruning, show_written
    from bkd.pruning.prune import plan_pruning, with_cost
    from bkd.pruning.prune import prune as write_pruned

    selection = _select(folder, keep, calibration, calibration_samples, macs) if keep and calibration else None
    pruning = with_cost(folder, selection.plan) if selection else plan_pruning(folder, blocks or "", strict=strict)
    show_pruning(pruning)
    if dry_run or output is None:
        console.print("nothing written (dry run)")
    else:
        console.print("writing, comparing and reloading …")
        written = write_pruned(
            folder,
            teacher,
            pruning,
            output,
            revision=revision,
            overwrite=overwrite,
            write_more=partial(_write_importance, folder, selection),
        )
        show_written(teacher, written, output)


def _check_options(
    blocks: str | None, keep: str | None, calibration: str | None, strict: bool, macs: bool, *, can_write: bool
) -> None:
    if not can_write:
        raise typer.BadParameter("needed unless --dry-run is given", param_hint="-o")
    if (blocks is None) == (keep is None):
        raise typer.BadParameter("give either --blocks LIST or --keep SIZE with --calibration SHARDS")
    if strict and keep is not None:
        raise typer.BadParameter("--keep names no units, so none can be without their partners", param_hint="--strict")
    for option, given in (("--calibration", calibration is not None), ("--macs", macs)):
        if given and keep is None:
            raise typer.BadParameter("goes with --keep", param_hint=option)
    if keep is not None and calibration is None:
        raise typer.BadParameter("--keep needs captioned images to score with", param_hint="--calibration")


def _located(model: str, revision: str | None, config: str | None, *, weights: bool) -> Path:
    """The folder of a MODEL; nothing heavy loads for one that is already here."""
    from bkd.models.locate import is_folder, locate

    if not is_folder(model):
        prepare(model)  # the Hub's and single files' importers load diffusers
    return locate(model, revision=revision, config=config, weights=weights)


def _check_wish(folder: Path, blocks: str | None, strict: bool, output: Path | None, overwrite: bool) -> None:
    """Say what is wrong with a wish before the libraries that would fulfil it are loaded."""
    from bkd.models.folder import unet_config
    from bkd.output_folder import check_output
    from bkd.surgery.unet import plan_removal

    if output is not None:
        check_output(folder, output, overwrite=overwrite)
    if blocks is not None:
        plan_removal(unet_config(folder), blocks, strict=strict)


def _select(folder: Path, keep: str, calibration: str, num_samples: int, macs: bool) -> Selection:
    from bkd.cli.anatomy_view import show_selection
    from bkd.pruning.importance import select

    with progress_view() as view:

        def progress(done: int, total: int) -> None:
            if done == 0:
                view.phase("scoring every removal")
            view.update(done, total)

        selection = select(folder, keep, calibration, num_samples=num_samples, count_macs=macs, progress=progress)
    show_selection(selection)
    return selection


def _write_importance(teacher: Path, selection: Selection | None, folder: Path) -> None:
    if selection is not None:
        from bkd.pruning.importance import write_importance

        write_importance(folder, teacher, selection)


def remap(
    lora: Annotated[Path, typer.Argument(help="The teacher's LoRA: a .safetensors file of diffusers, peft or kohya.")],
    student: Annotated[str, typer.Option(help="A pruned student: a run, a pipeline folder or a Hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    teacher: Annotated[
        Optional[str], typer.Option(help="Of a student that was pruned elsewhere; its plan is inferred.")
    ] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output file.")] = False,
) -> None:
    """Carry a teacher's LoRA over to a pruned student.

    Every tensor that has nowhere to go is listed.
    """
    prepare(student, teacher)
    from bkd.cli.anatomy_view import show_remapped
    from bkd.lora.remap import remap_lora
    from bkd.models.locate import locate
    from bkd.pruning.inspect import lineage_of

    folder = locate(student, revision=revision, weights=False)
    lineage = lineage_of(folder, locate(teacher, weights=False) if teacher else None)
    show_remapped(remap_lora(lora, folder, lineage, output, overwrite=overwrite), output)
