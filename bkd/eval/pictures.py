"""Comparison pictures: the same prompt and the same noise through several models, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bkd.diffusion.guidance import StudentKind
from bkd.diffusion.schedulers import scheduler_of
from bkd.eval.generate import generate
from bkd.eval.sheet import GAP, Sheet
from bkd.models.load import autocast
from bkd.recipe.schema import Samples

MIN_TILE = 128
"""Small images are enlarged, by whole factors and without smoothing, to at least this side."""
PIPELINE_SETTINGS = ("requires_safety_checker", "force_zeros_for_empty_prompt")
LINE = 14
LABEL_GAP = 10


def with_unet(
    pipe: StableDiffusionPipeline, unet: UNet2DConditionModel, kind: StudentKind | None = None
) -> StableDiffusionPipeline:
    """The same pipeline with another UNet; nothing is copied.

    Args:
        pipe: Stays as it is.
        unet: The other one.
        kind: How the other one is used, where that differs.
    """
    settings = {name: pipe.config[name] for name in PIPELINE_SETTINGS if name in pipe.config}
    if isinstance(pipe, StableDiffusionXLPipeline):
        settings["add_watermarker"] = False
    parts = {**pipe.components, "unet": unet}
    if kind is not None:
        parts["scheduler"] = scheduler_of(pipe.scheduler, kind)
    size = unet.config.sample_size
    other: StableDiffusionPipeline = type(pipe)(**parts, **settings)
    unet.register_to_config(sample_size=size)  # diffusers takes small ones of early configurations for mistakes
    other.set_progress_bar_config(disable=True)
    return other


class ValidationPictures:
    """Teacher | student for each validation prompt, from the same noise; the teacher draws once.

    Args:
        origin: What the teacher is called.
        pipe: The teacher's pipeline; what training does not need is on the device only while pictures are drawn.
        samples: What to draw, and how.
        dtype: Of the forward passes.
        device: To draw on.
        kind: How the student is used.
        teacher_kind: How the teacher is.
    """

    def __init__(
        self,
        origin: str,
        pipe: StableDiffusionPipeline,
        samples: Samples,
        dtype: torch.dtype,
        device: torch.device,
        kind: StudentKind,
        teacher_kind: StudentKind,
    ) -> None:
        self._origin, self._pipe, self._samples, self._dtype, self._device = origin, pipe, samples, dtype, device
        self._kind, self._teacher_kind = kind, teacher_kind
        self._teacher: Tensor | None = None

    def draw_teacher(self) -> None:
        """Now, rather than at the first picture."""
        if self._teacher is None and self.wanted:
            self._teacher = self._draw(self._pipe, self._teacher_kind, self._origin)

    def save(self, path: Path, student: UNet2DConditionModel) -> None:
        """Write one picture, where there are prompts, and the student does not encode."""
        if not self.wanted:
            return
        self.draw_teacher()
        assert self._teacher is not None
        ours = self._draw(with_unet(self._pipe, student, self._kind), self._kind, "student")
        drawn = {self._origin: self._teacher, "student": ours}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_side_by_side(path, drawn, self._samples.prompts)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self._samples.prompts) and not self._kind.encodes

    def _draw(self, pipe: StableDiffusionPipeline, kind: StudentKind, name: str) -> Tensor:
        asked = self._samples
        parts = (pipe.vae, pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
        visitors = [part for part in parts if part is not None and part.device.type != self._device.type]
        for part in visitors:
            part.to(self._device)
        try:
            # What trains is float32, and so is the autoencoder, which may overflow in float16.
            with autocast(self._dtype, self._device):
                return generate(
                    pipe,
                    asked.prompts,
                    num_inference_steps=kind.steps(asked.num_inference_steps),
                    guidance_scale=kind.pipeline_scale(asked.guidance_scale, name),
                )
        finally:
            for part in visitors:
                part.to("cpu")


def save_side_by_side(target: Path | BinaryIO, columns: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    """`side_by_side` as a PNG file that says where its tiles lie.

    Args:
        target: The file, or where its bytes go.
        columns: Model name -> (N, 3, H, W), uint8.
        prompts: N texts.
    """
    side_by_side(columns, prompts).save(target, format="PNG", pnginfo=_sheet(columns, prompts).text())


def _sheet(columns: Mapping[str, Tensor], prompts: Sequence[str]) -> Sheet:
    side = next(iter(columns.values())).shape[-1]
    left = GAP + LABEL_GAP + max(int(_font().getlength(name)) for name in columns)
    return Sheet(tuple(columns), tuple(prompts), side, side * max(1, -(-MIN_TILE // side)), left)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=11)


def side_by_side(columns: Mapping[str, Tensor], prompts: Sequence[str]) -> Image.Image:
    """One column per prompt, one row per model, the prompt beneath.

    Args:
        columns: Model name -> (N, 3, H, W), uint8.
        prompts: N texts.
    """
    sheet, font = _sheet(columns, prompts), _font()
    tile = sheet.tile
    captions = [textwrap.wrap(prompt, width=tile // 6) for prompt in prompts]
    footer = LINE * max(len(lines) for lines in captions) + GAP
    right, bottom = sheet.corner(len(columns), len(prompts))
    size = (right, bottom + footer)
    picture = Image.new("RGB", size, "#f4f4f2")
    draw = ImageDraw.Draw(picture)
    for row, (name, images) in enumerate(columns.items()):
        _, top = sheet.corner(row, 0)
        draw.text((6, top + tile // 2 - 6), name, fill="#222222", font=font)
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((tile, tile), Image.Resampling.NEAREST)
            picture.paste(enlarged, sheet.corner(row, column))
    for column, lines in enumerate(captions):
        draw.multiline_text(sheet.corner(len(columns), column), "\n".join(lines), fill="#444444", font=font, spacing=2)
    return picture
