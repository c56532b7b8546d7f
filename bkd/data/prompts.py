"""Files of prompts, as people write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from bkd.data.metadata import caption_of
from bkd.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty; of a `.csv`, its column `caption`.

    Raises:
        DataError: If there is no such file, or it is not UTF-8, or holds no prompt, or a row of a CSV has none.
    """
    if not path.is_file():
        raise DataError("no such file of prompts", where=path, allowed="a text file with a prompt on each line")
    data = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    lines = [(number, caption_of(line)) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    if bad := next((number for number, text in lines if text is None), None):
        raise DataError("prompts must be UTF-8", where=path, got=f"other bytes in line {bad}")
    if not lines:
        raise DataError("the file holds no prompt", where=path, allowed="a prompt on each line")
    if path.suffix.lower() == ".csv":
        return _captions(path, data.decode("utf-8"))
    return [text for _, text in lines if text]


def _captions(path: Path, text: str) -> list[str]:
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if not rows or "caption" not in rows[0]:
        raise DataError(
            "this CSV has no captions",
            where=path,
            got=", ".join(str(name) for name in rows[0]) if rows else "no rows",
            allowed="a header with a column caption",
        )
    captions = [(row["caption"] or "").strip() for row in rows]
    if not all(captions):
        raise DataError("a row of this CSV has no caption", where=path, got=f"row {captions.index('') + 1}")
    return captions


def require_prompts(prompts: Sequence[str]) -> None:
    """Refuse an empty list.

    Raises:
        DataError: With what to give.
    """
    if not prompts:
        raise DataError(
            "no prompts", remedy="add --prompts FILE, with one prompt a line; bkd sample also takes --prompt TEXT"
        )
