"""`bkd bench`: measure on this device."""

from __future__ import annotations

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
    from bkd.bench import bench_train
    from bkd.cli.cost_view import estimated, gib, show_advice
    from bkd.models import best_device
    from bkd.run import check_teacher

    teacher, plans = check_teacher(parsed)
    with progress_view() as view:
        view.phase(f"{2 * steps} steps of {parsed.train.batch} images")
        speed = bench_train(parsed, teacher, plans[0], steps=steps, progress=view.update)
    hours = speed.seconds * parsed.train.max_steps / 3600
    console.print(f"device: {speed.device}")
    console.print(f"{speed.images_per_second:,.2f} images/s, {speed.seconds:,.3f} s a step")
    console.print(
        f"{hours:,.2f} hours for {parsed.train.max_steps:,} steps; reading data, checkpoints and pictures are not in it"
    )
    whose = "on the device" if best_device().type == "cuda" else "of the process"
    console.print(f"peak memory {whose}: {gib(speed.peak_bytes)} GiB")
    show_advice(recipe, parsed, estimated(parsed, 0, teacher, plans[0]))
