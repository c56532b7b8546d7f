"""`bkd doctor`, `bkd inspect`, `bkd prune`: environment, anatomy, surgery."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from bkd.cli.console import console, prepare, table

Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a Hub id.")]
SingleFileConfig = Annotated[
    Optional[str], typer.Option(help="For a single file: a pipeline folder or Hub id of the same family.")
]
MODEL_FORMS = "shapes, a run, a pipeline folder, a single .safetensors file or a Hub id"


def doctor() -> None:
    """Show versions, device and disk, and say whether the installed packages fit together."""
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
    from bkd.errors import EnvironmentProblem

    names = " ".join(missing) or "torch torchvision"
    text = problem or f"packages are missing: {', '.join(missing)}"
    raise EnvironmentProblem(text, remedy=f"pip install --upgrade {names}, all from one index")


def inspect(
    model: Annotated[str, typer.Argument(help=f"{MODEL_FORMS}.")],
    teacher: Annotated[Optional[str], typer.Option(help="Say what MODEL lacks of this one; infers its plan.")] = None,
    revision: Revision = None,
    config: SingleFileConfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show the units of a model's UNet, which of them may go, and what each preset would leave."""
    prepare()
    from bkd.inspection import inspect_model
    from bkd.locate import locate

    folder = locate(model, revision=revision, config=config, weights=False)
    found = inspect_model(folder, locate(teacher, weights=False) if teacher else None)
    if as_json:
        console.print_json(data=found)
    else:
        _show_anatomy(model, found)


def _show_anatomy(model: str, found: dict[str, Any]) -> None:
    from bkd.cli.anatomy_view import preset_table, unit_table

    console.print(unit_table(model, found))
    if origin := found["student_of"]:
        how = "taken to be" if origin["inferred"] else "a student by plan"
        console.print(f"{how} '{origin['plan']}', which lacks {', '.join(origin['removed']) or 'nothing'}")
    if found["presets"]:
        console.print(preset_table(found))


def prune(
    teacher: Annotated[str, typer.Argument(help=f"{MODEL_FORMS}.")],
    blocks: Annotated[str, typer.Option(help="Presets and units, separated by commas; see `bkd inspect`.")],
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Folder to write.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse units that can only go with others not named.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show plan and cost; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the output folder.")] = False,
    revision: Revision = None,
    config: SingleFileConfig = None,
) -> None:
    """Remove blocks from a model's UNet and write the student as a stock pipeline folder."""
    if output is None and not dry_run:
        raise typer.BadParameter("needed unless --dry-run is given", param_hint="-o")
    prepare()
    from bkd.cli.anatomy_view import show_pruning
    from bkd.locate import locate
    from bkd.prune import check_output, plan_pruning
    from bkd.prune import prune as write_pruned

    folder = locate(teacher, revision=revision, config=config, weights=not dry_run)
    pruning = plan_pruning(folder, blocks, strict=strict)
    if output is not None:
        check_output(folder, output, overwrite=overwrite)
    show_pruning(pruning)
    if dry_run or output is None:
        console.print("nothing written (dry run)")
        return
    compared = write_pruned(folder, teacher, pruning, output, revision=revision, overwrite=overwrite)
    console.print(f"proved: all {compared} tensors equal the teacher's; loads in stock diffusers and computes the same")
    console.print(f"done: {output}")
