"""`bkd report`, `bkd export`: show a finished run, and hand on what it made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from bkd.cli.console import console, prepare

if TYPE_CHECKING:
    from bkd.diffusion.guidance import StudentKind


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[
        Optional[Path], typer.Option("-o", "--output", help="HTML file; default RUN/report.html of a single run.")
    ] = None,
) -> None:
    """Write one page that needs nothing else: pictures, curves, tables."""
    from bkd.errors import OutputError
    from bkd.report.page import write_report

    if output is None and len(runs) > 1:
        raise OutputError(
            "a page of several runs belongs to none of them", got="no -o", remedy="name it: -o comparison.html"
        )
    written = write_report(runs, output or runs[0] / "report.html")
    console.print(f"report: {written}")


def export(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or the folder of a student.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder, or .safetensors file for single-file and lora.")
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help="pipeline: a stock folder, adapters merged; single-file: the original layout; lora: adapters.",
        ),
    ] = "pipeline",
    dtype: Annotated[
        Optional[str], typer.Option(help="Of all but a LoRA's weights: float32 (default), bfloat16 or float16.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="ema: averaged, as the student has them; raw: those of the last step.")
    ] = "ema",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier output.")] = False,
) -> None:
    """Hand on what a run made: a folder, a single file, or a LoRA file."""
    from bkd.runs.folder import finished_or_student

    _check_wish(output, kind, dtype, weights)
    finished_or_student(model)  # before imports that take seconds
    prepare()
    console.print("checking, writing and reloading …")
    export_as = {"pipeline": _export_pipeline, "single-file": _export_single_file, "lora": _export_lora}[kind]
    export_as(model, output, dtype or "float32", raw=weights == "raw", overwrite=overwrite)


def _export_pipeline(model: Path, output: Path, dtype: str, *, raw: bool, overwrite: bool) -> None:
    from bkd.card.carry import carry_card
    from bkd.diffusion.guidance import StudentKind
    from bkd.export.forms import export_pipeline
    from bkd.models.load import DTYPES

    export_pipeline(model, output, DTYPES[dtype], raw=raw, overwrite=overwrite)
    card = not raw and carry_card(model, output, dtype)
    console.print(f"done: {output} is a stock diffusers pipeline folder" + ", with the run's card" * card)
    _show_use(StudentKind.of(output), output / "scheduler")


def _export_single_file(model: Path, output: Path, dtype: str, *, raw: bool, overwrite: bool) -> None:
    from bkd.diffusion.guidance import StudentKind
    from bkd.export.forms import export_single_file
    from bkd.models.load import DTYPES

    folder = export_single_file(model, output, DTYPES[dtype], raw=raw, overwrite=overwrite)
    _show_readers(output, folder)
    _show_use(StudentKind.of(folder), folder / "scheduler")


def _export_lora(model: Path, output: Path, dtype: str, *, raw: bool, overwrite: bool) -> None:
    """In float32, as adapters are trained."""
    from bkd.export.forms import export_lora
    from bkd.runs.folder import RunFolder

    used = export_lora(model, output, raw=raw, overwrite=overwrite)
    console.print(f"done: pipe.load_lora_weights('{output}') on {RunFolder(model).recipe().teacher.id}")
    _show_use(used, RunFolder(model).student / "scheduler")


def _check_wish(output: Path, kind: str, dtype: str | None, weights: str) -> None:
    from bkd.diffusion.terms import DTYPE_NAMES
    from bkd.errors import ModelError, one_of

    one_of(kind, ("pipeline", "single-file", "lora"), kind="format", error=ModelError)
    one_of(weights, ("ema", "raw"), kind="weights", error=ModelError)
    if dtype is not None:
        one_of(dtype, DTYPE_NAMES, kind="dtype", error=ModelError)
    if kind == "lora" and dtype is not None:
        raise ModelError("a LoRA file is float32, as its adapters were trained", where="--dtype", remedy="leave it out")
    if kind == "pipeline" and output.suffix == ".safetensors":
        raise ModelError(
            "a pipeline is a folder", where=f"-o {output}", remedy="another -o, or --format single-file or lora"
        )


def _show_readers(file: Path, folder: Path) -> None:
    """What loads a single file, and what does not."""
    from bkd.export.other_tools import verdicts
    from bkd.models.folder import scheduler_config, unet_config
    from bkd.models.single_file import pipeline_class

    config = unet_config(folder)
    console.print(f"done: {pipeline_class(config).__name__}.from_single_file('{file}', config='{folder}')")
    for verdict in verdicts(config, scheduler_config(folder).get("prediction_type", "epsilon")):
        console.print(str(verdict))


def _show_use(kind: StudentKind, scheduler: Path) -> None:
    """How a pipeline is to be called, where that is not as usual.

    Args:
        kind: What was handed on.
        scheduler: Folder of the scheduler that draws with it.
    """
    for sentence in kind.calls():
        console.print(sentence)
    if kind.few_steps is not None:
        console.print(f"its scheduler: {scheduler}")
