"""The lines that load a student and draw with it, as they stand in its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bkd.card.files import REPO_PLACEHOLDER
from bkd.diffusion.guidance import StudentKind
from bkd.models.folder import read_json
from bkd.recipe.schema import Samples

FALLBACK_PROMPT = "a photograph of a lighthouse at dusk"


@dataclass(frozen=True)
class Usage:
    """How a student is called.

    Attributes:
        code: Python that draws one image; None for a student that encodes.
        notes: What is not as usual, a sentence each.
    """

    code: str | None
    notes: tuple[str, ...]


def usage(folder: Path, samples: Samples) -> Usage:
    """Of a student's folder.

    Args:
        folder: Pipeline folder.
        samples: Steps, scale and prompt to show.
    """
    kind = StudentKind.of(folder)
    if kind.encodes:
        return Usage(None, ())
    prompt = json.dumps(samples.prompts[0] if samples.prompts else FALLBACK_PROMPT, ensure_ascii=False)
    arguments = "".join(f",\n    {name}={value}" for name, value in _call(kind, samples).items())
    pipeline = read_json(folder / "model_index.json").get("_class_name", "DiffusionPipeline")
    code = f'''from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{REPO_PLACEHOLDER}")
image = pipe(
    {prompt}{arguments},
).images[0]
image.save("image.png")
'''
    notes = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in kind.calls()]
    if kind.few_steps is not None and kind.few_steps.sampler == "stochastic":
        notes.append("Figures and pictures of this card are of the stochastic sampler, which stock diffusers lacks.")
    return Usage(code, tuple(notes))


def _call(kind: StudentKind, samples: Samples) -> Mapping[str, str]:
    steps = kind.few_steps.stock_steps if kind.few_steps else samples.num_inference_steps
    scale = samples.guidance_scale
    if kind.guidance is not None:
        scale = kind.guidance.pipeline_scale(kind.guidance.nearest(scale), "this student")
    return {"num_inference_steps": str(steps), "guidance_scale": f"{scale:g}"}
