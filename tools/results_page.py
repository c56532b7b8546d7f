"""Measure what tools/results_runs.py drew, and write it into docs/results.md, with its charts.

    python tools/results_page.py RUNS -o docs [--seeds 3] [--partial]

Replaces what stands between the lines `<!-- experiment -->` and `<!-- /experiment -->` of results.md, and nothing else
of that page. Charts go into images/ beside it, the figures of every seed into results.csv. With --partial it makes do
with the runs that are there.
"""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import experiment
import numpy as np
import results_runs as runs
import torch
from experiment import (
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    NUM_PROMPTS,
    POINTS,
    SETTINGS,
    TRIAL_PROMPTS,
    TRIAL_STEPS,
)
from matplotlib.figure import Figure
from measures import NUM_RESAMPLES, Interval, Section, difference, mean, page_parser, shown, spread, table
from numpy.typing import NDArray
from torch import Tensor

from bkd.data.shapes import scenes
from bkd.data.shapes_checker import check, rendered
from bkd.environment import installed_version
from bkd.eval.fidelity import FeatureStatistics, frechet_distance
from bkd.eval.shapes_features import ShapesFeatures, load_shapes_features, shapes_features
from bkd.eval.shapes_suite import NUM_REFERENCE, REFERENCE_SEED
from bkd.eval.statistics import CONFIDENCE
from bkd.files import replace_file, write_atomically

SHOWN = (25, max(POINTS))  # steps after which students are looked at more closely
FLOOR_SEEDS = (2, 3, 4)
UNTRAINED, BLOCK = "pruned only", "+ feature KD (block)"
PAIRS = {  # arms that differ in one thing: before and after
    "task loss → + output KD": ("task loss", "+ output KD"),
    "+ output KD → + feature KD (block)": ("+ output KD", BLOCK),
    "block → block, balanced": (BLOCK, "+ feature KD (block, balanced)"),
    "block → self-attn": (BLOCK, "+ feature KD (self-attn)"),
    "block → + random conditioning": (BLOCK, "+ random conditioning"),
    "block → random initialisation": (BLOCK, "random initialisation"),
}
STYLES = {  # colour (Okabe & Ito's, which the colour-blind tell apart), line and marker of every arm
    "task loss": ("#000000", "-", "o"),
    "+ output KD": ("#E69F00", "-", "s"),
    BLOCK: ("#0072B2", "-", "^"),
    "+ feature KD (block, balanced)": ("#0072B2", "--", "v"),
    "+ feature KD (self-attn)": ("#009E73", "-", "D"),
    "+ feature KD (self-attn, balanced)": ("#009E73", "--", "d"),
    "+ random conditioning": ("#CC79A7", "-", "P"),
    "random initialisation": ("#D55E00", "-", "X"),
}
prompts = cache(experiment.prompts)


class Drawn(NamedTuple):
    """What one network drew: whether each image shows what its caption says (prompts,), and shapes-FID of them all."""

    correct: NDArray[np.bool_]
    distance: float


Cell: TypeAlias = tuple[str, str, int]  # student, arm, step
Cells: TypeAlias = dict[Cell, dict[int, Drawn]]  # by seed


def renders(counts: Mapping[str, int], seed: int) -> Tensor:
    """Scenes of another world of the same kind, so many of each split: (N, 3, 32, 32), uint8."""
    return rendered(scene for split, count in counts.items() for scene in scenes(split, count, seed=seed))  # type: ignore[arg-type]


@cache
def kinds() -> dict[str, NDArray[np.bool_]]:
    """Which prompts an accuracy is of."""
    two = np.array([" and " in prompt for prompt in prompts()])
    held_out = np.repeat([split == "novel" for split in NUM_PROMPTS], list(NUM_PROMPTS.values()))
    return {"all prompts": np.ones_like(two), "two objects": two, "held out": held_out}


@cache
def reference() -> tuple[ShapesFeatures, FeatureStatistics]:
    network, share = load_shapes_features(), NUM_REFERENCE / len(prompts())
    pixels = renders({split: round(count * share) for split, count in NUM_PROMPTS.items()}, REFERENCE_SEED)
    return network, FeatureStatistics.of(shapes_features(network, pixels))


def shapes_fid(pixels: Tensor) -> float:
    network, statistics = reference()
    return frechet_distance(statistics, FeatureStatistics.of(shapes_features(network, pixels)))


def measure(path: Path, captions: Sequence[str]) -> Drawn:
    pixels = torch.from_numpy(np.load(path)["images"])
    return Drawn(np.array([verdict.correct for verdict in check(pixels, captions)]), shapes_fid(pixels))


def planned(folder: Path, seeds: int) -> dict[Path, tuple[Cell, int]]:
    """Every file of the comparison, its cell and seed. The weights of losses are left out: no file's name has them."""
    found: dict[Path, tuple[Cell, int]] = {}
    for run in runs.comparisons(folder, dict.fromkeys(runs.FEATURES, 0.0), seeds):
        arm = run.folder.relative_to(folder / run.student).parts[0]
        found |= {run.drawn(step): ((run.student, arm, step), run.seed) for step in run.points}
    return found


def accuracy(found: Mapping[int, Drawn], kind: str = "all prompts") -> Interval:
    return mean(np.stack([drawn.correct[kinds()[kind]] for drawn in found.values()]).astype(np.int64))


def correct(cells: Cells, cell: Cell) -> dict[int, NDArray[np.bool_]]:
    """What `difference` compares."""
    return {seed: drawn.correct for seed, drawn in cells.get(cell, {}).items()}


def distances(found: Mapping[int, Drawn]) -> Interval:
    return spread(drawn.distance for drawn in found.values())


def setup_text(seeds: int, teacher: Drawn | None, floor: Interval) -> list[str]:
    every, two, held_out = (int(kept.sum()) for kept in kinds().values())
    train = {key.removeprefix("train."): value for key, value in SETTINGS.items()}
    versions = ", ".join(f"{name} {str(installed_version(name)).partition('+')[0]}" for name in ("torch", "diffusers"))
    known = f" The teacher: {teacher.correct.mean():.1%} right, shapes-FID {teacher.distance:.2f}." if teacher else ""
    return [
        "### Set-up\n\n    make results",
        f"Trained: {max(POINTS)} steps of batch {train['batch']}, learning rate {train['lr']:g} "
        f"({train['lr_schedule']}), {train['warmup_steps']} warm-up steps, EMA {train['ema']}, {seeds} seeds; the rest "
        f"as in `recipes/shapes/sd-small.yaml`. {versions}, {'GPU' if torch.cuda.is_available() else 'CPU'}, one "
        "thread a run. `task loss` has that loss alone; the others add the output loss, `+ feature KD` a feature loss. "
        f"`+ random conditioning` is `{BLOCK}` with captions swapped, `random initialisation` from random weights.",
        f"Drawn: {every} prompts that no training has, with the same noise for every network; "
        f"{NUM_INFERENCE_STEPS} steps, guidance {GUIDANCE_SCALE:g}, averaged weights. "
        f"{two} name two objects. {held_out} are held out: combinations that never occur in training.",
        f"Accuracy: percent of prompts drawn right; mean of seeds. In brackets: {CONFIDENCE:.0%} bootstrap intervals "
        f"(seeds and prompts drawn anew, {NUM_RESAMPLES:,} times), of so few seeds rather too narrow than too wide.",
        f"Shapes-FID: of {every} images, from {NUM_REFERENCE:,} renders; less is better. Mean over seeds; in brackets "
        f"the least and the greatest. {every} fresh renders, {len(FLOOR_SEEDS)} times: {shown(floor, 2)}.{known}",
        "Every network that was drawn with, seed by seed: [results.csv](results.csv).",
    ]


def trials_text(folder: Path, drawn: Mapping[Path, Drawn]) -> list[str]:
    """The table of weights; those of unfinished trials stay empty."""
    trials = list(runs.trials(folder))
    chosen = runs.best_weights(folder) if all(run.done for run in trials) else {}
    rows = {name: [name] for name in runs.FEATURES}
    for (name, weight), run in zip(itertools.product(runs.FEATURES, runs.FEATURE_WEIGHTS), trials, strict=True):
        found, bold = drawn.get(run.drawn(TRIAL_STEPS)), "**" if chosen.get(name) == weight else ""
        rows[name].append(f"{bold}{100 * found.correct.mean():.1f}{bold}" if found else "")
    return [
        "### Weights of the feature losses",
        f"Accuracy (%) of sd-tiny after {TRIAL_STEPS} steps, with a seed and prompts (split val) that no other "
        "run has. The best weight is bold, the smallest of equals; every student is trained with it.",
        table(["feature KD", *(f"weight {weight:g}" for weight in runs.FEATURE_WEIGHTS)], rows.values()),
    ]


def tables(cells: Cells, student: str) -> list[str]:
    """Accuracy along the training; at the steps to be shown also each seed, harder prompts and shapes-FID."""
    along: list[list[str]] = []
    closer: dict[int, list[list[str]]] = {step: [] for step in SHOWN}
    for name in (UNTRAINED, *STYLES):
        found = {step: cells.get((student, name, step)) for step in (0, *POINTS)}
        along.append([name, *(f"{accuracy(drawn).value:.1f}" if drawn else "" for drawn in found.values())])
        for step, rows in closer.items():
            if drawn := found[0] or found[step]:
                seeds = " / ".join(f"{100 * drawn[seed].correct.mean():.1f}" for seed in sorted(drawn))
                every, two, held_out = (shown(accuracy(drawn, kind)) for kind in kinds())
                rows.append([name, every, seeds, two, held_out, shown(distances(drawn), 2)])
    header = ["all prompts", "seed by seed", "two objects", "held out", "shapes-FID"]
    details = [table([f"after {step} steps", *header], rows) for step, rows in closer.items()]
    return [table(["accuracy (%) after steps", "0", *map(str, POINTS)], along), *details]


def differences_text(cells: Cells) -> list[str]:
    """Between arms that differ in one thing."""
    text = [
        "### Differences",
        "In accuracy, percentage points: the second way less the first, with the same seeds and prompts; intervals as "
        f"above. Bold: the interval excludes zero. If nothing differed, {1 - CONFIDENCE:.0%} or more would be bold.",
    ]
    for student in runs.STUDENTS:
        rows = [
            [label, *(difference(*(correct(cells, (student, name, step)) for name in names)) for step in POINTS)]
            for label, names in PAIRS.items()
        ]
        text.append(table([f"{student}, after steps", *map(str, POINTS)], rows))
    return text


def chart(path: Path, cells: Cells, student: str, floor: Interval) -> str:
    """Accuracy and shapes-FID over steps, side by side; returns what embeds it."""
    figure = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    right.set_yscale("log")
    for axes, measured, title in (
        (left, accuracy, f"caption accuracy, {CONFIDENCE:.0%} interval"),
        (right, distances, "shapes-FID, range of seeds"),
    ):
        for name, (color, style, marker) in STYLES.items():
            if steps := [step for step in POINTS if (student, name, step) in cells]:
                value, low, high = np.array([measured(cells[student, name, step]) for step in steps]).T
                axes.plot(steps, value, style, color=color, marker=marker, markersize=4, linewidth=1.4, label=name)
                axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set(title=f"{student}: {title}", xlabel="optimizer steps", xscale="log")
        axes.set_xticks(POINTS, map(str, POINTS))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    left.yaxis.set_major_formatter("{x:.0f} %")
    right.set_yticks((1, 2, 5, 10), ("1", "2", "5", "10"))
    right.axhline(floor.value, color="gray", linestyle=":", label="fresh renders")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    with replace_file(path) as stream:
        figure.savefig(stream, format="png")
    return f"![{student}: caption accuracy and shapes-FID over steps, a line for each way to train](images/{path.name})"


def figures(cells: Cells) -> str:
    """A line for every network that was drawn with, as CSV: percent of prompts drawn right, and shapes-FID."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["student", "method", "steps", "seed", *(f"{kind} (%)" for kind in kinds()), "shapes-FID"])
    for (student, name, step), found in cells.items():
        for seed, drawn in found.items():
            right = [f"{100 * drawn.correct[kept].mean():.2f}" for kept in kinds().values()]
            writer.writerow([student, name, step, seed, *right, f"{drawn.distance:.4f}"])
    return text.getvalue()


def main() -> None:
    parser = page_parser(__doc__)
    parser.add_argument("--partial", action="store_true", help="make do with the runs that are there")
    args = parser.parse_args()
    section, teacher, plan = (
        Section(args.output / "results.md", "experiment"),
        args.runs / "teacher.npz",
        planned(args.runs, args.seeds),
    )
    trials = [run.drawn(TRIAL_STEPS) for run in runs.trials(args.runs)]
    wanted = [teacher, *trials, *plan]
    there, drawn = [path for path in wanted if path.is_file()], {}
    of_trials = experiment.prompts(TRIAL_PROMPTS)
    state = f"{len(wanted) - len(there)} of {len(wanted)} files of images are missing"
    if len(there) < len(wanted) and not args.partial:
        raise SystemExit(f"{args.runs}: {state}; finish tools/results_runs.py, or add --partial")
    for number, path in enumerate(there, 1):
        drawn[path] = measure(path, of_trials if path in trials else prompts())
        print(f"\r{number}/{len(there)} files", end="" if number < len(there) else "\n", file=sys.stderr, flush=True)
    cells: Cells = {}
    for path, (cell, seed) in plan.items():
        if path in drawn:
            cells.setdefault(cell, {})[seed] = drawn[path]
    floor = spread(shapes_fid(renders(NUM_PROMPTS, seed)) for seed in FLOOR_SEEDS)
    parts = [] if len(there) == len(wanted) else [f"**Partial: {state}. Some figures are of fewer seeds, or absent.**"]
    parts += setup_text(args.seeds, drawn.get(teacher), floor) + trials_text(args.runs, drawn)
    for student in runs.STUDENTS:
        picture = chart(args.output / "images" / f"results-{student}.png", cells, student, floor)
        parts += [f"### {student}", picture, *tables(cells, student)]
    parts += differences_text(cells)
    write_atomically(args.output / "results.csv", figures(cells))
    section.write(parts)


if __name__ == "__main__":
    main()
