"""From what a user asks for to a suite and a way of drawing; the published protocols are here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bkd.data.prompts import read_prompts
from bkd.errors import DataError, one_of
from bkd.eval.drawing import Drawing, drawing_settings
from bkd.eval.images import Saving
from bkd.eval.prompts_suite import PromptsSuite
from bkd.eval.shapes_suite import ShapesSuite
from bkd.eval.suites import Suite
from bkd.runs.folder import SUITES

BKSDM_SEED, BKSDM_SIDE = 1234, 256
BKSDM_DRAWING = (25, 7.5)
"""Steps and guidance of the published figures (arXiv:2305.15798); the sampler is the model's own, PNDM for SD 1.x."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What was asked for; None where nothing was said.

    Attributes:
        suite: One of `SUITES`.
        prompts: File of prompts.
        num_prompts: The first so many; of each split, for suite shapes.
        splits: Of suite shapes.
        reference: Folder of real images, or an `.npz`.
        inception: Weight file.
        clip: Folder or weight file.
        clip_architecture: Of a weight file.
        resize: Side, in pixels, to which images are brought before they are measured.
        num_inference_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance.
        seed: Of the starting noise.
        rng: See `Drawing`.
        scheduler: See `Drawing`.
    """

    suite: str = "shapes"
    prompts: Path | None = None
    num_prompts: int | None = None
    splits: tuple[str, ...] = ()
    reference: Path | None = None
    inception: Path | None = None
    clip: Path | None = None
    clip_architecture: str | None = None
    resize: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    rng: str = "per-image"
    scheduler: str | None = None


def plan_suite(wish: Wish) -> Suite:
    """The suite that was asked for.

    Raises:
        DataError: If an option is missing, or of another suite.
    """
    one_of(wish.suite, SUITES, kind="suite", error=DataError)
    _require_fitting(wish)
    if wish.suite == "shapes":
        usual = ShapesSuite()
        splits = tuple(dict.fromkeys(wish.splits)) or usual.splits
        return ShapesSuite(wish.num_prompts or usual.num_prompts, splits)
    published = Saving("jpeg", BKSDM_SIDE) if wish.suite == "coco30k" else Saving(side=wish.resize)
    if wish.suite == "coco30k" and wish.prompts is None:
        raise DataError(
            "suite coco30k needs its prompts",
            allowed="metadata.csv of BK-SDM's mscoco_val2014_30k, or any file of prompts",
            remedy="--prompts FILE; docs/evaluation.md says where to get it, and the reference statistics",
        )
    texts = read_prompts(wish.prompts) if wish.prompts else []
    return PromptsSuite(
        wish.suite,
        tuple(texts[: wish.num_prompts]),
        published,
        wish.reference,
        wish.inception,
        wish.clip,
        wish.clip_architecture,
    )


def plan_drawing(wish: Wish, model: str) -> Drawing:
    """How to draw: as asked, else as the protocol says, else as the model is used.

    Args:
        wish: What was asked for.
        model: The first MODEL argument; a run knows how its student is drawn with.
    """
    steps, guidance = wish.num_inference_steps, wish.guidance_scale
    if wish.suite == "coco30k":
        steps, guidance = steps or BKSDM_DRAWING[0], guidance or BKSDM_DRAWING[1]
    else:
        steps, guidance = drawing_settings(model, steps, guidance, suite=wish.suite)
    usual_seed = BKSDM_SEED if wish.rng == "bksdm" else 0
    return Drawing(steps, guidance, usual_seed if wish.seed is None else wish.seed, wish.rng, wish.scheduler)


def _require_fitting(wish: Wish) -> None:
    """Options of other suites would be ignored without a word."""
    of_prompts = {
        "--prompts": wish.prompts,
        "--reference": wish.reference,
        "--inception": wish.inception,
        "--clip": wish.clip,
        "--clip-architecture": wish.clip_architecture,
        "--resize": wish.resize,
    }
    given = [name for name, value in of_prompts.items() if value is not None] if wish.suite == "shapes" else []
    given += ["--split"] if wish.splits and wish.suite != "shapes" else []
    given += ["--resize"] if wish.resize and wish.suite == "coco30k" else []
    if wish.clip_architecture is not None and wish.clip is None and not given:
        raise DataError(
            "--clip-architecture says what --clip holds", got="no --clip", remedy="add --clip FILE, or leave it out"
        )
    if given:
        raise DataError(
            f"suite {wish.suite} does not take {', '.join(given)}",
            allowed=f"coco30k resizes to {BKSDM_SIDE} px by itself" if wish.suite == "coco30k" else None,
            remedy="leave it out" + ("" if wish.suite != "shapes" else ", or add --suite prompts"),
        )
