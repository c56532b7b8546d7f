"""metadata.jsonl and metadata.csv beside pictures, as in the Hugging Face imagefolder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from bkd.errors import DataError, suggest

FILE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Where captions are looked for, in this order, when no column is named."""
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
Row = tuple[str, object, dict[str, Any]]
"""Of a metadata file: its place, the caption, and the other columns."""


def metadata_rows(folder: Path, names: Sequence[str], caption_field: str | None) -> dict[str, Row]:
    """The rows of all metadata files, by the relative path of the picture that each is about.

    Args:
        folder: The folder of pictures.
        names: Relative paths of the metadata files in it.
        caption_field: Column with the captions; the first of `CAPTION_COLUMNS` when not said.

    Raises:
        DataError: If a file cannot be read, lacks a column, or names a picture twice or outside its folder.
    """
    if len({PurePosixPath(name).parent for name in names}) < len(names):
        raise DataError("two metadata files in one folder: keep one", where=folder, got=", ".join(sorted(names)))
    if caption_field and not names:
        raise DataError(
            f"no metadata file that could have '{caption_field}'", where=folder, allowed=" or ".join(METADATA_FILES)
        )
    found: dict[str, Row] = {}
    for name in sorted(names):
        rows = list(_read_rows(folder / name))
        columns = list(dict.fromkeys(chain.from_iterable(row for _, row in rows)))
        caption = _caption_column(folder / name, columns, caption_field)
        for line, row in rows:
            place = f"{name} line {line}"
            source = (PurePosixPath(name).parent / _file_of(row, folder / place)).as_posix()
            if source in found:
                raise DataError("two rows for one picture", where=folder / source, got=f"{found[source][0]}, {place}")
            others = {column: value for column, value in row.items() if column not in (FILE_COLUMN, caption)}
            found[source] = (place, row.get(caption), others)
    return found


def _caption_column(path: Path, columns: Sequence[str], wanted: str | None) -> str:
    for column in (wanted,) if wanted else CAPTION_COLUMNS:
        if column in columns:
            return column
    raise DataError(
        f"no column '{wanted}'{suggest(wanted, columns)}" if wanted else "no column with captions",
        where=path,
        got=", ".join(columns) or "no rows",
        allowed=", ".join(CAPTION_COLUMNS) + ", or another column that you name",
    )


def _file_of(row: dict[str, Any], place: Path) -> PurePosixPath:
    name = row.get(FILE_COLUMN)
    if not isinstance(name, str) or not name:
        raise DataError(f"a row without {FILE_COLUMN}", where=place, got=", ".join(row))
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError("a row names a file outside its folder", where=place, got=name, allowed="a path below it")
    return path


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) for every row of a metadata file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from (_csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows)(stream, path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("metadata cannot be read", where=path, got=error, allowed="UTF-8") from error


def _csv_rows(stream: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(stream, strict=True)
    header: list[str] = next(reader, [])
    if len(set(header)) < len(header):
        raise DataError("a column occurs twice", where=path, got=", ".join(header))
    for cells in filter(None, reader):
        if len(cells) != len(header):
            got = f"{len(cells)} cells below {len(header)} names; cells with commas need quotes"
            raise DataError("damaged row", where=f"{path} line {reader.line_num}", got=got)
        yield reader.line_num, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _jsonl_rows(stream: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        try:
            row = json.loads(line, parse_float=_finite, parse_constant=lambda name: None) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise DataError("damaged row", where=f"{path} line {number}", got=error) from error
        if not isinstance(row, dict):
            raise DataError("damaged row", where=f"{path} line {number}", got=line.strip()[:60], allowed="{…}")
        if row:
            yield number, row


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None
