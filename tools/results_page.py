"""Measure what tools/results_runs.py drew, and write it into docs/results.md, with its charts.

    python tools/results_page.py RUNS -o docs [--seeds 3] [--partial]

Replaces what stands between the lines `<!-- experiment -->` and `<!-- /experiment -->` of results.md, and nothing else
of that page. Charts go into images/ beside it. With --partial it makes do with the runs that are there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import results_runs as runs
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from bkd.data.shapes import render, scenes
from bkd.data.shapes_checker import check
from bkd.environment import installed_version
from bkd.eval.fidelity import FeatureStatistics, frechet_distance
from bkd.eval.shapes_features import load_shapes_features, shapes_features
from bkd.eval.shapes_suite import NUM_REFERENCE, REFERENCE_SEED
from bkd.eval.statistics import CONFIDENCE
from bkd.files import replace_file, write_atomically

BEGIN, END = "<!-- experiment -->\n", "<!-- /experiment -->\n"
SHOWN = (25, max(runs.POINTS))
"""Steps after which students are looked at more closely."""
NUM_RESAMPLES = 1000
FLOOR_SEEDS = (2, 3, 4)
"""Of fresh renders; the reference has another."""
UNTRAINED = "pruned only"
BLOCK = "+ feature KD (block)"
PAIRS = {
    "task loss → + output KD": ("task loss", "+ output KD"),
    "+ output KD → + feature KD (block)": ("+ output KD", BLOCK),
    "block → block, balanced": (BLOCK, "+ feature KD (block, balanced)"),
    "block → self-attn": (BLOCK, "+ feature KD (self-attn)"),
    "block → + random conditioning": (BLOCK, "+ random conditioning"),
    "block → random initialisation": (BLOCK, "random initialisation"),
}
"""Arms that differ in one thing: before and after."""
STYLES = {
    "task loss": ("#000000", "-", "o"),
    "+ output KD": ("#E69F00", "-", "s"),
    BLOCK: ("#0072B2", "-", "^"),
    "+ feature KD (block, balanced)": ("#0072B2", "--", "v"),
    "+ feature KD (self-attn)": ("#009E73", "-", "D"),
    "+ feature KD (self-attn, balanced)": ("#009E73", "--", "d"),
    "+ random conditioning": ("#CC79A7", "-", "P"),
    "random initialisation": ("#D55E00", "-", "X"),
}
"""Every arm's colour (Okabe & Ito's, which the colour-blind tell apart), line and marker."""


class Drawn(NamedTuple):
    """What one network drew: whether each image shows what its caption says (prompts,), and shapes-FID of them all."""

    correct: NDArray[np.bool_]
    distance: float


class Interval(NamedTuple):
    value: float
    low: float
    high: float


Cell: TypeAlias = tuple[str, str, int]
"""Student, arm and step."""
Cells: TypeAlias = Mapping[Cell, Mapping[int, Drawn]]
"""What was drawn, by seed."""


class Meter:
    """Measures images of the prompts, and says on stderr how many files it has measured."""

    def __init__(self, num_files: int) -> None:
        self._network, self._prompts, self._num_files, self._measured = (
            load_shapes_features(),
            runs.prompts(),
            num_files,
            0,
        )
        share = NUM_REFERENCE / len(self._prompts)
        reference = renders({split: round(count * share) for split, count in runs.NUM_PROMPTS.items()}, REFERENCE_SEED)
        self._reference = FeatureStatistics.of(shapes_features(self._network, reference))
        self.floor = spread(self.distance(renders(runs.NUM_PROMPTS, seed)) for seed in FLOOR_SEEDS)

    def distance(self, pixels: Tensor) -> float:
        return frechet_distance(self._reference, FeatureStatistics.of(shapes_features(self._network, pixels)))

    def measure(self, path: Path) -> Drawn:
        self._measured += 1
        print(f"\r{self._measured}/{self._num_files} files", end="", file=sys.stderr, flush=True)
        with np.load(path) as arrays:
            pixels = torch.from_numpy(arrays["images"])
        correct = [verdict.correct for verdict in check(pixels, self._prompts)]
        return Drawn(np.array(correct), self.distance(pixels))


def renders(counts: Mapping[str, int], seed: int) -> Tensor:
    """Scenes of another world of the same kind, so many of each split: (N, 3, 32, 32), uint8."""
    drawn = [render(scene) for split, count in counts.items() for scene in scenes(split, count, seed=seed)]  # type: ignore[arg-type]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


@cache
def kinds() -> dict[str, NDArray[np.bool_]]:
    """Which prompts an accuracy is of."""
    two = np.array([" and " in prompt for prompt in runs.prompts()])
    held_out = np.repeat([split == "novel" for split in runs.NUM_PROMPTS], list(runs.NUM_PROMPTS.values()))
    return {"all prompts": np.ones_like(two), "two objects": two, "held out": held_out}


def planned(folder: Path, seeds: int) -> dict[Path, tuple[Cell, int]]:
    """Every file of the comparison, with its cell and seed. The weights are left out: no file's name has them."""
    found = {}
    for run in runs.comparisons(folder, dict.fromkeys(runs.FEATURES, 0.0), seeds):
        arm = run.folder.relative_to(folder / run.student).parts[0]
        found |= {run.drawn(step): ((run.student, arm, step), run.seed) for step in run.points}
    return found


def spread(values: Iterable[float]) -> Interval:
    """Mean, least and greatest."""
    found = list(values)
    return Interval(sum(found) / len(found), min(found), max(found))


def mean(outcomes: NDArray[np.int64]) -> Interval:
    """Mean of (seeds, prompts), each -1, 0 or 1, with its bootstrap interval: seeds and prompts are drawn anew.

    All seeds have the same prompts, so they share a resample of them. Sums are of integers, hence exact.
    """
    rng = np.random.default_rng(0)
    seeds, chosen = (rng.multinomial(count, np.full(count, 1 / count), NUM_RESAMPLES) for count in outcomes.shape)
    means = (seeds @ outcomes * chosen).sum(axis=1) / outcomes.size
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(float(outcomes.mean()), float(low), float(high))


def accuracy(found: Mapping[int, Drawn], kind: str = "all prompts") -> Interval:
    return mean(np.stack([drawn.correct[kinds()[kind]] for drawn in found.values()]).astype(np.int64))


def difference(before: Mapping[int, Drawn], after: Mapping[int, Drawn]) -> Interval | None:
    """In accuracy, over the seeds that both have."""
    pairs = [(before[seed].correct, after[seed].correct) for seed in before if seed in after]
    return mean(np.stack([b.astype(np.int64) - a.astype(np.int64) for a, b in pairs])) if pairs else None


def percent(found: Interval) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def distance(found: Interval) -> str:
    return f"{found.value:.2f}" + (f" [{found.low:.2f}, {found.high:.2f}]" if found.low < found.high else "")


def points(found: Interval | None) -> str:
    """Percentage points, bold where the interval excludes zero."""
    if found is None:
        return ""
    value, low, high = (f"{round(100 * part, 1) + 0.0:+.1f}" for part in found)  # + 0.0: no -0.0
    bold = "**" if found.low > 0 or found.high < 0 else ""
    return f"{bold}{value} [{low}, {high}]{bold}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def setup_text(seeds: int, teacher: Drawn | None, floor: Interval) -> list[str]:
    every, two, held_out = (int(kept.sum()) for kept in kinds().values())
    train = {key.removeprefix("train."): value for key, value in runs.SETTINGS.items()}
    versions = ", ".join(f"{name} {str(installed_version(name)).partition('+')[0]}" for name in ("torch", "diffusers"))
    known = f" The teacher: {teacher.correct.mean():.1%} right, shapes-FID {teacher.distance:.2f}." if teacher else ""
    return [
        "### Set-up",
        "    make results",
        f"Trained: {max(runs.POINTS)} steps of batch {train['batch']}, learning rate {train['lr']:g} "
        f"({train['lr_schedule']}), {train['warmup_steps']} warm-up steps, EMA {train['ema']}, {seeds} seeds; the rest as in "
        f"`recipes/shapes/sd-small.yaml`. {versions}, {'GPU' if torch.cuda.is_available() else 'CPU'}, 1 thread a run.",
        f"`task loss` has that loss alone; the others add the output loss, `+ feature KD` a feature loss too. `+ random "
        f"conditioning` is `{BLOCK}` with captions swapped at random, `random initialisation` is it from random weights.",
        f"Drawn: {every} prompts that no training has, with the same noise for every network; "
        f"{runs.DRAWING.num_inference_steps} steps, guidance {runs.DRAWING.guidance_scale:g}, averaged weights. "
        f"{two} name two objects. {held_out} are held out: combinations that never occur in training.",
        f"Accuracy: percent of prompts drawn right, the mean over seeds. In brackets: {CONFIDENCE:.0%} bootstrap "
        f"intervals; seeds and prompts are drawn anew, {NUM_RESAMPLES:,} times. With so few seeds they are rather too "
        "narrow than too wide; where all outcomes are equal they have no width.",
        f"Shapes-FID: of {every} images, from {NUM_REFERENCE:,} renders; less is better. Mean over seeds; in brackets the "
        f"least and the greatest. {every} fresh renders, {len(FLOOR_SEEDS)} times: {distance(floor)}.{known}",
    ]


def trials_text(folder: Path, meter: Meter) -> list[str]:
    """The table of weights; those of unfinished trials stay empty."""
    chosen = runs.best_weights(folder) if all(run.done for run in runs.trials(folder)) else {}
    cells = dict.fromkeys(itertools.product(runs.FEATURES, runs.FEATURE_WEIGHTS), "")
    for (name, weight), run in zip(cells, runs.trials(folder), strict=True):
        if run.done:
            bold = "**" if chosen.get(name) == weight else ""
            cells[name, weight] = f"{bold}{100 * meter.measure(run.drawn(runs.TRIAL_STEPS)).correct.mean():.1f}{bold}"
    rows = [[name, *(cells[name, weight] for weight in runs.FEATURE_WEIGHTS)] for name in runs.FEATURES]
    return [
        "### Weights of the feature losses",
        f"Accuracy (%) of sd-tiny after {runs.TRIAL_STEPS} steps with a seed that no other run has. The best weight is "
        "bold, the smallest of equals; every student is trained with it.",
        table(["feature KD", *(f"weight {weight:g}" for weight in runs.FEATURE_WEIGHTS)], rows),
    ]


def steps_table(cells: Cells, student: str) -> str:
    """Accuracy along the training."""
    steps, rows = (0, *runs.POINTS), []
    for name in (UNTRAINED, *STYLES):
        found = [cells.get((student, name, step)) for step in steps]
        rows.append([name, *(f"{100 * accuracy(drawn).value:.1f}" if drawn else "" for drawn in found)])
    return table(["accuracy (%) after steps", *map(str, steps)], rows)


def closer_table(cells: Cells, student: str, step: int) -> str:
    """One point of the training: each seed, harder prompts, shapes-FID."""
    rows = []
    for name in (UNTRAINED, *STYLES):
        if found := cells.get((student, name, 0 if name == UNTRAINED else step)):
            seeds = " / ".join(f"{100 * found[seed].correct.mean():.1f}" for seed in sorted(found))
            every, two, held_out = (percent(accuracy(found, kind)) for kind in kinds())
            rows.append(
                [name, every, seeds, two, held_out, distance(spread(drawn.distance for drawn in found.values()))]
            )
    return table([f"after {step} steps", "all prompts", "seed by seed", "two objects", "held out", "shapes-FID"], rows)


def pairs_text(cells: Cells) -> list[str]:
    """Differences between arms that differ in one thing."""
    text = [
        "### Differences",
        f"In accuracy, percentage points, the second way less the first, with the same seeds and prompts; {CONFIDENCE:.0%} "
        "bootstrap intervals as above. Bold: the interval excludes zero. Of so many intervals "
        f"{1 - CONFIDENCE:.0%} or more would do so by chance alone.",
    ]
    for student in runs.STUDENTS:
        rows = []
        for label, names in PAIRS.items():
            both = [[cells.get((student, name, step), {}) for name in names] for step in runs.POINTS]
            rows.append([label, *(points(difference(before, after)) for before, after in both)])
        text.append(table([f"{student}, after steps", *map(str, runs.POINTS)], rows))
    return text


def draw_lines(axes: Axes, lines: Mapping[str, Mapping[int, Interval]]) -> None:
    """Arm -> step -> interval; the band is the interval."""
    for name, found in lines.items():
        color, style, marker = STYLES[name]
        value, low, high = np.array(list(found.values())).T
        axes.plot(list(found), value, style, color=color, marker=marker, markersize=4, linewidth=1.4, label=name)
        axes.fill_between(list(found), low, high, color=color, alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.set_xticks(runs.POINTS, map(str, runs.POINTS))
    axes.minorticks_off()
    axes.set_xlabel("optimizer steps")
    axes.grid(alpha=0.25)


def chart(path: Path, cells: Cells, student: str, floor: Interval) -> str:
    """Accuracy and shapes-FID over steps, side by side; returns what embeds it."""
    figure = Figure(figsize=(9, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    found = {name: {s: cells[student, name, s] for s in runs.POINTS if (student, name, s) in cells} for name in STYLES}
    found = {name: drawn for name, drawn in found.items() if drawn}
    draw_lines(
        left, {n: {s: Interval(*(100 * v for v in accuracy(d))) for s, d in of.items()} for n, of in found.items()}
    )
    draw_lines(right, {n: {s: spread(d.distance for d in of[s].values()) for s in of} for n, of in found.items()})
    left.set_title(f"{student}: caption accuracy (%), 95 % interval", fontsize=10)
    right.set_title(f"{student}: shapes-FID, least to greatest seed", fontsize=10)
    right.set_yscale("log")
    right.axhline(floor.value, color="gray", linestyle=":", label="fresh renders")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    with replace_file(path) as stream:
        figure.savefig(stream, format="png")
    return f"![{student}: caption accuracy and shapes-FID over steps, a line for each way to train](images/{path.name})"


def write_page(page: Path, parts: Sequence[str]) -> None:
    """Replace the section; every part is a paragraph, a table or a heading."""
    wrapped = [part if part[0] in "|!# " else textwrap.fill(part, 120, break_on_hyphens=False) for part in parts]
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    write_atomically(page, f"{before}{BEGIN}\n" + "\n\n".join(wrapped) + f"\n\n{END}" + rest.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of results.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--partial", action="store_true", help="make do with the runs that are there")
    args = parser.parse_args()
    page, teacher, plan = args.output / "results.md", args.runs / "teacher.npz", planned(args.runs, args.seeds)
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{page} needs the lines {BEGIN.strip()} and {END.strip()}, once each and in this order")
    wanted = [teacher, *(run.drawn(runs.TRIAL_STEPS) for run in runs.trials(args.runs)), *plan]
    there = {path for path in wanted if path.is_file()}
    state = f"{len(wanted) - len(there)} of {len(wanted)} files of images are missing"
    if len(there) < len(wanted) and not args.partial:
        raise SystemExit(f"{args.runs}: {state}; finish tools/results_runs.py, or add --partial")
    meter, cells = Meter(len(there)), {}
    for path, (cell, seed) in plan.items():
        if path in there:
            cells.setdefault(cell, {})[seed] = meter.measure(path)
    parts = [f"**Partial: {state}. Figures are of those that are there.**"] * (len(there) < len(wanted))
    parts += setup_text(args.seeds, meter.measure(teacher) if teacher in there else None, meter.floor)
    parts += trials_text(args.runs, meter)
    for student in runs.STUDENTS:
        picture = chart(args.output / "images" / f"results-{student}.png", cells, student, meter.floor)
        parts += [f"### {student}", picture, steps_table(cells, student)]
        parts += [closer_table(cells, student, step) for step in SHOWN]
    write_page(page, [*parts, *pairs_text(cells)])
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
