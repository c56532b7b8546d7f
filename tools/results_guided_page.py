"""Measure what tools/results_guided_runs.py drew, and write it into docs/results.md, with its charts.

    python tools/results_guided_page.py RUNS -o docs [--seeds 3]

Replaces what stands between the lines `<!-- one pass and adapters -->` and `<!-- /one pass and adapters -->` of
results.md, and nothing else of that page. Charts go into images/ beside it, every seed into results-guided.csv.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import results_guided_runs as runs
import torch
from experiment import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, NUM_PROMPTS, SETTINGS, Training, prompts
from matplotlib.figure import Figure
from measures import NUM_RESAMPLES, Interval, Section, difference, mean, page_parser, shown, spread, table
from numpy.typing import NDArray
from results_guided_runs import LAST, POINTS, RATES, SCALE, SCALES, SMALL, TINY, TRIAL_STEPS, WAYS, WHOLE, WINDOW, Way

from bkd.data.shapes_checker import check
from bkd.environment import installed_version
from bkd.eval.statistics import CONFIDENCE
from bkd.files import replace_file, write_atomically
from bkd.models.load import load_pipeline
from bkd.models.locate import locate
from bkd.recipe.load import load_recipe
from bkd.runs.run import check_stages
from bkd.runs.stage_setup import start_student

STYLES = ("#000000", "#D55E00", "#E69F00", "#0072B2")  # of CAPACITIES; Okabe & Ito's, which the colour-blind tell apart


@dataclass(frozen=True)
class Drawn:
    """What one network drew.

    Attributes:
        correct: Whether each image shows what its caption says: (prompts,).
        errors: Mean squared difference of each image from the guided teacher's, of values from 0 to 1: (prompts,).
    """

    correct: NDArray[np.bool_]
    errors: NDArray[np.float64]

    @property
    def closeness(self) -> float:
        """PSNR to the guided teacher, in dB."""
        return runs.decibels(self.errors)


Drawings = dict[tuple[Way, int, float], dict[int, Drawn]]
"""By way, step and guidance scale; then by seed."""


def measure(folder: Path, path: Path, scale: float) -> Drawn:
    images = runs.images_in(path)
    correct = np.array([verdict.correct for verdict in check(images, prompts())])
    return Drawn(correct, runs.squared_errors(images, runs.images_in(runs.teacher_file(folder, scale))))


def measure_all(folder: Path, trainings: Mapping[tuple[Way, int], Training]) -> Drawings:
    """Everything that the comparison drew."""
    found: Drawings = {}
    for number, ((way, seed), training) in enumerate(trainings.items(), 1):
        for step in training.points:
            for scale in training.scales(step):
                drawn = measure(folder, training.drawn(step, scale), scale)
                found.setdefault((way, step, scale), {})[seed] = drawn
        print(f"\r{number}/{len(trainings)} trainings", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def missing(trainings: Mapping[tuple[Way, int], Training]) -> dict[Way, Interval]:
    """Of guidance, in one-pass students."""
    shares: dict[Way, list[float]] = {}
    for (way, _), training in trainings.items():
        if way.student == WHOLE:
            shares.setdefault(way, []).append(runs.guidance_missing(training))
    return {way: spread(values) for way, values in shares.items()}


def accuracy(found: Mapping[int, Drawn]) -> Interval:
    return mean(np.stack([drawn.correct for drawn in found.values()]).astype(np.int64))


def closeness(found: Mapping[int, Drawn]) -> Interval:
    return spread(drawn.closeness for drawn in found.values())


def gap(full: Mapping[int, Drawn], other: Mapping[int, Drawn]) -> str:
    """In accuracy, of adapters to all weights."""
    before, after = ({seed: drawn.correct for seed, drawn in found.items()} for found in (full, other))
    return difference(before, after)


@cache
def trained(way: Way) -> str:
    """How many parameters train, and their share of the student's."""
    recipe, teacher = load_recipe(way.recipe, list(way.overrides(rate=1.0))), locate("shapes")
    planned = check_stages(recipe, teacher)[0]
    student = start_student(load_pipeline(teacher).unet, planned.plan, planned.stage, seed=0)
    counts = {kept: sum(p.numel() for p in student.parameters() if p.requires_grad is kept) for kept in (True, False)}
    base = counts[False] or counts[True]  # adapters are no part of the student that they end up in
    return f"{counts[True]:,} ({counts[True] / base:.0%})"


def setup_text(seeds: int) -> list[str]:
    train = {key.removeprefix("train."): value for key, value in SETTINGS.items()}
    versions = ", ".join(
        f"{name} {str(installed_version(name)).partition('+')[0]}" for name in ("torch", "diffusers", "peft")
    )
    count = sum(NUM_PROMPTS.values())
    return [
        "    make results",
        f"Trained: {LAST} steps of batch {train['batch']}, {train['warmup_steps']} warm-up steps, EMA {train['ema']}, "
        f"{seeds} seeds; one-pass students at a rate that falls as a cosine, pruned ones at a constant one; the rest "
        "as in `recipes/shapes/guided.yaml` and `sd-small.yaml` (feature KD after every block, weight 1). Adapters are "
        f"over the teacher's own weights, of `{', '.join(runs.BLOCK_TARGETS)}`, and in one-pass students of "
        f"`{', '.join(runs.END_TARGETS)}`, too (not so for `blocks alone`); a module that has "
        f"room for less than the rank gets the largest that it has room for. {versions}, CPU, one thread a run.",
        f"Drawn: {count} prompts that no training has, with the same noise for every network; {NUM_INFERENCE_STEPS} "
        f"steps, averaged weights; guidance {SCALE:g} for one-pass students, {GUIDANCE_SCALE:g} for pruned ones. "
        f"Accuracy: percent drawn right, mean of seeds; in brackets {CONFIDENCE:.0%} bootstrap intervals (seeds and "
        f"prompts drawn anew, {NUM_RESAMPLES:,} times). Closeness: PSNR in dB to what the teacher draws with two "
        f"passes from the same noise. Guidance missing: error of the student's output against the guided teacher's, "
        f"over the last {WINDOW} steps, in percent of the error that the teacher's own one pass has on the same "
        "samples. Of both the mean of seeds; in brackets the least and the greatest.",
        "Every network that was drawn with, seed by seed: [results-guided.csv](results-guided.csv).",
    ]


def trials_text(folder: Path, rates: Mapping[Way, float]) -> list[str]:
    """What every learning rate came to."""
    rows: dict[str, dict[Way, list[str]]] = {student: {} for student in RATES}
    for (way, rate), training in runs.trials(folder).items():
        bold = "**" if rates[way] == rate else ""
        row = rows[way.student].setdefault(way, [str(way)])
        row.append(f"{bold}{abs(runs.trial_score(training, way)):.1f}{bold}")
    titles = {WHOLE: "one pass, guidance missing (%)", TINY: f"{TINY}, accuracy (%)"}
    return [
        "#### Learning rates",
        f"After {TRIAL_STEPS} steps, with a seed and prompts (split val) that nothing else has. The best is bold, the "
        f"smallest of equals, and used for all students of that kind ({TINY}'s for {SMALL}, too).",
        *(
            table([titles[student], *(f"rate {rate:g}" for rate in RATES[student])], found.values())
            for student, found in rows.items()
        ),
    ]


def one_pass_text(folder: Path, found: Drawings, shares: Mapping[Way, Interval]) -> list[str]:
    """How near students come to the guided teacher, and what they make of the scales that they are told."""
    guided = measure(folder, runs.teacher_file(folder), SCALE)
    unguided = measure(folder, runs.teacher_file(folder, 1.0), SCALE)
    rows = [
        ["teacher, two passes", "", f"{100 * guided.correct.mean():.1f}", "0", ""],
        ["teacher, one pass", "", f"{100 * unguided.correct.mean():.1f}", "100", f"{unguided.closeness:.1f}"],
    ]
    for way in (way for way in WAYS if way.student == WHOLE):
        drawn, name = found[way, LAST, SCALE], f"{'told a scale' if way.told else f'always {SCALE:g}'}, {way}"
        figures = (shown(accuracy(drawn)), shown(shares[way], 0), shown(closeness(drawn)))
        rows.append([name, trained(way), *figures])
    header = ["parameters trained", "accuracy (%)", "guidance missing (%)", "closeness (dB)"]
    return [
        table([f"one pass, guidance {SCALE:g}", *header], rows),
        "Students that are told a scale; closeness to the teacher at the same scale:",
        scales_table(folder, found),
    ]


def scales_table(folder: Path, found: Drawings) -> str:
    told = [way for way in WAYS if way.told]
    unguided, rows = runs.images_in(runs.teacher_file(folder, 1.0)), []
    for scale in sorted((*SCALES, SCALE)):
        teacher = measure(folder, runs.teacher_file(folder, scale), scale)
        errors = runs.squared_errors(unguided, runs.images_in(runs.teacher_file(folder, scale)))
        row = [
            f"{scale:g}",
            f"{100 * teacher.correct.mean():.1f}",
            f"{runs.decibels(errors):.1f}" if errors.any() else "",
        ]
        for drawn in (found[way, LAST, scale] for way in told):
            row += [shown(accuracy(drawn)), shown(closeness(drawn))]
        rows.append(row)
    students = [f"{way}: {figure}" for way in told for figure in ("accuracy", "dB")]
    return table(["guidance scale", "teacher, two passes: accuracy", "one pass without guidance: dB", *students], rows)


def ranks_text(found: Drawings, student: str) -> list[str]:
    """Accuracy along the training, and the gap to all weights."""
    ways = [way for way in WAYS if way.student == student]
    full, along, gaps = ways[0], [], []
    for way in ways:
        drawn = {step: found[way, step, way.scale] for step in POINTS}
        along.append([str(way), trained(way), *(shown(accuracy(here)) for here in drawn.values())])
        if way is not full:
            compared = (gap(found[full, step, full.scale], here) for step, here in drawn.items())
            gaps.append([f"{way} less {full}", *compared])
    return [
        table([f"{student}, accuracy (%) after steps", "parameters trained", *map(str, POINTS)], along),
        table([f"{student}, difference after steps", *map(str, POINTS)], gaps),
    ]


def chart(path: Path, found: Drawings) -> str:
    """Accuracy of pruned students over steps, a line for all weights and for each rank."""
    figure = Figure(figsize=(9, 4.4), dpi=150, layout="constrained")
    for axes, student in zip(figure.subplots(1, 2, sharey=True), (SMALL, TINY), strict=True):
        ways = [way for way in WAYS if way.student == student]
        for way, color in zip(ways, STYLES, strict=True):
            lines = np.array([accuracy(found[way, step, way.scale]) for step in POINTS]).T
            axes.plot(POINTS, lines[0], color=color, marker="o", markersize=4, label=str(way))
            axes.fill_between(POINTS, lines[1], lines[2], color=color, alpha=0.12, linewidth=0)
        axes.set(
            title=f"{student}: caption accuracy, {CONFIDENCE:.0%} interval", xlabel="optimizer steps", xscale="log"
        )
        axes.set_xticks(POINTS, map(str, POINTS))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:.0f} %")
        axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with replace_file(path) as stream:
        figure.savefig(stream, format="png")
    return f"![accuracy of pruned students over steps, a line for all weights and for each rank](images/{path.name})"


def figures(found: Drawings) -> str:
    """A line for every network that was drawn with, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["student", "told a scale", "trained", "steps", "guidance", "seed", "accuracy (%)", "PSNR (dB)"])
    for (way, step, scale), seeds in found.items():
        for seed, drawn in seeds.items():
            right = f"{100 * drawn.correct.mean():.2f}"
            writer.writerow([way.student, way.told, way, step, scale, seed, right, f"{drawn.closeness:.3f}"])
    return text.getvalue()


def require_done(folder: Path, trainings: Iterable[Training]) -> None:
    if missing := sum(not training.done for training in trainings):
        raise SystemExit(f"{folder}: {missing} trainings are missing; finish tools/results_guided_runs.py")


def main() -> None:
    args = page_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    section = Section(args.output / "results.md", "one pass and adapters")
    require_done(args.runs, runs.trials(args.runs).values())
    rates = runs.best_rates(args.runs)
    trainings = runs.comparisons(args.runs, rates, args.seeds)
    require_done(args.runs, trainings.values())
    found = measure_all(args.runs, trainings)
    write_atomically(args.output / "results-guided.csv", figures(found))
    picture = chart(args.output / "images" / "results-guided.png", found)
    parts = [*setup_text(args.seeds), "#### One pass for guidance's two"]
    parts += [*one_pass_text(args.runs, found, missing(trainings)), "#### Pruned students by rank", picture]
    parts += [*ranks_text(found, SMALL), *ranks_text(found, TINY)]
    section.write([*parts, *trials_text(args.runs, rates)])


if __name__ == "__main__":
    main()
