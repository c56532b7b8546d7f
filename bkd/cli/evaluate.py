"""`bkd sample` and `bkd eval`: draw and measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from bkd.cli.console import console, prepare, progress_view, short, table

Steps = Annotated[Optional[int], typer.Option(min=1, max=1000, help="Denoising steps; a run knows its own.")]
Guidance = Annotated[
    Optional[float], typer.Option(min=1, help="Classifier-free guidance, 1 for none; a run knows its own.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the starting noise.")]


def sample(
    model: Annotated[str, typer.Argument(help="shapes, a run, a pipeline folder or a Hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the pictures.")],
    prompt: Annotated[Optional[str], typer.Option(help="One prompt.")] = None,
    prompts: Annotated[Optional[Path], typer.Option(help="Text file, one prompt a line.")] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the output folder.")] = False,
) -> None:
    """Draw one picture for each prompt."""
    prepare()
    from bkd.eval.sample import drawing_settings, sample_to_folder

    texts = _prompts(prompt, prompts)
    steps, guidance = drawing_settings(model, num_inference_steps, guidance_scale)
    with progress_view() as view:
        written = sample_to_folder(model, texts, output, steps, guidance, seed, overwrite, view.update)
    console.print(f"done: {len(written)} pictures in {output}")


def eval_(
    models: Annotated[
        list[str], typer.Argument(help="Runs, pipeline folders or Hub ids; a run stands for its teacher too.")
    ],
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Folder; default RUN/eval.")] = None,
    teacher: Annotated[Optional[str], typer.Option(help="Reference model; a run names its own.")] = None,
    suite: Annotated[str, typer.Option(help="shapes (caption accuracy) or prompts (pictures).")] = "shapes",
    prompts: Annotated[Optional[Path], typer.Option(help="Text file, one prompt a line; for suite prompts.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of suite shapes.")] = 200,
    split: Annotated[str, typer.Option(help="Of suite shapes: test, val, novel or train.")] = "test",
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
) -> None:
    """Measure models side by side, on the same prompts and noise."""
    prepare()
    from bkd.eval.measure import measure
    from bkd.eval.run import Settings
    from bkd.eval.sample import drawing_settings

    steps, guidance = drawing_settings(models[0], num_inference_steps, guidance_scale, suite=suite)
    texts = tuple(_prompts(None, prompts)) if suite == "prompts" else ()
    settings = Settings(suite, num_prompts, split, steps, guidance, seed, texts)
    with progress_view() as view:
        folder, report = measure(models, teacher, settings, output, view.phase, view.update)
    _show(report)
    console.print(f"report: {folder / f'{suite}.json'}")


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    from bkd.errors import DataError

    texts = [prompt] if prompt else []
    if file is not None:
        if not file.is_file():
            raise DataError("no such file of prompts", where=file)
        try:
            texts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError("the file of prompts is not UTF-8 text", where=file, got=error) from None
    if not texts:
        raise DataError("no prompts", remedy="add --prompt TEXT or --prompts FILE, with one prompt a line")
    return texts


def _show(report: dict[str, Any]) -> None:
    rows = []
    for model in report["models"]:
        accuracy = model.get("accuracy")
        scores = _scores(model, accuracy) if accuracy else []
        rows.append((model["name"], *scores, short(model["unet_parameters"]), short(model["unet_macs"])))
    scored = (
        ["correct", "95 % interval", "of teacher", "one object", "two objects"]
        if "accuracy" in report["models"][0]
        else []
    )
    settings = report["settings"]
    title = f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}"
    if scored:
        title = f"{settings['num_prompts']} prompts of split {settings['split']}, {title}"
    console.print(table(title, ("model", *scored, "parameters", "MACs"), rows))


def _scores(model: dict[str, Any], accuracy: dict[str, float]) -> list[str]:
    share = accuracy["successes"] / accuracy["total"]
    by_objects = [f"{model['by_objects'].get(name, float('nan')):.1%}" for name in ("one object", "two objects")]
    interval = f"{accuracy['low']:.1%} - {accuracy['high']:.1%}"
    return [f"{share:.1%}", interval, f"{model['relative']:.1%}", *by_objects]
