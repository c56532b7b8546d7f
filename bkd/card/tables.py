"""Markdown that shows text as it is, whatever stands in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#])")


def words(text: object) -> str:
    """A text that Markdown neither formats, nor links, nor takes for HTML; on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()).replace("&", "&amp;")).replace("\\<", "&lt;")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column holds words, the others figures."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (map(words, columns), rule, *(map(words, r) for r in rows))
    )
