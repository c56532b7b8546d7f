"""`bkd sample`, `bkd edit`, `bkd eval`: draw, change and measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from bkd.cli.console import console, counted, prepare, progress_view

MAX_PROMPTS = 1_000_000
Steps = Annotated[Optional[int], typer.Option(min=1, max=1000, help="Denoising steps; a run knows its own.")]
Guidance = Annotated[
    Optional[float], typer.Option(min=1, help="Classifier-free guidance, 1 for none; a run knows its own.")
]

Scheduler = Annotated[
    Optional[str], typer.Option(help="ddim, ddpm, dpm++, euler or unipc, in place of a model's own sampler.")
]


def sample(
    model: Annotated[str, typer.Argument(help="shapes, a run, a pipeline folder or a Hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the pictures.")],
    prompt: Annotated[Optional[list[str]], typer.Option(help="A prompt; may be given again.")] = None,
    prompts: Annotated[Optional[Path], typer.Option(help="Text file, one prompt a line.")] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    scheduler: Scheduler = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the starting noise.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in the output folder.")] = False,
) -> None:
    """Draw one picture for each prompt."""
    from bkd.data.prompts import read_prompts, require_prompts
    from bkd.eval.drawing import Drawing, drawing_settings, require_drawable
    from bkd.models.locate import refuse_unknown
    from bkd.output_folder import require_free

    refuse_unknown(model)
    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    require_prompts(texts, remedy="add --prompt TEXT, or --prompts FILE with one prompt a line")
    require_free(output, overwrite=overwrite, marker="prompts.txt")
    drawing = Drawing(
        *drawing_settings(model, num_inference_steps, guidance_scale, alone=True), seed, scheduler=scheduler
    )
    require_drawable(model, drawing)
    console.print("loading …")
    prepare()
    from bkd.eval.sample import sample_to_folder

    with progress_view() as view:
        view.phase(f"drawing {counted(len(texts), 'picture')}: {drawing}")
        sample_to_folder(model, texts, output, drawing, overwrite, view.update)
    console.print(f"done: {counted(len(texts), 'picture')} in {output}")


def edit(
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP, of the size that the models draw.")],
    encoder: Annotated[str, typer.Option(help="Finds the image's noise: a distilled encoder, or a model not halved.")],
    source: Annotated[str, typer.Option("--from", help="What the image shows.")],
    target: Annotated[str, typer.Option("--to", help="What it is to show.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file.")],
    decoder: Annotated[Optional[str], typer.Option(help="Model that draws; default the encoder.")] = None,
    encoder_guidance_scale: Annotated[
        Optional[float], typer.Option(min=1, help="Default 1, or the least that the encoder knows.")
    ] = None,
    decoder_guidance_scale: Annotated[
        Optional[float], typer.Option(min=1, help="Default 7.5, 3 for shapes, or the nearest that it knows.")
    ] = None,
    num_inference_steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Of models that were not halved to steps of their own.")
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise that a stochastic decoder adds.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output file.")] = False,
) -> None:
    """Encode an image with one prompt or model, decode with another."""
    from bkd.edit_plan import Edit, Half, require_editable
    from bkd.models.locate import refuse_unknown

    for model in (encoder, decoder or encoder):
        refuse_unknown(model)
    require_editable(image, (source, target), output, overwrite=overwrite)
    first = Half.encoder(encoder, encoder_guidance_scale, num_inference_steps)
    second = Half.decoder(decoder or encoder, decoder_guidance_scale, num_inference_steps)
    wish = Edit(image, (source, target), first, second, output, seed)
    wish.require_possible(overwrite=overwrite)
    console.print("loading …")
    prepare()
    from bkd.edit import edit_image

    edit_image(wish, overwrite=overwrite, phase=console.print)
    console.print(f"done: {output}")


def eval_(
    models: Annotated[
        list[str], typer.Argument(help="Runs, pipeline folders or Hub ids; a run stands for its teacher too.")
    ],
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Folder; default RUN/eval, or eval.")] = None,
    teacher: Annotated[Optional[str], typer.Option(help="Reference model; a run names its own.")] = None,
    suite: Annotated[str, typer.Option(help="shapes, prompts or coco30k; see docs/evaluation.md.")] = "shapes",
    prompts: Annotated[Optional[Path], typer.Option(help="Text file, one a line, or .csv with a caption.")] = None,
    num_prompts: Annotated[
        Optional[int], typer.Option(min=1, max=MAX_PROMPTS, help="The first so many; shapes: of each split.")
    ] = None,
    split: Annotated[Optional[list[str]], typer.Option(help="Of suite shapes: test, novel, theme-test, val, …")] = None,
    reference: Annotated[Optional[Path], typer.Option(help="Folder of real images, or pytorch-fid's .npz.")] = None,
    inception: Annotated[Optional[Path], typer.Option(help="Weight file of FID's InceptionV3.")] = None,
    clip: Annotated[Optional[Path], typer.Option(help="open_clip model: folder, or weight file.")] = None,
    clip_architecture: Annotated[Optional[str], typer.Option(help="open_clip's name for a weight file.")] = None,
    resize: Annotated[Optional[int], typer.Option(min=8, help="Side, in pixels, at which images are measured.")] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    seed: Annotated[Optional[int], typer.Option(min=0, help="Of the starting noise; default 0.")] = None,
    rng: Annotated[
        str, typer.Option(help="per-image, or bksdm: one generator for all, default seed 1234.")
    ] = "per-image",
    scheduler: Scheduler = None,
    dtype: Annotated[str, typer.Option(help="What models compute in: float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Images at a time, on a GPU.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a report of other models or settings.")] = False,
) -> None:
    """Measure models side by side, on the same prompts and noise."""
    prepare(*models, teacher)
    from bkd.cli.eval_view import show
    from bkd.environment import process_place
    from bkd.eval.protocols import Wish, plan_drawing, plan_suite
    from bkd.eval.run import evaluate, plan_evaluation
    from bkd.models.load import dtype_named

    wish = Wish(
        suite=suite,
        prompts=prompts,
        num_prompts=num_prompts,
        splits=tuple(split or ()),
        reference=reference,
        inception=inception,
        clip=clip,
        clip_architecture=clip_architecture,
        resize=resize,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        rng=rng,
        scheduler=scheduler,
    )
    planned, drawing, kind = plan_suite(wish), plan_drawing(wish, models[0]), dtype_named(dtype)
    evaluation = plan_evaluation(models, teacher, planned, drawing, output, dtype=kind, batch_size=batch_size)
    main = process_place().rank == 0
    with progress_view("images/s", quiet=not main) as view:
        report = evaluate(evaluation, overwrite=overwrite, phase=view.phase, progress=view.update)
    if main:
        show(report)
        console.print(f"report: {evaluation.report_file}")
