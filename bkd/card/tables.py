"""Markdown that shows text as it is, whatever stands in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$])")


class Markdown(str):
    """Text that is Markdown already; all else is escaped where it is put into a card."""


def words(text: object) -> Markdown:
    """A text on one line that Markdown does not format, and does not take for HTML."""
    return Markdown(SPECIAL.sub(r"\\\1", " ".join(str(text).split()).replace("&", "&amp;")).replace("\\<", "&lt;"))


def shown(value: object) -> Markdown:
    """A value for a card."""
    return value if isinstance(value, Markdown) else words(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Markdown:
    """A table; the first column holds words, the others figures."""
    rule = ["---", *("---:" for _ in columns[1:])]
    lines = (map(words, columns), rule, *(map(words, row) for row in rows))
    return Markdown("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
