"""`bkd bench`: measure on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from bkd.cli.console import console, prepare, progress_view

bench = typer.Typer(help="Measure on this device.", no_args_is_help=True)


@bench.command("train")
def train_(
    recipe: Annotated[str, typer.Argument(help="Packaged name such as shapes/sd-small, or a .yaml file.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value …, such as train.batch=64.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=10, help="Steps to measure, after as many to warm up.")] = 5,
) -> None:
    """Run a few steps of a recipe, on simulated samples, and say how long all of it would take."""
    from bkd.recipe.load import load_recipe

    parsed = load_recipe(recipe, [*(overrides or ()), "data.shards=simulated"])
    prepare()
    from bkd.bench.train import bench_train
    from bkd.cli.cost_view import estimated, show_advice, show_training_speed
    from bkd.runs.run import check_teacher

    teacher, stages = check_teacher(parsed)
    with progress_view() as view:
        view.phase(f"{2 * steps} steps of {stages[0].train.batch} images")
        speed = bench_train(parsed, teacher, stages[0], steps=steps, progress=view.update)
    show_training_speed(speed, stages)
    show_advice(recipe, stages[:1], [estimated(stages[0])])


@bench.command("speed")
def speed_(
    models: Annotated[list[str], typer.Argument(help="Runs, pipeline folders or Hub ids; the first is compared with.")],
    teacher: Annotated[Optional[str], typer.Option(help="Compared with instead; a run names its own.")] = None,
    part: Annotated[
        Optional[list[str]], typer.Option(help="unet (one pass), step (guided), pipeline; default unet and pipeline.")
    ] = None,
    batch: Annotated[Optional[list[int]], typer.Option(min=1, help="May be repeated; default 1 and 8.")] = None,
    mode: Annotated[Optional[list[str]], typer.Option(help="eager, compiled; default eager.")] = None,
    dtype: Annotated[Optional[list[str]], typer.Option(help="float32, bfloat16, float16; default float32.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each.")] = 10,
    num_inference_steps: Annotated[int, typer.Option(min=1, max=1000, help="Of the pipeline.")] = 25,
    guidance_scale: Annotated[
        Optional[float], typer.Option(min=1, help="Of the pipeline; 1 for none. Default 7.5, or what a student knows.")
    ] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda or mps; default the best one.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, too, in fresh processes.")] = True,
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Folder for speed.json and a chart.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the output folder.")] = False,
) -> None:
    """Time models in turns: one UNet pass and the whole pipeline, with memory and sizes."""
    prepare(*models, teacher)
    from bkd.cli.speed_view import show_speed
    from bkd.eval.candidates import whole_candidates
    from bkd.eval.speed import SpeedWish, bench_speed, require_possible
    from bkd.models.load import device_named
    from bkd.output_folder import require_free
    from bkd.report.speed_chart import write_speed_report

    usual, where = SpeedWish(), device_named(device)
    wish = SpeedWish(
        parts=tuple(part or usual.parts),
        batches=tuple(batch or usual.batches),
        modes=tuple(mode or usual.modes),
        dtypes=tuple(dtype or usual.dtypes),
        rounds=rounds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale or usual.guidance_scale,
        nearest_scale=guidance_scale is None,
    )
    require_possible(wish, where)
    if output is not None:
        require_free(output, overwrite=overwrite, marker="speed.json")
    with progress_view() as view:
        report = bench_speed(
            whole_candidates(models, teacher), wish, where, memory=memory, phase=view.phase, progress=view.update
        )
    show_speed(report)
    if output is not None:
        write_speed_report(report, output)
        console.print(f"report: {output / 'speed.json'}, {output / 'speed.svg'}")


@bench.command("memory")
def memory_(
    recipe: Annotated[str, typer.Argument(help="Packaged name such as shapes/guided-lora, or a .yaml file.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="key=value …, such as stages.0.lora.r=64.")] = None,
    batch: Annotated[Optional[list[int]], typer.Option(min=1, help="Images in a pass; may be repeated.")] = None,
    count: Annotated[
        bool, typer.Option(help="Count tensors' bytes without weights, data or time; else measure real steps.")
    ] = False,
) -> None:
    """Peak memory of a recipe's training, by part, beside what else it could be: whole, or without sharing."""
    from bkd.recipe.load import load_recipe

    parsed = load_recipe(recipe, [*(overrides or ()), "data.shards=simulated"])
    prepare()
    from bkd.bench.memory import compare_memory
    from bkd.cli.memory_view import show_memory

    batches = batch or [parsed.train.batch // parsed.train.grad_accum]
    with progress_view() as view:
        report = compare_memory(parsed, batches, count=count, phase=view.phase)
    show_memory(report)
