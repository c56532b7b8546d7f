"""`bkd doctor`, `bkd inspect`, `bkd prune`: environment, anatomy, surgery."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from bkd.cli.console import console, prepare, short, table

Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a Hub id.")]


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
    model: Annotated[str, typer.Argument(help="shapes, a run, a pipeline folder or a Hub id.")],
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show the blocks of a model's UNet with parameters and share of the work, and what each preset would leave."""
    prepare()
    from bkd.inspection import inspect_model
    from bkd.models import locate

    found = inspect_model(locate(model, revision=revision))
    if as_json:
        console.print_json(data=found)
        return
    blocks = [(b["id"], f"{b['parameters']:,}", f"{b['share_of_macs']:.1%}") for b in found["blocks"]]
    console.print(table(f"{model}: UNet, {found['parameters']:,} parameters", ("block", "parameters", "MACs"), blocks))
    presets = [
        (" = ".join([p["name"], *p["aliases"]]), f"{p['parameters']:,}", short(p["macs"])) for p in found["presets"]
    ]
    console.print(table("presets", ("--blocks", "parameters", "MACs"), presets))


def prune(
    teacher: Annotated[str, typer.Argument(help="shapes, a pipeline folder or a Hub id.")],
    blocks: Annotated[str, typer.Option(help="Preset: sd-small (bk-base), bk-small, sd-tiny (bk-tiny).")],
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Folder to write.")] = None,
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show plan and cost; write nothing.")] = False,
) -> None:
    """Remove blocks from a model's UNet and write the student as a stock pipeline folder."""
    if output is None and not dry_run:
        raise typer.BadParameter("needed unless --dry-run is given", param_hint="-o")
    prepare()
    from bkd.models import locate
    from bkd.prune import plan_pruning
    from bkd.prune import prune as write_pruned

    folder = locate(teacher, revision=revision)
    if dry_run or output is None:
        pruning = plan_pruning(folder, blocks)
    else:
        pruning = write_pruned(folder, teacher, blocks, output, overwrite=overwrite)
    console.print(f"removed: {', '.join(pruning.plan.removed) or 'nothing'}")
    costs = (("before", pruning.before), ("after", pruning.after))
    rows = [(name, f"{c.parameters:,}", short(c.macs), short(c.macs_without_attention)) for name, c in costs]
    console.print(table("UNet", ("", "parameters", "MACs", "without attention"), rows))
    done = "nothing written (dry run)" if dry_run else f"done: {output} loads in stock diffusers and computes the same"
    console.print(done)
