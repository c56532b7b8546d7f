"""`bkd data …`: shards made, looked at, filtered, cached and drawn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from bkd.cli.console import ProgressView, console, counted, prepare, progress_view

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from bkd.data.caching import Caching
    from bkd.data.filtering import Predictor
    from bkd.data.survey import DataWish

data = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make, check, filter and cache shards of images and captions."
)
SHARDS = "A tar, a folder, a glob, a brace pattern, an address (https, s3), or shapes."
Shards = Annotated[str, typer.Argument(metavar="SHARDS", help=SHARDS)]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write; the same command again continues.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a data set of other settings in the output folder.")]
Caption = Annotated[Optional[str], typer.Option(help="txt, or json:FIELD for a field of KEY.json.")]
Where = Annotated[
    Optional[list[str]],
    typer.Option(help="What samples must be, such as 'aesthetic >= 6.5, missing drop'; may be given again."),
]
FromRecipe = Annotated[Optional[str], typer.Option("--recipe", help="Take captions and filters from this recipe.")]


def _wish(recipe: str | None, caption: str | None, where: list[str] | None) -> DataWish:
    """What the recipe wants, where one is given, and what the options say beyond it."""
    from bkd.data.captions import CaptionSource
    from bkd.data.filters import parse_filters, parse_where
    from bkd.data.survey import DataWish
    from bkd.files import cache_folder
    from bkd.recipe.load import load_recipe

    known = load_recipe(recipe, ["data.shards=shapes"]).data if recipe else None
    source = CaptionSource.parse(caption or (known.caption if known else "txt"))
    filters = parse_filters(known.filters) if known else ()
    return DataWish(source, (*filters, *map(parse_where, where or ())), cache_folder())


def _resolution(recipe: str | None) -> int | None:
    """A recipe's training resolution, where that can be known without a download."""
    from bkd.models.folder import native_resolution
    from bkd.models.locate import is_folder, locate
    from bkd.recipe.load import load_recipe

    if recipe is None:
        return None
    known = load_recipe(recipe, ["data.shards=shapes"])
    if known.data.resolution or not is_folder(known.teacher.id):
        return known.data.resolution
    return native_resolution(locate(known.teacher.id, weights=False))


def _predictor(clip: Path | None, head: Path | None) -> Predictor | None:
    if (clip is None) != (head is None):
        raise typer.BadParameter("goes with --head, and --head with it", param_hint="--score-with")
    if clip is None or head is None:
        return None
    prepare()
    from bkd.data.aesthetic import load_predictor
    from bkd.models.load import best_device

    return load_predictor(clip, head, device=str(best_device()))


@data.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Pictures with NAME.txt or NAME.caption, or one metadata.jsonl/.csv.")],
    output: Output,
    caption: Annotated[Optional[str], typer.Option(help="Caption column of the metadata file.")] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 10_000,
    overwrite: Overwrite = False,
) -> None:
    """Make shards of a folder of captioned pictures."""
    from bkd.cli.data_view import show_reasons
    from bkd.data.output_set import require_ours
    from bkd.data.pack import pack_folder, write_packing
    from bkd.files import cache_folder

    require_ours(output)
    packing = pack_folder(folder, caption_field=caption)
    with progress_view(continues=True) as view:
        view.phase(f"packing {counted(len(packing.files), 'picture')}")
        totals = write_packing(
            packing, output, per_shard=per_shard, overwrite=overwrite, cache=cache_folder(), progress=view.update
        )
    show_reasons("packed", totals, "files")
    console.print(f"done: {output}")


@data.command()
def check(
    shards: Shards,
    recipe: FromRecipe = None,
    caption: Caption = None,
    where: Where = None,
    resolution: Annotated[Optional[int], typer.Option(min=8, help="Side of the training images, in pixels.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Find what would spoil a training on these shards.

    Exit code 1 when none could work.
    """
    from bkd.cli.data_view import show_check, show_latents
    from bkd.data.check import check_latents, check_shards, require_usable
    from bkd.data.sources import find_sources
    from bkd.files import cache_folder

    wish = _wish(recipe, caption, where)
    if (latents := check_latents(shards, wish)) is not None:
        show_latents(latents, as_json=as_json)
        return
    sources = find_sources(shards, cache_folder())
    side = resolution or _resolution(recipe)
    with progress_view() as view:
        report = check_shards(sources, wish, resolution=side, progress=view.update)
    show_check(report, as_json=as_json)
    require_usable(report, shards)


@data.command(name="filter")
def filter_(
    shards: Shards,
    output: Output,
    where: Where = None,
    recipe: FromRecipe = None,
    caption: Caption = None,
    score_with: Annotated[
        Optional[Path], typer.Option(metavar="CLIP", help="Score images without an aesthetic score: ViT-L/14 weights.")
    ] = None,
    head: Annotated[Optional[Path], typer.Option(help="Weights of LAION's aesthetic predictor, V1 or V2.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy the samples that pass into new shards.

    Prints a table of why the others do not.
    """
    from bkd.cli.data_view import show_reasons
    from bkd.data.filtering import filter_shards, survey_to_filter
    from bkd.data.output_set import require_ours
    from bkd.data.sources import find_sources
    from bkd.files import cache_folder

    require_ours(output)
    wish = _wish(recipe, caption, where)
    predictor = _predictor(score_with, head)
    with progress_view(continues=True) as view:
        view.phase("indexing")
        surveyed = survey_to_filter(find_sources(shards, cache_folder()), wish, predictor, view.update)
        view.phase("filtering")
        totals = filter_shards(surveyed, wish, output, predictor=predictor, overwrite=overwrite, progress=view.update)
    show_reasons("kept", totals)
    console.print(f"done: {output}")


@data.command()
def cache(
    shards: Shards,
    output: Output,
    teacher: Annotated[
        str, typer.Option(help="Whose autoencoder and tokenizer: a pipeline folder, a run or a Hub id.")
    ],
    resolution: Annotated[
        Optional[int], typer.Option(min=8, help="Side in pixels; the teacher's own if left out.")
    ] = None,
    recipe: FromRecipe = None,
    caption: Caption = None,
    where: Where = None,
    mirrored: Annotated[bool, typer.Option(help="Encode mirrored images, too; not where captions name sides.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Encode images and captions once.

    Under `accelerate launch` the shards are shared between the processes.
    """
    prepare(teacher)
    from bkd.cli.data_view import show_latents
    from bkd.data.caching import ensure_latents, plan_caching
    from bkd.data.check import check_latents
    from bkd.data.output_set import require_ours
    from bkd.environment import process_place
    from bkd.models.folder import native_resolution
    from bkd.models.locate import locate

    require_ours(output)
    wish, place, folder = _wish(recipe, caption, where), process_place(), locate(teacher)
    side = resolution or native_resolution(folder)
    with progress_view("samples/s", quiet=place.rank > 0, continues=True) as view:
        view.phase("indexing")
        caching = plan_caching(
            shards, folder, wish, resolution=side, mirrored=mirrored, folder=output, progress=view.update
        )
        load = partial(_load_encoders, folder, view, caching)
        ensure_latents(caching, load, place=place, overwrite=overwrite, progress=view.update)
    if place.world_size == 1 and (latents := check_latents(str(output), wish)) is not None:
        show_latents(latents, as_json=False)


def _load_encoders(folder: Path, view: ProgressView, caching: Caching) -> StableDiffusionPipeline:
    from bkd.data.caching import counted_images
    from bkd.models.load import best_device, load_pipeline

    view.phase(f"encoding {counted_images(caching.num_samples)}")
    return load_pipeline(folder, device=best_device(), without=("unet", "text_encoder", "text_encoder_2"))


@data.command()
def generate(
    teacher: Annotated[str, typer.Argument(help="shapes, a run, a pipeline folder or a Hub id.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line.")],
    output: Output,
    num_inference_steps: Annotated[Optional[int], typer.Option(min=1, max=1000, help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        Optional[float], typer.Option(min=1, help="Classifier-free guidance, 1 for none.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the starting noise.")] = 0,
    image_format: Annotated[Literal["png", "jpg"], typer.Option("--format", help="png, or jpg of quality 95.")] = "png",
    per_shard: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 1000,
    overwrite: Overwrite = False,
) -> None:
    """Draw shards with a teacher, an image a prompt.

    Any number of processes draws the same ones.
    """
    prepare(teacher)
    from bkd.data.output_set import require_ours
    from bkd.data.prompts import read_prompts
    from bkd.environment import process_place
    from bkd.eval.drawing import drawing_settings
    from bkd.pregenerate import ShardDrawing, generate_shards

    require_ours(output)
    texts = read_prompts(prompts)
    steps, guidance = drawing_settings(teacher, num_inference_steps, guidance_scale, alone=True)
    drawing = ShardDrawing(
        num_inference_steps=steps, guidance_scale=guidance, seed=seed, extension=image_format, per_shard=per_shard
    )
    place = process_place()
    with progress_view("images/s", quiet=place.rank > 0, continues=True) as view:
        view.phase(f"drawing {counted(len(texts), 'prompt')}")
        generate_shards(teacher, texts, drawing, output, place=place, overwrite=overwrite, progress=view.update)
    if place.rank == 0:
        console.print(f"done: {output}")
