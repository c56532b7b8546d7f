"""Steps of training with adapters, taking turns in one process: what sharing costs, and what a smaller base saves.

python tools/bench_lora.py [--batch 32] [--mixed-precision bf16]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from bench_train import median_ratio, taking_turns

from bkd.bench.train import SimulatedSamples, Unsaved
from bkd.models.folder import native_resolution
from bkd.models.load import load_pipeline
from bkd.models.locate import locate
from bkd.recipe.load import load_recipe
from bkd.runs.run import check_stages
from bkd.runs.stage_setup import build_method
from bkd.training.fit import Fit
from bkd.training.parallel import start_parallel

STEPS = 2
"""Of each side in a turn."""


class Step:
    """One optimizer step of a recipe.

    Args:
        recipe: Packaged name.
        overrides: `key=value`.
        stack: Closed when the measurement ends.
    """

    def __init__(self, recipe: str, overrides: list[str], stack: ExitStack) -> None:
        parsed = load_recipe(recipe, [*overrides, "data.shards=simulated", "train.max_steps=1000000"])
        teacher = locate(parsed.teacher.id)
        pipe, parallel = load_pipeline(teacher), start_parallel("auto")
        method = build_method(check_stages(parsed, teacher)[0], pipe, parallel.device)
        samples = SimulatedSamples(pipe, native_resolution(teacher))
        self._fit = Fit(method, samples, parsed.train, checkpoints=Unsaved(), parallel=parallel, seed=0)
        stack.enter_context(method.watching())
        self._batches: Iterator[Any] = stack.enter_context(closing(self._fit.batches(0)))
        self._step = 0

    def __call__(self) -> None:
        self._fit.update(self._step, self._batches)
        self._step += 1
        if self._step % 10 == 0:
            self._fit._journal.read(stop=False)


def compare(title: str, recipes: dict[str, tuple[str, list[str]]], common: list[str]) -> None:
    """A table of steps; ratios are of times in the same round, the first side's to each other's."""
    with ExitStack() as stack:
        sides: dict[str, Callable[[], None]] = {
            name: Step(recipe, [*overrides, *common], stack) for name, (recipe, overrides) in recipes.items()
        }
        seconds = taking_turns(sides, STEPS)
    first = seconds[next(iter(sides))]
    print(f"\n| {title} | s a step | throughput |\n|---|---|---|")
    for name in sides:
        print(f"| {name} | {statistics.median(seconds[name]):.4f} | {median_ratio(first, seconds[name]):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    given = parser.parse_args()
    common = [f"train.batch={given.batch}", f"train.mixed_precision={given.mixed_precision}"]
    guided = "shapes/guided-lora"
    sharing = {
        "adapters over a copy": (guided, ["stages.0.lora.share_base=false"]),
        "adapters over the teacher's weights": (guided, []),
        "all weights": (guided, ["stages.0.lora=null"]),
    }
    compare("guided distillation", sharing, common)
    with tempfile.TemporaryDirectory() as scratch:
        bases = {"the base model": "shapes"}
        for preset in ("sd-small", "sd-tiny"):
            bases[preset] = str(Path(scratch) / preset)
            prune = [sys.executable, "-m", "bkd", "prune", "shapes", "--blocks", preset, "-o", bases[preset]]
            subprocess.run(prune, check=True, stdout=subprocess.DEVNULL)
        tuned = {name: ("shapes/lora-finetune", [f"teacher.id={folder}"]) for name, folder in bases.items()}
        compare("LoRA training of", tuned, common)


if __name__ == "__main__":
    main()
