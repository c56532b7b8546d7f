"""Choose what to remove under a budget: exactly, among what a stock configuration can express.

Units are no free items of a knapsack: a down layer needs an up layer, attentions of a block go together, the mid block
must be as deep as the first innermost attention. So the choice is one *option* for each level and for the mid block,
plus single transformer layers of whatever attention stays; an integer program says all of that. What the mid block
costs depends on whether the innermost level stays, so there is a program for each case, and the better choice wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from bkd.errors import SurgeryError
from bkd.surgery.anatomy import Anatomy, Block
from bkd.surgery.budget import Amounts, amount_within
from bkd.surgery.options import complete, lacking, level_choices
from bkd.surgery.units import Unit, all_units, is_within, level_of, removed_units


@dataclass(frozen=True)
class Option:
    """One way to leave a place.

    Attributes:
        places: `level.2` or `mid`; several where a removal settles them together.
        units: What is removed there; empty when all stays.
    """

    places: tuple[str, ...]
    units: tuple[Unit, ...]


def enumerate_options(anatomy: Anatomy) -> list[Option]:
    """Every option of every place that can be chosen whatever the other places do."""
    options = []
    for level in range(anatomy.num_levels):
        options += [Option((f"level.{level}",), units) for units in _level_removals(anatomy, level)]
    options += _innermost_removal(anatomy)
    if anatomy.whole.mid is not None:
        removals = [(), ("mid",)] + ([("mid.attn",)] if anatomy.whole.mid.stack is not None else [])
        options += [Option(("mid",), units) for units in removals]
    return options


def _level_removals(anatomy: Anatomy, level: int) -> list[tuple[Unit, ...]]:
    removals = []
    for choice in level_choices(anatomy, level, anatomy.num_levels):
        down = _attention(f"down.{level}", anatomy.whole.down[level], choice.down)
        up = _attention(f"up.{anatomy.up_index(level)}", anatomy.whole.up[level], choice.up)
        lacks = tuple(sorted(lacking(anatomy, level, choice)))
        removals += [(*lacks, *bare) for bare in (sum(pair, ()) for pair in product(down, up))]
    return removals


def _attention(block: str, whole: Block, kept: Sequence[int]) -> list[tuple[Unit, ...]]:
    return [(), (f"{block}.attn",)] if whole.stacks and kept else [()]


def _innermost_removal(anatomy: Anatomy) -> list[Option]:
    """The innermost level with its partners, if the levels that these do not touch keep all their choices."""
    innermost = anatomy.num_levels - 1
    try:
        removed = removed_units(anatomy, complete(anatomy, [f"level.{innermost}"]))
    except SurgeryError:
        return []
    places = {_place(anatomy, unit) for unit in removed}
    others = [level for level in range(innermost) if f"level.{level}" not in places]
    if any(level_choices(anatomy, o, innermost) != level_choices(anatomy, o, innermost + 1) for o in others):
        return []
    return [Option(tuple(sorted(places)), removed)]


def _place(anatomy: Anatomy, unit: Unit) -> str:
    level = level_of(unit, anatomy)
    return "mid" if level is None else f"level.{level}"


def transformer_layers(anatomy: Anatomy) -> list[Unit]:
    """The single transformer layers."""
    return [unit for unit in all_units(anatomy) if ".t" in unit]


def scorable_removals(anatomy: Anatomy) -> list[tuple[Unit, ...]]:
    """Everything that `choose` needs a score for."""
    options = [option.units for option in enumerate_options(anatomy) if option.units]
    return options + [(layer,) for layer in transformer_layers(anatomy)]


def choose(
    anatomy: Anatomy, scores: Mapping[tuple[Unit, ...], float], amounts: Amounts, limit: int
) -> tuple[tuple[Unit, ...], ...]:
    """The removals of least summed output change that leave no more than a limit.

    Args:
        anatomy: The teacher's.
        scores: Removed units of an option, or one transformer layer -> output change. All must be there.
        amounts: What is limited.
        limit: How much of it may be left.

    Raises:
        SurgeryError: If even the smallest student has more; says how much.
    """
    programs = [_Program(anatomy, amounts, is_shallow=is_shallow) for is_shallow in (False, True)]
    removals = programs[0].removals
    costs = np.array([scores[units] if units else 0.0 for units in removals])
    choices = [chosen for program in programs if (chosen := program.solve(costs, limit)) is not None]
    if not choices:
        raise SurgeryError(
            "no student is that small",
            got=f"a budget of {limit:,} {amounts.name}",
            allowed=f"{min(program.smallest() for program in programs):,} or more",
            remedy="keep more, or prune in two steps: the student of a first pruning can be pruned again",
        )
    best = min(choices, key=lambda chosen: float(costs @ chosen))
    return tuple(units for units, on in zip(removals, best, strict=True) if on and units)


class _Program:
    """The integer program: a variable for each option, then one for each transformer layer; 1 means removed so."""

    def __init__(self, anatomy: Anatomy, amounts: Amounts, *, is_shallow: bool) -> None:
        self.anatomy = anatomy
        self.options = enumerate_options(anatomy)
        self.layers = transformer_layers(anatomy)
        self.removals = [*(option.units for option in self.options), *((layer,) for layer in self.layers)]
        here = amounts.shallow if is_shallow else amounts.whole
        self.total = sum(here.values())
        self.removed = np.array([amount_within(anatomy, units, here) for units in self.removals])
        self.allowed = np.array(
            [float(self._fits(option, is_shallow)) for option in self.options] + [1.0] * len(self.layers)
        )
        self.constraints = [self._one_option_each(), *self._layers_within_what_stays(), *self._mid_depth()]

    def _fits(self, option: Option, is_shallow: bool) -> bool:
        innermost = f"level.{self.anatomy.num_levels - 1}"
        return innermost not in option.places or (innermost in option.units) == is_shallow

    def smallest(self) -> float:
        """The least that can be left; infinite where nothing is allowed."""
        chosen = self._solve_scaled(-self.removed.astype(float), self.allowed, None)
        return np.inf if chosen is None else self.total - int(self.removed @ chosen)

    def solve(self, costs: np.ndarray, limit: int) -> np.ndarray | None:
        """Cheapest choice within the limit, as zeros and ones; None where there is none.

        The solver's tolerances are absolute, about 1e-6, and scores span ten decades. What costs more than a choice
        already found cannot be part of a better one: it is ruled out, the rest is scaled up, and solved again.
        """
        best = self._solve_scaled(costs, self.allowed, limit)
        while best is not None and (cost := float(costs @ best)) > 0:
            better = self._solve_scaled(costs / cost, self.allowed * (costs <= cost), limit)
            if better is None or costs @ better >= cost:
                break
            best = better
        return best

    def _solve_scaled(self, costs: np.ndarray, upper: np.ndarray, limit: int | None) -> np.ndarray | None:
        constraints = list(self.constraints)
        if limit is not None:
            unit = np.gcd.reduce(self.removed)  # small whole numbers are compared more exactly
            needed = -(-(self.total - limit) // unit)
            constraints.append(LinearConstraint(self.removed // unit, lb=needed))
        while True:
            found = milp(
                np.where(upper > 0, costs, 0.0),
                constraints=constraints,
                integrality=np.ones(len(costs)),
                bounds=Bounds(0, upper),
                options={"mip_rel_gap": 0},
            )
            if found.x is None:
                return None
            chosen: np.ndarray = np.rint(found.x).astype(int)
            if limit is None or self.total - int(self.removed @ chosen) <= limit:
                return chosen
            # Beyond the budget within the solver's tolerance: rule out just this choice.
            constraints.append(LinearConstraint(1 - 2 * chosen, lb=1 - chosen.sum()))

    def _one_option_each(self) -> LinearConstraint:
        places = sorted({place for option in self.options for place in option.places})
        rows = [self._row({option: 1 for option in self.options if place in option.places}) for place in places]
        return LinearConstraint(np.array(rows), lb=1, ub=1)

    def _layers_within_what_stays(self) -> list[LinearConstraint]:
        """A transformer layer goes by itself only where its attention stays."""
        rows = []
        for layer in self.layers:
            place = _place(self.anatomy, layer)
            takes = [o for o in self.options if place in o.places and self._takes(o, layer)]
            rows.append(self._row(dict.fromkeys(takes, 1), {layer: 1}))
        return [LinearConstraint(np.array(rows), ub=1)] if rows else []

    def _mid_depth(self) -> list[LinearConstraint]:
        """Where both have attention, the mid block is as deep as the innermost down block's first attention."""
        mid = self.anatomy.whole.mid
        if mid is None or mid.stack is None:
            return []
        rows, bound = [], len(mid.stack)
        last = self.anatomy.num_levels - 1
        gone = [option for option in self.options if f"level.{last}" in option.units]
        for level in range(max(0, last - 1), last + 1):
            if level < last and not gone:
                continue
            for first, stack in enumerate(self.anatomy.whole.down[level].stacks or ()):
                anchored = [o for o in self.options if f"level.{level}" in o.places and self._first(o, level) == first]
                surplus = {f"mid.t{number}": 1 for number in mid.stack} | {
                    f"down.{level}.{first}.t{number}": -1 for number in stack
                }
                big = bound + len(stack)
                active = dict.fromkeys(anchored, big)
                active |= {option: big for option in self.options if "mid" in option.places and not option.units}
                active |= {option: big for option in gone if level < last}
                conditions = 3 if level < last else 2
                difference = bound - len(stack)
                for sign in (1, -1):
                    row = self._row(active, {layer: sign * weight for layer, weight in surplus.items()})
                    rows.append(LinearConstraint(row, ub=conditions * big + sign * difference))
        return rows

    def _first(self, option: Option, level: int) -> int | None:
        """The first down layer with attention that an option keeps; None where it keeps none."""
        if f"down.{level}.attn" in option.units or f"level.{level}" in option.units:
            return None
        kept = [n for n in self.anatomy.whole.down[level].layers if f"down.{level}.{n}" not in option.units]
        return kept[0] if kept else None

    def _takes(self, option: Option, layer: Unit) -> bool:
        return any(is_within(layer, unit, self.anatomy) for unit in option.units)

    def _row(self, options: Mapping[Option, float], layers: Mapping[Unit, float] | None = None) -> np.ndarray:
        weights = [options.get(option, 0.0) for option in self.options]
        return np.array(weights + [(layers or {}).get(layer, 0.0) for layer in self.layers])
