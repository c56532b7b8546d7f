"""`bkd report`, `bkd export`: show a finished run, and hand on what it made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from bkd.cli.console import console, prepare

if TYPE_CHECKING:
    from bkd.few_steps import FewSteps
    from bkd.guidance import StudentKind


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[
        Optional[Path], typer.Option("-o", "--output", help="HTML file; default RUN/report.html.")
    ] = None,
) -> None:
    """Write one page that needs nothing else: pictures, curves, figures and commands of a run, or of several."""
    from bkd.report.page import write_report

    written = write_report(runs, output or runs[0] / "report.html")
    console.print(f"report: {written}")


def export(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder, or .safetensors file for lora.")],
    kind: Annotated[
        str, typer.Option("--format", help="pipeline: a stock folder, adapters merged; lora: a file of adapters.")
    ] = "pipeline",
    dtype: Annotated[
        Optional[str], typer.Option(help="Of a pipeline's weights: float32 (default), bfloat16 or float16.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier output.")] = False,
) -> None:
    """Hand on what a run made: a pipeline folder, or a LoRA file."""
    from bkd.errors import ModelError, one_of
    from bkd.run_folder import RunFolder, require_finished

    one_of(kind, ("pipeline", "lora"), kind="format", error=ModelError)
    if kind == "lora" and dtype is not None:
        raise ModelError("a LoRA file is float32, as its adapters were trained", where="--dtype", remedy="leave it out")
    if kind == "pipeline" and output.suffix == ".safetensors":
        raise ModelError("a pipeline is a folder", where=f"-o {output}", remedy="another -o, or --format lora")
    require_finished(RunFolder(run))  # before imports that take seconds
    prepare()
    from bkd.export import export_lora, export_pipeline
    from bkd.guidance import StudentKind
    from bkd.models import DTYPES

    console.print("checking, writing and reloading …")
    if kind == "pipeline":
        export_pipeline(
            RunFolder(run), output, DTYPES[one_of(dtype or "float32", DTYPES, kind="dtype")], overwrite=overwrite
        )
        console.print(f"done: {output} is a stock diffusers pipeline folder")
        _show_use(StudentKind.of(output), output / "scheduler")
    else:
        used = export_lora(RunFolder(run), output, overwrite=overwrite)
        console.print(f"done: pipe.load_lora_weights('{output}') on {RunFolder(run).recipe().teacher.id}")
        _show_use(used, run / "student" / "scheduler")


def _show_use(kind: StudentKind, scheduler: Path) -> None:
    """How a pipeline is to be called, where that is not as usual.

    Args:
        kind: What was handed on.
        scheduler: Folder of the scheduler that draws with it.
    """
    known, few = kind.guidance, kind.few_steps
    if known is not None and known.takes_scale:
        console.print(
            f"it is told the guidance scale: call the pipeline with guidance_scale={known.low:g} to {known.high:g}"
        )
    elif known is not None:
        console.print(f"it holds guidance_scale {known}: call the pipeline with guidance_scale=1.0")
    if few is not None:
        console.print(f"it was halved to {few}: {_call(few)}; its scheduler: {scheduler}")


def _call(few: FewSteps) -> str:
    """How the number of steps is said; the stock scheduler of a student's folder is exact unless another is named."""
    if few.direction == "inversion":
        return (
            f"call the pipeline with num_inference_steps={few.num_inference_steps}, the image's latents and "
            "bkd.sampling.InversionScheduler, or use bkd edit"
        )
    stock = f"call the pipeline with num_inference_steps={few.stock_steps}"
    own = f", or {few.num_inference_steps} and bkd.sampling.StochasticScheduler"
    return stock + own * (few.sampler == "stochastic")
