"""metrics.jsonl, one line per logged step with every loss term unweighted; and trackers, through accelerate."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from bkd.environment import installed_version
from bkd.errors import EnvironmentProblem
from bkd.files import write_atomically
from bkd.training.journal import StepReport


def values_of(report: StepReport) -> dict[str, float | None]:
    """A step's numbers by name; JSON knows no NaN, so what is not finite is None."""
    sites = {f"feature_kd_loss/{name}": value for name, value in report.sites.items()}
    values = {**report.parts, **sites, "total": report.total, "lr": report.lr, "grad_norm": report.grad_norm}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class MetricsLog:
    """Append-only record of a run.

    Args:
        path: The file; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, stage: int, step: int) -> None:
        """Drop what was logged after `step` of `stage`: those steps are about to be repeated."""
        kept = [line for line in read_metrics(self._path) if (line["stage"], line["step"]) <= (stage, step)]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, stage: int, report: StepReport) -> None:
        """Append a step of a stage."""
        line: dict[str, Any] = {
            "stage": stage,
            "step": report.step,
            **values_of(report),
            "seconds": round(report.seconds, 4),
        }
        if report.trouble:
            line["skipped"] = report.trouble
        with self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All logged lines; a last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if isinstance(line, dict):
            lines.append(line)
    return lines


def require_trackers(names: Collection[str]) -> None:
    """Refuse those that are not installed, but for `tensorboard`, which is then left out.

    Raises:
        EnvironmentProblem: If `wandb` is wanted and not installed.
    """
    if "wandb" in names and not installed_version("wandb"):
        raise EnvironmentProblem(
            "wandb is not installed",
            where="train.trackers",
            remedy="pip install wandb, or train.trackers='[tensorboard]'",
        )


def log_in(names: Collection[str]) -> None:
    """Have W&B find its key, or ask for it, before hours of other work.

    Raises:
        EnvironmentProblem: If W&B is not installed, has no key and nobody to ask, or does not accept the key.
    """
    require_trackers(names)
    if "wandb" not in names:
        return
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        raise EnvironmentProblem(
            "Weights & Biases cannot be used",
            where="train.trackers",
            got=error,
            remedy="run `wandb login`, or set WANDB_MODE=offline, or train.trackers='[tensorboard]'",
        ) from None


@dataclass(frozen=True)
class TrackedStage:
    """A stage of a run, as trackers know it.

    Attributes:
        run: The run folder; trackers write into it.
        run_id: What no other run has.
        number: Of the stage, from 0; each has steps of its own.
        settings: What W&B shows beside the curves.
    """

    run: Path
    run_id: str
    number: int
    settings: Mapping[str, Any]


def wandb_keywords(stage: TrackedStage) -> dict[str, Any]:
    """Of `wandb.init`: a stage that goes on is the same W&B run, and the stages of a run are a group."""
    return {
        "id": f"{stage.run_id}-{stage.number:02d}",
        "name": f"{stage.run.name}-{stage.number:02d}",
        "group": f"{stage.run.name}-{stage.run_id}",
        "config": dict(stage.settings),
        "dir": str(stage.run),
        "resume": "allow",
        # A progress bar is no log, and the command, which is in the metadata, may hold tokens.
        "settings": {"console": "off", "x_disable_meta": True},
    }


class Trackers:
    """TensorBoard and Weights & Biases, open for as long as the context lasts.

    Args:
        names: Those wanted; `tensorboard` is left out where it is not installed.
        stage: What is trained; none on processes that do not log.
    """

    def __init__(self, names: Collection[str], stage: TrackedStage | None) -> None:
        self._stage = stage
        self._names = [name for name in names if name != "tensorboard" or installed_version(name)]
        self._open: list[Any] = []
        self._closing = ExitStack()

    def __enter__(self) -> Trackers:
        return self

    def start(self, step: int) -> None:
        """Begin, or continue after `step`: what was logged beyond it is dropped where the tracker can do that."""
        stage = self._stage
        if stage is None or not self._names:
            return
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        PartialState()  # trackers ask it which process they are in
        made = {
            "tensorboard": lambda: TensorBoardTracker(
                f"tensorboard/{stage.number:02d}", stage.run, purge_step=step + 1
            ),
            "wandb": lambda: WandBTracker("bkd", **wandb_keywords(stage)),
        }
        for name in self._names:
            tracker = made[name]()
            tracker.start()
            self._open.append(tracker)
            self._closing.push(partial(_finish, tracker))

    def log(self, report: StepReport) -> None:
        """A step's numbers."""
        values = {name: value for name, value in values_of(report).items() if value is not None}
        for tracker in self._open:
            tracker.log(values, step=report.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.__exit__(kind, error, trace)


def _finish(tracker: Any, kind: type[BaseException] | None, *_: object) -> None:
    if tracker.name == "wandb":  # or it calls every run finished
        tracker.tracker.finish(exit_code=int(kind is not None))
    else:
        tracker.finish()
