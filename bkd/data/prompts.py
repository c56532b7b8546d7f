"""Files of prompts, as people write them."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from bkd.data.metadata import caption_of
from bkd.errors import DataError

ALLOWED = "a text file with a prompt on each line, or a .csv with a column caption"


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty; of a `.csv`, its column `caption`.

    Raises:
        DataError: If there is no such file, or it is not UTF-8, or holds no prompt, or a row of a CSV has none.
    """
    if not path.is_file():
        raise DataError(
            "no such file of prompts", where=path, got="a folder" if path.is_dir() else None, allowed=ALLOWED
        )
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = [(number, caption_of(line)) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    if bad := next((number for number, text in lines if text is None), None):
        got = f"other bytes in line {bad}"
        raise DataError("prompts must be UTF-8", where=path, got=got, remedy="save it as UTF-8")
    if not lines:
        raise DataError("the file holds no prompt", where=path, allowed=ALLOWED)
    if path.suffix.lower() == ".csv":
        return _captions(path, data.decode("utf-8"))
    return [text for _, text in lines if text]


def _captions(path: Path, text: str) -> list[str]:
    table = csv.DictReader(io.StringIO(text, newline=""))
    columns, rows = [str(name) for name in table.fieldnames or ()], list(table)
    if "caption" not in columns:
        raise DataError(
            "this CSV has no captions", where=path, got=", ".join(columns), allowed="a header with a column caption"
        )
    captions = [(row["caption"] or "").strip() for row in rows]
    if not captions:
        raise DataError("the file holds no prompt", where=path, got="a header and no rows", allowed="a prompt a row")
    if not all(captions):
        raise DataError(
            "a row of this CSV has no caption",
            where=path,
            got=f"row {captions.index('') + 1}",
            remedy="take the row out, or write its caption",
        )
    return captions


def require_prompts(prompts: Sequence[str], *, remedy: str) -> None:
    """Refuse an empty list.

    Args:
        prompts: As given.
        remedy: How this command is told of some.

    Raises:
        DataError: With the remedy.
    """
    if not prompts:
        raise DataError("no prompts", remedy=remedy)
