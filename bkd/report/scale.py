"""From values to places in a chart, and the values that its axis names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.ticker import Locator, LogLocator, MaxNLocator

NUM_TICKS = 4


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def around(cls, values: Iterable[float], *, logarithmic: bool = False) -> Scale:
        """The least axis that has room for all values, which must not be empty; never of no length."""
        found = list(values)
        low, high = min(found), max(found)
        if low == high:
            low, high = (low / 2, high * 2) if logarithmic else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        return cls(low, high, logarithmic)

    def place(self, value: float) -> float:
        """0 for the low end, 1 for the high one."""
        if self.logarithmic:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Round values on the axis, a handful.

        Args:
            whole: Whether only integers.
        """
        locators: list[Locator] = [MaxNLocator(NUM_TICKS, steps=[1, 2, 5, 10], integer=whole)]
        if self.logarithmic:
            locators = [LogLocator(subs=(1.0,), numticks=NUM_TICKS), LogLocator(subs=(1.0, 2.0, 5.0)), *locators]
        for locator in locators:
            found = [float(tick) for tick in locator.tick_values(self.low, self.high) if self.low <= tick <= self.high]
            if 2 <= len(found) <= 2 * NUM_TICKS:
                break
        return found
