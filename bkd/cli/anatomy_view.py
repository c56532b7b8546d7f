"""How `bkd inspect` and `bkd prune` show units, plans and costs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bkd.cli.console import console, counted, short, table
from bkd.surgery.plan import PLAN_FILE

if TYPE_CHECKING:
    from bkd.lora.remap import Remapped
    from bkd.pruning.importance import Selection
    from bkd.pruning.prune import Pruning, Written

Row = tuple[str, ...]


def unit_table(model: str, found: dict[str, Any]) -> Table:
    """The tree of units; the transformer layers of one attention share a row."""
    parents = {unit["id"]: unit["parent"] for unit in found["units"]}
    total = found["macs"]
    rows: list[Row] = []
    for _, members in groupby(found["units"], key=lambda unit: _stack_of(unit["id"])):
        rows.append(_row(list(members), parents, total))
    title = f"{model}: UNet, {found['parameters']:,} parameters, {short(found['macs'])} MACs"
    return table(title, ("unit", "parameters", "MACs", "saved", "when removed"), rows, left=(0, 4))


def _stack_of(unit: str) -> str:
    """`down.1.0.t` for its transformer layer `down.1.0.t3`; other units are by themselves."""
    return re.sub(r"\.t\d+$", ".t", unit)


def _row(units: Sequence[dict[str, Any]], parents: dict[str, str | None], total_macs: int) -> Row:
    """One unit, or the transformer layers of one attention: these differ in nothing but their number."""
    unit, depth = units[0], 0
    parent = unit["parent"]
    while parent is not None:
        parent, depth = parents[parent], depth + 1
    each = "each " if len(units) > 1 else ""
    label = f"{unit['id']} … {units[-1]['id'].rpartition('.')[2]}" if each else unit["id"]
    partners = [partner for member in units for partner in member["partners"]]
    fate = f"takes {', '.join(_compact(partners))} along" if partners else "may go"
    if unit["reason"]:
        fate = f"cannot go: {unit['reason']}"
    saves = f"{each}{unit['saved']['macs'] / total_macs:.1%}" if unit["saved"] else ""
    return ("  " * depth + label, f"{each}{unit['parameters']:,}", f"{each}{unit['share_of_macs']:.1%}", saves, fate)


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
            f"and with them, because a stock configuration lacks both or neither: {', '.join(_compact(plan.partners))}"
        )
    costs = (("before", pruning.before), ("after", pruning.after))
    rows = [(name, f"{c.parameters:,}", short(c.macs), short(c.macs_without_attention)) for name, c in costs]
    before, after = pruning.before, pruning.after
    left = (after.parameters / before.parameters, after.macs / before.macs)
    share = ("left", *(f"{part:.1%}" for part in (*left, after.macs_without_attention / before.macs_without_attention)))
    console.print(table("UNet", ("", "parameters", "MACs", "without attention matmuls"), [*rows, share]))
    sites = ", ".join(f"{len(pairs)} {name}" for name, pairs in plan.feature_pairs.items())
    console.print(
        f"key map: {counted(len(plan.renamed), 'module')} renamed, all others keep their name; feature sites: {sites}"
    )
    for note in pruning.notes:
        console.print(f"note: {note}")


def show_written(teacher: str, written: Written, output: Path) -> None:
    """What was proved of a written student, and what its plan file holds."""
    console.print(f"proved: all {written.num_tensors} tensors equal the teacher's, byte for byte")
    console.print("proved: another process, without bkd, loads it with stock diffusers and computes the same")
    if written.ignored:
        names = ", ".join(written.ignored[:3]) + " …" * (len(written.ignored) > 3)
        console.print(f"note: left out, because the teacher's configuration does not know them: {names}")
    console.print(f"plan: {output / PLAN_FILE}; teacher {teacher}, sha256 {written.teacher_digest[:16]}…")
    console.print(f"done: {output}")


def show_selection(selection: Selection) -> None:
    """Every score, the choice, and predicted beside measured output change."""
    rows = [
        (
            ", ".join(score.units),
            f"{score.parameters:,}",
            short(score.macs),
            f"{score.change:.2g}",
            "x" * (score.units in selection.chosen),
        )
        for score in sorted(selection.scores, key=lambda score: (score.units not in selection.chosen, score.change))
    ]
    title = f"relative change of the output when removed, on {selection.num_samples} samples"
    console.print(table(title, ("units", "parameters", "MACs", "change", "chosen"), rows))
    console.print(
        f"chosen for {selection.budget}: predicted change {selection.predicted:.2g} "
        f"(the sum), measured {selection.measured:.2g}"
    )
    console.print("scores say little about how well a student recovers in training: compare with a preset")


def show_remapped(found: Remapped, output: Path) -> None:
    """Every module whose tensors had nowhere to go, and what the new file holds."""
    for reason, keys in (("its module was removed", found.lost), ("the teacher has no such module", found.unknown)):
        for module in dict.fromkeys(key.partition(".lora_")[0] for key in keys):
            console.print(f"left out, {reason}: {module}")
    lost = f", {len(found.lost)} lost" if found.lost else ""
    unknown = f", {len(found.unknown)} unknown" if found.unknown else ""
    console.print(f"done: {output} holds {found.num_carried} tensors{lost}{unknown}")


def _compact(units: Sequence[str]) -> Iterator[str]:
    """`down.2.0.t6 … t9` for three or more neighbours of one stack."""
    runs: list[list[str]] = []
    for unit in units:
        stack, _, number = unit.rpartition(".t")
        follows = stack and number.isdecimal() and runs and runs[-1][-1] == f"{stack}.t{int(number) - 1}"
        runs[-1].append(unit) if follows else runs.append([unit])
    for run in runs:
        if len(run) > 2:
            yield f"{run[0]} … {run[-1].rpartition('.')[2]}"
        else:
            yield from run
