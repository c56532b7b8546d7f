"""Measure what tools/results_steps_runs.py drew, and write it into docs/results.md, with its charts.

    python tools/results_steps_page.py RUNS -o docs [--seeds 3]

Replaces what stands between the lines `<!-- few steps -->` and `<!-- /few steps -->` of results.md, and nothing else of
that page. Charts go into images/ beside it, every figure of every seed into results-steps.csv.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import results_steps_runs as runs
import torch
from experiment import GUIDANCE_SCALE, NUM_PROMPTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measures import NUM_RESAMPLES, Interval, Section, mean, page_parser, shown, table
from numpy.typing import NDArray
from results_steps_measures import (
    NUM_REFERENCE,
    Edited,
    accuracy,
    correct,
    distance,
    diversity,
    edit_header,
    edit_row,
    edited,
    fid,
)
from results_steps_pictures import save_drawn, save_edited
from results_steps_runs import (
    COUNTS,
    EDIT_COUNTS,
    EDIT_SCALES,
    FEW,
    FIRST,
    FIXED,
    FULL_STEPS,
    HALVING_STEPS,
    JOINT,
    NUM_EDITS,
    NUM_NOISES,
    NUM_SCENES,
    PRUNED,
    SAMPLER_STEPS,
    SAMPLERS,
    SCALES,
    STOCHASTIC,
    TOLD,
    place,
)

from bkd.environment import installed_version
from bkd.eval.statistics import CONFIDENCE
from bkd.files import replace_file, write_atomically

STYLES = {
    "teacher, DDIM": ("#000000", "-"),
    "teacher, DDPM": ("#999999", "-"),
    "teacher, DPM-Solver++": ("#56B4E9", "-"),
    TOLD: ("#D55E00", "-"),
    f"{TOLD}, stochastic": ("#E69F00", "--"),
    FIXED: ("#009E73", "-"),
    PRUNED: ("#0072B2", "-"),
    JOINT: ("#CC79A7", ":"),
}
"""Okabe & Ito's colours, which the colour-blind tell apart."""
SAMPLER_NAMES = dict(zip(SAMPLERS, list(STYLES)[:3], strict=True))


FID_TICKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Line:
    """A way to draw, at several numbers of UNet calls: for each, the files of its seeds."""

    name: str
    files: dict[int, list[Path]] = field(default_factory=dict)


def lines(folder: Path, seeds: int) -> list[Line]:
    """What is compared by the number of UNet calls."""
    found = [
        Line(SAMPLER_NAMES[sampler], {2 * steps: [place(folder, None, sampler, steps)] for steps in SAMPLER_STEPS})
        for sampler in SAMPLERS
    ]
    for name in (TOLD, FIXED, PRUNED, JOINT):
        passes = 2 if name == JOINT else 1
        counts = COUNTS if name == JOINT else (FIRST, *COUNTS)
        found.append(Line(name, {passes * n: _seeds(folder, seeds, name, n) for n in counts}))
    stochastic = {n: _seeds(folder, seeds, "stochastic", n) for n in STOCHASTIC}
    return [*found, Line(f"{TOLD}, stochastic", stochastic)]


def _seeds(folder: Path, seeds: int, *parts: object) -> list[Path]:
    return [place(folder, seed, *parts) for seed in range(seeds)]


def shares(paths: Sequence[Path], of: Callable[[Edited], NDArray[np.int64]]) -> str:
    return shown(mean(np.stack([of(edited(path)) for path in paths])))


def in_steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"


def setup_text(seeds: int) -> list[str]:
    versions = ", ".join(f"{name} {str(installed_version(name)).partition('+')[0]}" for name in ("torch", "diffusers"))
    count = sum(NUM_PROMPTS.values())
    return [
        "    make results",
        f"Trained: `shapes/halving` (told a scale from 1 to 8; `{FIXED}`: one scale), `shapes/full-chain` ({PRUNED}) "
        f"and, as the negative control, halvings of the teacher without guidance distilled before ({JOINT}), all from "
        f"{FIRST} steps to 1 with {HALVING_STEPS} optimizer steps a halving; the stochastic sampler's from the student "
        f"of as many steps; {seeds} seeds. {versions}, CPU, one thread a run.",
        f"Drawn: {count} prompts that no training has, from the same noise for every network, guidance "
        f"{GUIDANCE_SCALE:g}. Accuracy: percent drawn right, in brackets {CONFIDENCE:.0%} bootstrap intervals (seeds "
        f"and prompts drawn anew, {NUM_RESAMPLES:,} times). Shapes-FID: from {NUM_REFERENCE:,} renders; mean of seeds, "
        "in brackets the least and the greatest; it falls as images are added, and compares within this table only. "
        f"The reference is the teacher with {FULL_STEPS} DDIM steps and guidance, {2 * FULL_STEPS} UNet calls. At "
        f"{FIRST} calls students are guided and not halved.",
        "Every file of images, figure by figure: [results-steps.csv](results-steps.csv).",
    ]


def calls_text(folder: Path, found: Sequence[Line]) -> list[str]:
    """Accuracy and FID against UNet calls."""
    calls = sorted({calls for line in found for calls in line.files})
    full = [place(folder, None, "ddim", FULL_STEPS)]

    def rows(measure: Callable[[Sequence[Path]], Interval], digits: int) -> list[list[str]]:
        return [
            [line.name, *(shown(measure(line.files[n]), digits) if n in line.files else "" for n in calls)]
            for line in found
        ]

    reached = f"accuracy {shown(accuracy(full))} %, shapes-FID {shown(fid(full), 2)}"
    return [
        f"The teacher with {2 * FULL_STEPS} calls: {reached}.",
        table(["accuracy (%) with UNet calls", *map(str, calls)], rows(accuracy, 1)),
        table(["shapes-FID with UNet calls", *map(str, calls)], rows(fid, 2)),
    ]


def scales_text(folder: Path, seeds: int) -> list[str]:
    """Accuracy and diversity against the guidance scale, at few steps."""
    teacher = {kind: {s: [place(folder, None, kind, f"{s:g}")] for s in SCALES} for kind in ("scale", "diverse")}
    ways: dict[str, dict[str, dict[float, list[Path]]]] = {f"teacher, {FULL_STEPS} steps": teacher}
    for name, title in {TOLD: f"{TOLD}, {FEW} steps", "stochastic": f"stochastic, {FEW} steps"}.items():
        ways[title] = {
            kind: {s: _seeds(folder, seeds, name, kind, f"{s:g}") for s in SCALES} for kind in ("scale", "diverse")
        }
    header = [f"guidance {scale:g}" for scale in SCALES]
    return [
        table(
            ["accuracy (%)", *header],
            [[title, *(shown(accuracy(way["scale"][s])) for s in SCALES)] for title, way in ways.items()],
        ),
        table(
            ["diversity (% of renders')", *header],
            [[title, *(shown(diversity(way["diverse"][s]), 0) for s in SCALES)] for title, way in ways.items()],
        ),
        f"Diversity: mean distance of two images of one caption, in the embedded features, for {NUM_SCENES} captions "
        f"with {NUM_NOISES} images each; 100 % is that of renders whose objects lie anywhere the caption allows.",
    ]


def edits_text(folder: Path, seeds: int) -> list[str]:
    """Edits by number of steps, and by the two scales; style transfer."""
    of_teacher = [(f"teacher, {in_steps(n)}", [place(folder, None, "edit", n)]) for n in (FULL_STEPS, *EDIT_COUNTS)]
    distilled = [(f"distilled, {in_steps(n)}", _seeds(folder, seeds, "edit", n)) for n in EDIT_COUNTS]
    theme = [
        (f"{encoder}, {in_steps(n)}", _seeds(folder, seeds, "theme", n))
        for encoder, n in (("teacher", FULL_STEPS), ("distilled", FEW))
    ]
    rows = [edit_row(title, map(edited, paths)) for title, paths in (*of_teacher, *distilled)]
    theme_rows = [edit_row(title, [edited(path, "theme") for path in paths]) for title, paths in theme]
    return [
        f"{NUM_EDITS} unseen scenes, whose first object is given another colour by the second caption. Where in its "
        "quarter an object lies, no caption says: `nothing moved` counts scenes whose objects all lie where they lay, "
        "to half a pixel. `Back again`: decoded with the first caption, the scene is what it was. Encoder without "
        f"guidance, decoder with {GUIDANCE_SCALE:g}; the teacher's decoder makes two passes a step.",
        table(edit_header("encoder and decoder", "colour"), rows),
        *_sweep(folder, seeds),
        "Style transfer: encoded with the teacher, or its distilled encoder, and decoded with an sd-tiny student that "
        f"was fine-tuned on diamonds ({FULL_STEPS} steps, guidance {GUIDANCE_SCALE:g}); the second caption turns the "
        "first object into one.",
        table(edit_header("encoder", "shape"), theme_rows),
    ]


def _sweep(folder: Path, seeds: int) -> list[str]:
    """All pairs of guidance scales: all right / nothing moved."""
    found = []
    for title, seed_list in ((f"teacher, {FULL_STEPS} steps", None), (f"distilled, {FEW} steps", seeds)):
        rows = []
        for first in EDIT_SCALES:
            row = [f"encoder {first:g}"]
            for second in EDIT_SCALES:
                parts = ("edit", f"{first:g}", f"{second:g}")
                paths = [place(folder, None, *parts)] if seed_list is None else _seeds(folder, seed_list, *parts)
                row.append(f"{shares(paths, lambda e: e.whole)} / {shares(paths, lambda e: e.still)}")
            rows.append(row)
        found.append(table([f"{title}: all right / nothing moved", *(f"decoder {s:g}" for s in EDIT_SCALES)], rows))
    return found


def chart(path: Path, folder: Path, found: Sequence[Line], seeds: int) -> str:
    """Accuracy and FID over UNet calls."""
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, found, accuracy)
    _curves(right, found, fid)
    left.set(title=f"caption accuracy, {CONFIDENCE:.0%} interval", ylim=(0, 102))
    left.yaxis.set_major_formatter("{x:.0f} %")
    right.set(title="shapes-FID, least to greatest of the seeds", yscale="log")
    right.set_yticks(FID_TICKS, map(str, FID_TICKS))
    right.minorticks_off()
    full = [place(folder, None, "ddim", FULL_STEPS)]
    for axes, value in ((left, accuracy(full).value), (right, fid(full).value)):
        axes.axhline(value, color="#000000", linewidth=0.8, linestyle=":", label=f"teacher, {2 * FULL_STEPS} calls")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    with replace_file(path) as stream:
        figure.savefig(stream, format="png")
    return (
        f"![caption accuracy and shapes-FID over UNet calls, a line for every sampler and student](images/{path.name})"
    )


def _curves(axes: Axes, found: Sequence[Line], measure: Callable[[Sequence[Path]], Interval]) -> None:
    ticks = sorted({calls for line in found for calls in line.files})
    for line in found:
        color, style = STYLES[line.name]
        calls = sorted(line.files)
        values = np.array([measure(line.files[n]) for n in calls]).T
        axes.plot(calls, values[0], style, color=color, marker="o", markersize=3.5, label=line.name)
        axes.fill_between(calls, values[1], values[2], color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="UNet calls per image", xscale="log")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def figures(found: Sequence[Line]) -> str:
    """A line for every file of images, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "UNet calls", "seed", "accuracy (%)", "shapes-FID"])
    for line in found:
        for calls, paths in sorted(line.files.items()):
            for seed, path in enumerate(paths):
                writer.writerow([line.name, calls, seed, f"{100 * correct(path).mean():.2f}", f"{distance(path):.4f}"])
    return text.getvalue()


def training_text(folder: Path, seeds: int) -> list[str]:
    """How long each took: by stage, of the fastest seed, which was disturbed the least."""
    made = [{**runs.trainings(folder, seed), **runs.later_trainings(folder, seed)} for seed in range(seeds)]
    rows = []
    for name in made[0]:
        taken = np.min([_stage_seconds(one[name].folder) for one in made], axis=0)
        rows.append([name, " + ".join(f"{seconds:.0f}" for seconds in taken), f"{sum(taken):.0f}"])
    return [
        "Training time in seconds of one thread, of each stage the least of the seeds:",
        table(["student", "stages", "together"], rows),
    ]


def _stage_seconds(run: Path) -> list[float]:
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    return [value for key, value in sorted(facts.items()) if key.endswith("_seconds")]


def require_done(paths: Iterable[Path]) -> None:
    if missing := [path for path in paths if not path.is_file()]:
        raise SystemExit(f"{len(missing)} files are missing, such as {missing[0]}; finish tools/results_steps_runs.py")


def main() -> None:
    args = page_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    section = Section(args.output / "results.md", "few steps")
    folder, seeds = args.runs, args.seeds
    drawn = [*runs.teacher_shots(folder), *runs.teacher_edits(folder)]
    for seed in range(seeds):
        drawn += [*runs.student_shots(folder, seed), *runs.student_edits(folder, seed)]
    require_done(one.path for one in drawn)
    found = lines(folder, seeds)
    write_atomically(args.output / "results-steps.csv", figures(found))
    print("measured by calls", file=sys.stderr)
    picture = chart(args.output / "images" / "results-steps.png", folder, found, seeds)
    drawn_picture = save_drawn(args.output / "images" / "results-steps-drawn.png", folder)
    parts = [*setup_text(seeds), "#### UNet calls", picture, *calls_text(folder, found), drawn_picture]
    parts += [f"#### Guidance at {FEW} steps", *scales_text(folder, seeds)]
    edited_picture = save_edited(args.output / "images" / "results-steps-edited.png", folder)
    parts += ["#### Edits", *edits_text(folder, seeds), edited_picture, "#### Time", *training_text(folder, seeds)]
    section.write(parts)


if __name__ == "__main__":
    main()
