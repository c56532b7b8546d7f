"""Measure what the embedded world promises, on 1,000 samples, with 95 % Wilson intervals.

    python tools/check_shapes_gates.py [--num 1000]

The checker reads clean renders and rejects captions with one wrong attribute; the autoencoder keeps what the checker
reads; the teacher draws what captions say. Exits with 1 when a gate is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys

import torch
from torch import Tensor

from bkd.data.images import to_model_range, to_pixels
from bkd.data.shapes import BACKGROUNDS, COLORS, POSITIONS, RADII, SHAPES, Scene, scenes
from bkd.data.shapes_checker import check, rendered
from bkd.eval.generate import generate
from bkd.eval.statistics import Proportion, proportion
from bkd.models.load import load_pipeline
from bkd.models.locate import locate


def one_attribute_wrong(drawn: Scene, rng: random.Random) -> Scene:
    """The same scene with one attribute changed: its caption is false of the picture."""
    kind = rng.choice(["background", "shape", "color", "size", "position"])
    if kind == "background":
        return dataclasses.replace(drawn, background=rng.choice([b for b in BACKGROUNDS if b != drawn.background]))
    index = rng.randrange(len(drawn.objects))
    changed = drawn.objects[index]
    taken = [o.position for o in drawn.objects]
    free = tuple(p for p in POSITIONS if p not in taken)
    options = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(RADII), "position": free}[kind]
    value = rng.choice([option for option in options if option != getattr(changed, kind)])
    objects = list(drawn.objects)
    objects[index] = dataclasses.replace(changed, **{kind: value})
    return dataclasses.replace(drawn, objects=tuple(objects))


@torch.no_grad()
def reconstruct(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    parts = [vae.decode(vae.encode(to_model_range(part)).latent_dist.mean).sample for part in pixels.split(100)]
    return to_pixels(torch.cat(parts))


def correct(pixels: Tensor, captions: list[str]) -> Proportion:
    return proportion([verdict.correct for verdict in check(pixels, captions)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    drawn = list(scenes("test", args.num))
    captions = [s.caption for s in drawn]
    pixels = rendered(drawn)
    rng = random.Random(0)
    pipe = load_pipeline(locate("shapes"))

    def draw(split: str) -> Proportion:
        prompts = [s.caption for s in scenes(split, args.num)]  # type: ignore[arg-type]
        images = generate(pipe, prompts, num_inference_steps=args.steps, guidance_scale=args.guidance)
        return correct(images, prompts)

    how = f"{args.steps} steps, guidance {args.guidance:g}"
    gates = [
        ("checker on clean renders", correct(pixels, captions), lambda p: p.value == 1, "100 %"),
        (
            "captions with one wrong attribute accepted",
            correct(pixels, [one_attribute_wrong(s, rng).caption for s in drawn]),
            lambda p: p.value == 0,
            "0",
        ),
        (
            "checker on reconstructions",
            correct(reconstruct(pipe.vae, pixels), captions),
            lambda p: p.value >= 0.99,
            "≥ 99 %",
        ),
        (f"teacher, unseen captions, {how}", draw("test"), lambda p: p.value >= 0.95, "≥ 95 %"),
        (f"teacher, unseen combinations, {how}", draw("novel"), lambda p: True, "no gate"),
    ]
    for name, found, passes, wanted in gates:
        verdict = "pass" if passes(found) else "MISS"
        print(f"{verdict}  {name}: {found.successes}/{found.total} = {found}  (gate: {wanted})")
    sys.exit(not all(passes(found) for _, found, passes, _ in gates))


if __name__ == "__main__":
    main()
