"""Comparison pictures: the same prompt and the same noise through several models, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bkd.eval.generate import generate
from bkd.recipe.schema import Samples

MIN_TILE = 128
"""Small images are enlarged, by whole factors and without smoothing, to at least this side."""
GAP = 8
LINE = 14


def with_unet(pipe: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The same pipeline with another UNet; nothing is copied."""
    no_checker = {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
    other: StableDiffusionPipeline = type(pipe)(**{**pipe.components, "unet": unet}, **no_checker)
    other.set_progress_bar_config(disable=True)
    return other


def save_pairs(path: Path, teacher: StableDiffusionPipeline, student: UNet2DConditionModel, samples: Samples) -> None:
    """Draw every validation prompt with teacher and student and write one picture."""
    columns = {}
    for name, pipe in (("teacher", teacher), ("student", with_unet(teacher, student))):
        columns[name] = generate(
            pipe,
            samples.prompts,
            num_inference_steps=samples.num_inference_steps,
            guidance_scale=samples.guidance_scale,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(columns, samples.prompts).save(path)


def side_by_side(columns: dict[str, Tensor], prompts: Sequence[str]) -> Image.Image:
    """One column per prompt, one row per model, the prompt beneath.

    Args:
        columns: Model name -> (N, 3, H, W), uint8.
        prompts: N texts.
    """
    side = next(iter(columns.values())).shape[-1]
    tile = side * max(1, -(-MIN_TILE // side))
    font = ImageFont.load_default(size=11)
    captions = [textwrap.wrap(prompt, width=tile // 6) for prompt in prompts]
    label_width = 10 + max(int(font.getlength(name)) for name in columns)
    footer = LINE * max(len(lines) for lines in captions) + GAP
    size = (label_width + len(prompts) * (tile + GAP) + GAP, GAP + len(columns) * (tile + GAP) + footer)
    picture = Image.new("RGB", size, "#f4f4f2")
    draw = ImageDraw.Draw(picture)
    for row, (name, images) in enumerate(columns.items()):
        top = GAP + row * (tile + GAP)
        draw.text((6, top + tile // 2 - 6), name, fill="#222222", font=font)
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((tile, tile), Image.Resampling.NEAREST)
            picture.paste(enlarged, (label_width + GAP + column * (tile + GAP), top))
    for column, lines in enumerate(captions):
        left, top = label_width + GAP + column * (tile + GAP), GAP + len(columns) * (tile + GAP)
        draw.multiline_text((left, top), "\n".join(lines), fill="#444444", font=font, spacing=2)
    return picture
