"""Measure models on a suite of prompts and write what was found, with everything needed to repeat it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline

from bkd import __version__
from bkd.cost import unet_cost
from bkd.data.shapes import SPLITS, Split, scenes
from bkd.data.shapes_checker import ATTRIBUTES, check
from bkd.environment import PACKAGES, installed_version
from bkd.errors import DataError, one_of
from bkd.eval.generate import generate
from bkd.eval.pictures import side_by_side
from bkd.eval.statistics import mcnemar_p, proportion
from bkd.files import write_atomically
from bkd.progress import Progress, silent

NUM_PICTURED = 8
SUITES = ("shapes", "prompts")


@dataclass(frozen=True)
class Candidate:
    """A model to be measured, under the name the table shows."""

    name: str
    pipe: StableDiffusionPipeline


@dataclass(frozen=True)
class Settings:
    """What a measurement depends on besides the models.

    Attributes:
        suite: `shapes`: caption accuracy on the embedded world. `prompts`: pictures without a score.
        num_prompts: Prompts of suite `shapes`, from the first of the split on.
        split: Of the embedded world: `test` captions never occur in training; `novel` has unseen combinations.
        num_inference_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; 1 for none.
        seed: Of the starting noise.
        prompts: The user's own, for suite `prompts`.
    """

    suite: str = "shapes"
    num_prompts: int = 200
    split: str = "test"
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    seed: int = 0
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of(self.suite, SUITES, kind="suite", error=DataError)
        one_of(self.split, SPLITS, kind="split", error=DataError)

    def captions(self) -> list[str]:
        if self.suite == "prompts":
            return list(self.prompts)
        return [drawn.caption for drawn in scenes(cast(Split, self.split), self.num_prompts)]


def evaluate(
    candidates: Sequence[Candidate],
    settings: Settings,
    output: Path,
    *,
    facts: Mapping[str, Any],
    phase: Callable[[str], None] = lambda name: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Draw the suite with every model, on the same prompts and the same noise, and score what can be scored.

    The first candidate is the reference (the teacher): the others are compared with it.

    Args:
        candidates: At least one.
        settings: See `Settings`.
        output: Folder for `<suite>.json` and the picture `<suite>.png`.
        facts: Written into the report as they are.
        phase: Called with the name of each model before it draws.
        progress: Called with (done, total) while it does.

    Returns:
        What was written to `<suite>.json`.
    """
    prompts = settings.captions()
    images = {}
    for candidate in candidates:
        phase(candidate.name)
        images[candidate.name] = _draw(candidate, prompts, settings, progress)
    rows = [{"name": c.name, **_cost(c.pipe)} for c in candidates]
    if settings.suite == "shapes":
        for row, scores in zip(rows, _score_shapes(list(images.values()), prompts), strict=True):
            row.update(scores)
    report = {
        "settings": asdict(settings),
        "environment": _environment(candidates[0].pipe),
        **facts,
        "models": rows,
    }
    output.mkdir(parents=True, exist_ok=True)
    pictured = {name: drawn[:NUM_PICTURED] for name, drawn in images.items()}
    side_by_side(pictured, prompts[:NUM_PICTURED]).save(output / f"{settings.suite}.png")
    write_atomically(output / f"{settings.suite}.json", json.dumps(report, indent=2) + "\n")
    return report


def _score_shapes(images: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Caption accuracy of each model, compared with the first one's."""
    verdicts = [check(drawn, prompts) for drawn in images]
    outcomes = [[v.correct for v in found] for found in verdicts]
    return [
        {
            "accuracy": asdict(proportion(correct)),
            "attributes": {a: proportion([v.attributes[a] for v in found]).value for a in ATTRIBUTES},
            "by_objects": _by_objects(prompts, correct),
            "relative": sum(correct) / max(1, sum(outcomes[0])),
            "mcnemar_p": mcnemar_p(outcomes[0], correct),
        }
        for found, correct in zip(verdicts, outcomes, strict=True)
    ]


def _draw(candidate: Candidate, prompts: Sequence[str], settings: Settings, progress: Progress) -> torch.Tensor:
    return generate(
        candidate.pipe,
        prompts,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        seed=settings.seed,
        progress=progress,
    )


def _by_objects(prompts: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """Accuracy of captions with one object and with two: composition is where small models fail first."""
    groups: dict[str, list[bool]] = {}
    for prompt, right in zip(prompts, correct, strict=True):
        groups.setdefault("two objects" if " and " in prompt else "one object", []).append(right)
    return {name: sum(group) / len(group) for name, group in sorted(groups.items())}


def _cost(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    cost = unet_cost(dict(pipe.unet.config), num_tokens=pipe.tokenizer.model_max_length)
    return {
        "unet_parameters": cost.parameters,
        "unet_macs": cost.macs,
        "unet_macs_without_attention": cost.macs_without_attention,
    }


def _environment(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    return {
        "bkd": __version__,
        "device": str(pipe.device.type),
        "threads": torch.get_num_threads(),
        "dtype": str(pipe.unet.dtype),
        "versions": {name: installed_version(name) for name in PACKAGES},
    }
