"""Memory of a training step of the recipes for SD 1.5, counted from configurations as `bkd train --dry-run` counts it.

    python tools/count_memory.py [key=value …] [--images 1 4 8 16 32 64]

A Markdown table: GiB of tensors by recipe and images in a pass. No model is needed.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from bench_memory import make_configurations

from bkd.bench.memory import for_one_pass
from bkd.cli.console import prepare
from bkd.cli.cost_view import estimated, gib
from bkd.recipe.load import load_recipe
from bkd.recipe.schema import Recipe
from bkd.runs.run import check_stages

RECIPES = ("sd-small", "sd-tiny", "bk-base", "bk-small", "bk-tiny", "guided", "sd-small-lora", "guided-lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    args, overrides = parser.parse_known_args()
    prepare()
    print("| images a pass |", " | ".join(map(str, args.images)), "|")
    print("|---" * (1 + len(args.images)) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        teacher = Path(scratch) / "teacher"
        make_configurations(teacher)
        for name in RECIPES:
            recipe = load_recipe(f"sd15/{name}", [f"teacher.id={teacher}", "data.shards=simulated", *overrides])
            cells = [counted(recipe, teacher, images) for images in args.images]
            print(f"| `sd15/{name}` |", " | ".join(cells), "|", flush=True)


def counted(recipe: Recipe, teacher: Path, images: int) -> str:
    one = for_one_pass(replace(recipe, samples=replace(recipe.samples, prompts=())), recipe.stages[0], images)
    return gib(estimated(check_stages(one, teacher)[0]).total)


if __name__ == "__main__":
    main()
