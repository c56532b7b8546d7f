"""How `bkd inspect` and `bkd prune` show units, plans and costs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bkd.cli.console import console, short, table
from bkd.surgery.plan import PLAN_FILE

if TYPE_CHECKING:
    from bkd.importance import Selection
    from bkd.prune import Pruning, Written

Row = tuple[str, ...]


def unit_table(model: str, found: dict[str, Any]) -> Table:
    """The tree of units; the transformer layers of one attention share a row."""
    rows: list[Row] = []
    for stack, members in groupby(found["units"], key=lambda unit: _stack_of(unit["id"])):
        units = list(members)
        rows += [_stack_row(units)] if stack else [_row(unit["id"], unit) for unit in units]
    title = f"{model}: UNet, {found['parameters']:,} parameters, {short(found['macs'])} MACs"
    return table(title, ("unit", "parameters", "MACs", "when removed"), rows, left=(0, 3))


def _stack_of(unit: str) -> str:
    """`down.1.0` for its transformer layer `down.1.0.t3`; empty for other units."""
    found = re.fullmatch(r"(.+)\.t\d+", unit)
    return found[1] if found else ""


def _row(label: str, unit: dict[str, Any], each: str = "") -> Row:
    return (label, f"{each}{unit['parameters']:,}", f"{each}{unit['share_of_macs']:.1%}", _fate(unit))


def _stack_row(units: list[dict[str, Any]]) -> Row:
    first, last = units[0]["id"], units[-1]["id"]
    label = f"  {first}" if first == last else f"  {first} … {last.rpartition('.')[2]}"
    return _row(label, units[0], each="" if first == last else "each ")


def _fate(unit: dict[str, Any]) -> str:
    if unit["reason"]:
        return f"cannot go: {unit['reason']}"
    return f"takes {', '.join(unit['partners'])} along" if unit["partners"] else ""


def preset_table(found: dict[str, Any]) -> Table:
    """What each preset leaves."""
    rows = [
        (" = ".join([p["name"], *p["aliases"]]), f"{p['parameters']:,}", short(p["macs"]), p["summary"])
        for p in found["presets"]
    ]
    return table("presets", ("--blocks", "parameters", "MACs", "removes"), rows, left=(0, 3))


def show_pruning(pruning: Pruning) -> None:
    """What goes, what goes along, what it costs, and what to know about the student."""
    plan = pruning.plan
    named = [unit for unit in plan.removed if unit not in plan.partners]
    console.print(f"removed: {', '.join(_compact(named))}")
    if plan.partners:
        console.print(
            f"and with them, because no stock configuration lacks one alone: {', '.join(_compact(plan.partners))}"
        )
    costs = (("before", pruning.before), ("after", pruning.after))
    rows = [(name, f"{c.parameters:,}", short(c.macs), short(c.macs_without_attention)) for name, c in costs]
    before, after = pruning.before, pruning.after
    left = (after.parameters / before.parameters, after.macs / before.macs)
    share = ("left", *(f"{part:.1%}" for part in (*left, after.macs_without_attention / before.macs_without_attention)))
    console.print(table("UNet", ("", "parameters", "MACs", "without attention matmuls"), [*rows, share]))
    for note in pruning.notes:
        console.print(f"note: {note}")


def show_written(teacher: str, pruning: Pruning, written: Written, output: Path) -> None:
    """What was proved of a written student, and what its plan file holds."""
    sites = ", ".join(f"{len(pairs)} {name}" for name, pairs in pruning.plan.feature_pairs.items())
    console.print(f"proved: all {written.num_tensors} tensors equal the teacher's, byte for byte")
    console.print("proved: another process, without bkd, loads it with stock diffusers and computes the same")
    console.print(
        f"plan: {output / PLAN_FILE}: teacher {teacher} (sha256 {written.teacher_digest[:16]}…), "
        f"{len(pruning.plan.renamed)} renamed modules, feature sites: {sites}"
    )
    console.print(f"done: {output}")


def show_selection(selection: Selection) -> None:
    """Every score, the choice, and predicted beside measured output change."""
    rows = [
        (
            ", ".join(score.units),
            f"{score.parameters:,}",
            f"{score.change:.2g}",
            "x" * (score.units in selection.chosen),
        )
        for score in sorted(selection.scores, key=lambda score: score.change)
    ]
    title = f"relative change of the output when removed, on {selection.num_samples} samples"
    console.print(table(title, ("units", "parameters", "change", "chosen"), rows))
    console.print(
        f"chosen for at most {selection.max_parameters:,} parameters: predicted change {selection.predicted:.2g} "
        f"(the sum), measured {selection.measured:.2g}"
    )
    console.print("scores say little about how well a student recovers in training: compare with a preset")


def _compact(units: list[str] | tuple[str, ...]) -> Iterator[str]:
    """`down.2.0.t6 … t9` for neighbours of one stack."""
    for stack, members in groupby(units, key=_stack_of):
        listed = list(members)
        if stack and len(listed) > 2:
            yield f"{listed[0]} … {listed[-1].rpartition('.')[2]}"
        else:
            yield from listed
