"""What metrics.jsonl says of a run's training: a chart of each term, and of each feature site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bkd.errors import OutputError
from bkd.report.curves import Chart, Series, chart
from bkd.runs.folder import RunFolder
from bkd.training.tracking import read_metrics

LINEAR = ("lr",)
FIRST = ("total", "task_loss", "output_kd_loss", "feature_kd_loss", "halving_loss")
LAST = ("grad_norm", "lr")
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """The logged steps of a run, those of its stages one after the other.

    Attributes:
        label: Of the run.
        lines: By stage.
    """

    label: str
    lines: tuple[tuple[Line, ...], ...]

    @property
    def starts(self) -> tuple[float, ...]:
        """Steps done before each stage."""
        ends = [stage[-1]["step"] if stage else 0 for stage in self.lines]
        return tuple(float(sum(ends[:number])) for number in range(len(ends)))

    @property
    def end(self) -> float:
        """Steps done in all."""
        return float(sum(stage[-1]["step"] for stage in self.lines if stage))

    @property
    def names(self) -> tuple[str, ...]:
        """Of what was logged: the total, the terms, what else there is, sites last."""
        found = dict.fromkeys(name for stage in self.lines for line in stage for name in line)
        wanted = [name for name in found if "_loss" in name or name in (*FIRST, *LAST)]
        return tuple(sorted(wanted, key=lambda name: (_rank(name), wanted.index(name))))

    def series(self, name: str, label: str, color: int) -> list[Series]:
        """One for each stage that logged it: stages are different trainings, and no mean goes across."""
        found = []
        for start, stage in zip(self.starts, self.lines, strict=True):
            points = tuple((start + line["step"], line[name]) for line in stage if line.get(name) is not None)
            if points:
                found.append(Series(label, color, points, name not in LINEAR))
        return found


def _rank(name: str) -> int:
    if name in FIRST:
        return FIRST.index(name)
    return len(FIRST) + (LAST.index(name) + 1 if name in LAST else 0) + 10 * ("/" in name)


def read_training(run: RunFolder, label: str, stages: int) -> Training:
    """The log of a run.

    Raises:
        OutputError: If it is damaged: lines before the last are cut short, or are of something else.
    """
    try:
        lines = read_metrics(run.metrics)
        written = run.metrics.read_text().splitlines() if run.metrics.is_file() else []
    except ValueError as error:
        raise _damaged(run, error) from None
    if len(lines) < len(written) - 1:
        raise _damaged(run, f"line {len(lines) + 1}: {written[len(lines)][:80]}")
    for number, line in enumerate(lines, 1):
        if not _is_step(line):
            raise _damaged(run, f"line {number}: {written[number - 1][:80]}")
    by_stage = (tuple(line for line in lines if line["stage"] == number) for number in range(stages))
    return Training(label, tuple(by_stage))


def _is_step(line: Line) -> bool:
    numbers = (line.get(name) for name in line if name != "skipped")
    whole = isinstance(line.get("stage"), int) and isinstance(line.get("step"), int)
    return whole and all(value is None or isinstance(value, (int, float)) for value in numbers)


def _damaged(run: RunFolder, got: object) -> OutputError:
    return OutputError(
        "the log of training steps is damaged",
        where=run.metrics,
        got=got,
        remedy="restore it, or move it away: the page then goes without curves",
    )


def term_charts(training: Training) -> tuple[Chart, ...]:
    """A chart of each term, over all stages."""
    names = [name for name in training.names if "/" not in name]
    return _charts(training, ((name, name) for name in names))


def site_charts(training: Training) -> tuple[Chart, ...]:
    """A chart of the feature term at each of its sites."""
    names = [name for name in training.names if "/" in name]
    return _charts(training, ((name, name.partition("/")[2]) for name in names))


def _charts(training: Training, names: Iterable[tuple[str, str]]) -> tuple[Chart, ...]:
    stages = [start for start in training.starts if 0 < start < training.end]
    made = (
        chart(title, training.series(name, title, 1), logarithmic=name not in LINEAR, end=training.end, stages=stages)
        for name, title in names
    )
    return tuple(found for found in made if found)


def overlaid(trainings: Sequence[Training]) -> tuple[Chart, ...]:
    """The terms of several runs, each run a colour."""
    names = dict.fromkeys(name for training in trainings for name in training.names if "/" not in name)
    made = (
        chart(
            name,
            [one for color, run in enumerate(trainings, 1) for one in run.series(name, run.label, color)],
            logarithmic=name not in LINEAR,
            end=max(training.end for training in trainings),
        )
        for name in sorted(names, key=_rank)
    )
    return tuple(found for found in made if found)
