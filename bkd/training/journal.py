"""What steps did, kept on the device until somebody wants to read it.

Reading a number makes the host wait for the device. So a step's numbers stay there as one row, and rows are read
together, averaged over the processes by one exchange.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bkd.losses import LossTerms
from bkd.training.optimizer import Gradient
from bkd.training.parallel import Parallel


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        step: Steps done, 1-based.
        max_steps: Steps of the stage.
        parts: Unweighted loss terms, averaged over the global batch.
        sites: What each site adds to the feature term, averaged likewise.
        total: The weighted sum that was minimised.
        lr: Learning rate of the step.
        grad_norm: Norm of the gradient before clipping.
        seconds: Wall time of a step, averaged over those that were read together.
        trouble: Why the step changed nothing; empty for a good one.
    """

    step: int
    max_steps: int
    parts: Mapping[str, float]
    sites: Mapping[str, float]
    total: float
    lr: float
    grad_norm: float
    seconds: float
    trouble: str = ""


@dataclass(frozen=True)
class _Row:
    step: int
    lr: float
    parts: tuple[str, ...]
    sites: tuple[str, ...]
    values: Tensor
    gradient: Gradient


class Journal:
    """Collects steps and turns them into reports.

    Args:
        max_steps: Steps of the stage.
        parallel: This process among the others.
    """

    def __init__(self, max_steps: int, parallel: Parallel) -> None:
        self._max_steps, self._parallel = max_steps, parallel
        self._rows: list[_Row] = []
        self._started = time.perf_counter()

    def start(self) -> None:
        """Time steps from now on."""
        self._started = time.perf_counter()

    def add(self, step: int, lr: float, passes: Sequence[LossTerms], gradient: Gradient) -> None:
        """A finished step; nothing is read.

        Args:
            step: 1-based.
            lr: Its learning rate.
            passes: Terms of its passes.
            gradient: Of the whole step.
        """
        first = passes[0]
        rows = [
            torch.stack([*terms.parts.values(), *terms.sites.values(), terms.total.detach().float()])
            for terms in passes
        ]
        values = torch.stack(rows).mean(0) if len(rows) > 1 else rows[0]
        self._rows.append(_Row(step, lr, tuple(first.parts), tuple(first.sites), values, gradient))

    def read(self, *, stop: bool) -> tuple[list[StepReport], bool]:
        """Everything since the last call, of which there must be something, and whether any process was asked to stop.

        What is returned is the same in all processes.

        Args:
            stop: Whether this process was.
        """
        norms = torch.stack([row.gradient.norm for row in self._rows]).tolist()  # the host has now caught up
        seconds = (time.perf_counter() - self._started) / len(self._rows)
        values = torch.stack([row.values for row in self._rows])
        ours = torch.tensor([float(stop), seconds], device=values.device).expand(len(self._rows), -1)
        table = self._parallel.mean(torch.cat([values, ours], dim=1)).tolist()
        rows = zip(self._rows, table, norms, strict=True)
        reports = [self._report(row, numbers[:-2], norm, numbers[-1]) for row, numbers, norm in rows]
        self._rows.clear()
        self.start()
        return reports, table[0][-2] > 0

    def _report(self, row: _Row, values: Sequence[float], norm: float, seconds: float) -> StepReport:
        count = len(row.parts)
        parts = dict(zip(row.parts, values[:count], strict=True))
        sites = dict(zip(row.sites, values[count:-1], strict=True))
        trouble = "" if math.isfinite(norm) else _trouble(parts, sites, row.gradient)
        return StepReport(row.step, self._max_steps, parts, sites, values[-1], row.lr, norm, seconds, trouble)


def _trouble(parts: Mapping[str, float], sites: Mapping[str, float], gradient: Gradient) -> str:
    """Which terms and sites are not finite, or else which parameters' gradients."""
    terms = [name for name, value in parts.items() if not math.isfinite(value)]
    at = [name for name, value in sites.items() if not math.isfinite(value)]
    if terms:
        return ", ".join(terms) + (f" at {', '.join(at)}" if at else "") + " not finite"
    bad = [name for name, norm in zip(gradient.names, gradient.norms.tolist(), strict=True) if not math.isfinite(norm)]
    more = f" and {len(bad) - 1} more parameters" if len(bad) > 1 else ""
    return f"the gradient of {bad[0]}{more} not finite" if bad else "the gradient's norm not finite"
