"""Students chosen by score beside presets of the same size, after the same short distillation.

    python tools/compare_keep.py -o FOLDER [--steps 25 100] [--seeds 3] [--num-prompts 500]

For sd-small and sd-tiny: the preset, and what `bkd prune --keep` chooses at just as many parameters or MACs.
Each is distilled for a few steps with each seed, otherwise as recipes/shapes/sd-small.yaml says, and draws captions
that never occur in training. Writes FOLDER/compare_keep.json and prints the table of docs/surgery.md. Trained students
are found again when it is started anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bkd.data.shapes import EMBEDDED, scenes
from bkd.data.shapes_checker import check
from bkd.data.sources import find_sources
from bkd.eval.generate import generate
from bkd.eval.pictures import with_unet
from bkd.eval.statistics import proportion
from bkd.files import cache_folder, write_atomically
from bkd.models.load import load_pipeline, load_unet
from bkd.models.locate import locate
from bkd.pruning.calibration import calibration_batches
from bkd.pruning.importance import select
from bkd.pruning.prune import plan_pruning
from bkd.surgery.build import build_student
from bkd.surgery.score import OutputChange

NUM_CALIBRATION = 64


def arms(teacher: Path) -> dict[str, str]:
    """Name -> removed units, for both presets and the choices that cost no more."""
    found = {}
    for preset in ("sd-small", "sd-tiny"):
        cost = plan_pruning(teacher, preset).after
        found[preset] = preset
        for keep, count_macs in ((cost.parameters, False), (cost.macs, True)):
            chosen = select(teacher, str(keep), EMBEDDED, num_samples=NUM_CALIBRATION, count_macs=count_macs)
            found[f"--keep {keep}" + " --macs" * count_macs] = ",".join(chosen.plan.removed)
    return found


def train(run: Path, blocks: str, steps: int, seed: int) -> Path:
    """Distil as the shapes recipe does, in a process of its own; returns the student's folder."""
    overrides = [f"stages.0.student.blocks={blocks}", f"train.max_steps={steps}", f"seed={seed}", "samples.prompts=[]"]
    command = [
        sys.executable,
        "-m",
        "bkd",
        "train",
        "shapes/sd-small",
        *overrides,
        "train.warmup_steps=5",
        "-o",
        str(run),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run / "student"


def accuracy(pipe: Any, unet: Any, prompts: list[str]) -> list[bool]:
    """Whether each prompt's picture shows what it says: 20 steps, guidance 3, the same noise for every student."""
    images = generate(with_unet(pipe, unet), prompts, num_inference_steps=20, guidance_scale=3.0)
    return [verdict.correct for verdict in check(images, prompts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 100])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=500)
    args = parser.parse_args()
    teacher, shards = locate(EMBEDDED), find_sources(EMBEDDED, cache_folder())
    pipe = load_pipeline(teacher)
    change = OutputChange(pipe.unet, calibration_batches(teacher, pipe, shards, NUM_CALIBRATION))
    prompts = [scene.caption for scene in scenes("test", args.num_prompts)]
    rows = []
    for name, blocks in arms(teacher).items():
        pruning = plan_pruning(teacher, blocks)
        plan, cost = pruning.plan, pruning.after
        row: dict[str, Any] = {"name": name, "removed": plan.removed, "output_change": change.of_plan(plan)}
        row |= {"parameters": cost.parameters, "macs": cost.macs}
        for steps in (0, *args.steps):
            outcomes: list[bool] = []
            seeds = range(args.seeds if steps else 1)
            for seed in seeds:
                run = args.output / f"{name.replace('--', '').replace(' ', '-')}-{steps}-{seed}"
                unet = load_unet(train(run, blocks, steps, seed)) if steps else build_student(pipe.unet, plan)
                outcomes += accuracy(pipe, unet, prompts)
                print(f"{name}, {steps} steps, seed {seed}: {proportion(outcomes)}", flush=True)
            row[f"after {steps}"] = str(proportion(outcomes))
        rows.append(row)
        write_atomically(args.output / "compare_keep.json", json.dumps(rows, indent=2) + "\n")
    header = ["name", "parameters", "macs", "output_change", *(f"after {steps}" for steps in (0, *args.steps))]
    print("| " + " | ".join(header) + " |")
    for row in rows:
        print(
            "| " + " | ".join(f"{row[key]:.2g}" if key == "output_change" else str(row[key]) for key in header) + " |"
        )
    for row in rows:
        print(f"{row['name']} removes {', '.join(row['removed'])}")


if __name__ == "__main__":
    main()
