"""The lines that load a student and draw with it, as they stand in its card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bkd.card.files import REPO_PLACEHOLDER
from bkd.guidance import StudentKind
from bkd.model_folder import read_json
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
    if kind.few_steps is not None and kind.few_steps.direction == "inversion":
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
    return Usage(code, tuple(_notes(kind)))


def _call(kind: StudentKind, samples: Samples) -> Mapping[str, str]:
    steps = kind.few_steps.stock_steps if kind.few_steps else samples.num_inference_steps
    scale = samples.guidance_scale
    if kind.guidance is not None:
        scale = kind.guidance.pipeline_scale(kind.guidance.nearest(scale), "this student")
    return {"num_inference_steps": str(steps), "guidance_scale": f"{scale:g}"}


def _notes(kind: StudentKind) -> Iterator[str]:
    known, few = kind.guidance, kind.few_steps
    if known is not None and known.takes_scale:
        yield (
            f"Guidance is distilled into one pass: `guidance_scale`, from {known.low:g} to {known.high:g}, is an input "
            "of the network; each step evaluates it once, and a negative prompt has no effect."
        )
    elif known is not None:
        yield (
            f"Guidance with scale {known} is distilled into the weights: call it with `guidance_scale=1.0`; each step "
            "evaluates the network once, and a negative prompt has no effect."
        )
    if few is not None:
        yield (
            f"It was halved to {few}: draw with `num_inference_steps={few.stock_steps}` and the scheduler of this "
            "repository. Other numbers of steps and other schedulers visit noise levels that it never saw."
        )
        if few.sampler == "stochastic":
            yield (
                f"Figures and pictures of this card are of the sampler that it was trained for, {few} with "
                "`bkd.sampling.StochasticScheduler`; stock diffusers has none like it, and takes half as many "
                "deterministic steps."
            )
