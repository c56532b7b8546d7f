"""A folder of shards that is being written: whole shards only, continued after a stop, shared between processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.data.shards import Record, shard_name, write_shard
from bkd.data.stats import shard_stats, stats_file
from bkd.environment import Place
from bkd.errors import DataError, OutputError
from bkd.files import require_writable, write_atomically

DATASET_FILE = "bkd_dataset.json"
"""What a folder of shards was made from and with; marks it as ours."""
FORMAT = 1
ALONE = Place()
BULKY = {
    "sources": "made from other shards",
    "pictures": "made from other pictures",
    "prompts": "drawn from other prompts",
}
"""Settings whose values tell a reader nothing."""


@dataclass(frozen=True)
class OutputSet:
    """Shards `00000.tar`, `00001.tar`, … of one data set.

    Attributes:
        folder: Where they lie.
        num_shards: When all are written.
        fingerprint: Changes with anything that changes their bytes; recorded with each.
    """

    folder: Path
    num_shards: int
    fingerprint: str

    def path(self, number: int) -> Path:
        return self.folder / shard_name(number)

    def is_finished(self, number: int) -> bool:
        """Whether a shard is there, whole, and of this data set."""
        path = self.path(number)
        return path.is_file() and shard_stats(path).get("fingerprint") == self.fingerprint

    def share(self, place: Place) -> range:
        """The shards that a process is to write: every `world_size`-th."""
        return range(place.rank, self.num_shards, place.world_size)

    def unfinished(self, place: Place = ALONE) -> list[int]:
        """Those of its share that it still has to write."""
        return [number for number in self.share(place) if not self.is_finished(number)]

    def remove_others(self) -> None:
        """Delete shards beyond the last, which a replaced data set has left."""
        for path in self.folder.glob("[0-9]*.tar"):
            if path.stem.isdigit() and int(path.stem) >= self.num_shards:
                for part in (stats_file(path), path, *self.folder.glob(f"{path.name}.*")):
                    part.unlink(missing_ok=True)

    def write(self, number: int, records: Iterable[Record], **stats: Any) -> int:
        """Write one shard; see `write_shard`."""
        return write_shard(self.path(number), records, fingerprint=self.fingerprint, **stats)


def dataset_facts(folder: Path) -> dict[str, Any] | None:
    """What `bkd_dataset.json` says; None where there is none that can be read."""
    try:
        found = json.loads((folder / DATASET_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def require_finished(output: OutputSet) -> None:
    """Refuse a folder that a stopped or replaced `bkd data` left with a part of a data set, or parts of two.

    Raises:
        DataError: Naming a shard that is not there yet.
    """
    if unfinished := output.unfinished():
        made_by = (dataset_facts(output.folder) or {}).get("made_by")
        raise DataError(
            "this data set has not been written to its end",
            where=output.folder,
            got=f"{output.num_shards - len(unfinished)} of {output.num_shards} shards; "
            f"{output.path(unfinished[0]).name} is missing",
            remedy=f"run the same `bkd data {made_by}` again: it continues",
        )


def open_output_set(
    folder: Path,
    made_by: str,
    num_shards: int,
    settings: Mapping[str, Any],
    *,
    place: Place = ALONE,
    overwrite: bool = False,
) -> OutputSet:
    """Begin or continue a data set.

    Args:
        folder: Output; new, empty, or an unfinished or finished data set of the same settings.
        made_by: The verb.
        num_shards: That there will be.
        settings: Everything else that the shards' bytes depend on; plain JSON.
        place: Of this process; the first also deletes what a replaced data set has left.
        overwrite: Whether a data set of other settings may be replaced; its shards are, one by one.

    Raises:
        OutputError: If the folder holds anything else; names the settings that differ.
    """
    wanted = dataset_description(made_by, num_shards, settings)
    require_ours(folder)
    there = dataset_facts(folder) or wanted
    if (differing := _differing(there, wanted)) and not overwrite:
        raise OutputError(
            "the output folder holds another data set",
            where=folder,
            got="; ".join(_said(name, there) for name in differing),
            allowed="; ".join(_said(name, wanted) for name in differing if name not in BULKY) or None,
            remedy="choose another -o, or add --overwrite",
        )
    write_atomically(folder / DATASET_FILE, json.dumps(wanted, indent=1) + "\n")
    output = OutputSet(folder, num_shards, wanted["fingerprint"])
    if place.rank == 0:
        output.remove_others()
    return output


def described_set(folder: Path) -> OutputSet | None:
    """The data set that `bkd data` has begun in a folder; None where it has not."""
    facts = dataset_facts(folder) or {}
    num_shards, fingerprint = facts.get("num_shards"), facts.get("fingerprint")
    return OutputSet(folder, num_shards, fingerprint) if isinstance(num_shards, int) and fingerprint else None


def dataset_description(made_by: str, num_shards: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `bkd_dataset.json` will say, with its fingerprint."""
    facts = {"format": FORMAT, "made_by": made_by, "num_shards": num_shards, **settings}
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    described: dict[str, Any] = json.loads(json.dumps({**facts, "fingerprint": fingerprint}))  # lists for tuples
    return described


def require_ours(folder: Path) -> None:
    """Refuse an output folder that holds what `bkd data` did not write, before any work is done.

    Raises:
        OutputError: Naming what lies there.
    """
    if dataset_facts(folder) is not None:
        return
    require_writable(folder)
    if folder.is_dir() and (held := sorted(path.name for path in folder.iterdir())):
        raise OutputError(
            "the output folder holds something else", where=folder, got=", ".join(held[:4]), remedy="choose another -o"
        )


def _differing(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = sorted({*there, *wanted} - {"fingerprint"})
    return [name for name in names if there.get(name) != wanted.get(name)]


def _said(name: str, facts: Mapping[str, Any]) -> str:
    if name in BULKY:
        return BULKY[name]
    value = facts.get(name)
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{name}: {text if len(text) <= 100 else text[:80] + '…'}"
