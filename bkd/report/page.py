"""One self-contained HTML page for one run or several; what it shows is data, and none of it can run."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bkd.errors import OutputError
from bkd.eval.shown import NONE
from bkd.files import require_writable, write_atomically
from bkd.report.comparison import compare
from bkd.report.curves import asked, chart_svg
from bkd.report.embedded import Embedded
from bkd.report.gallery import MAX_FRAMES
from bkd.report.run_view import read_files, view_run

SUFFIXES = (".html", ".htm")


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the page.

    Args:
        runs: Run folders; unfinished ones show what they have so far.
        output: The HTML file, replaced when it exists, or a folder for `report.html`.

    Raises:
        BkdError: If a folder is not a run, a file in it is damaged, or the page cannot be written there.
    """
    if output.is_dir():
        output = output / "report.html"
    if output.suffix.lower() not in SUFFIXES:
        raise OutputError(
            "the page is an .html file", where=output, got=output.suffix, allowed=".html", remedy="choose another -o"
        )
    require_writable(output.parent)
    write_atomically(output, render(runs))
    return output


def render(runs: Sequence[Path]) -> str:
    """The page's text.

    Args:
        runs: As for `write_report`.
    """
    if len({path.resolve() for path in runs}) < len(runs):
        raise OutputError("the same run is named twice", got=", ".join(map(str, runs)), remedy="name each run once")
    frames = max(2, MAX_FRAMES // len(runs))
    found = [read_files(path, label, frames) for path, label in zip(runs, _labels(runs), strict=True)]
    embedded = Embedded(sum(files.num_pictures for files in found))
    views = [view_run(files, embedded) for files in found]
    comparison = compare(views, embedded) if len(views) > 1 else None
    environment = Environment(
        loader=PackageLoader("bkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"chart_svg": chart_svg, "asked": asked}
    style, script = _inline("page.css"), _inline("page.js")
    return environment.get_template("report.html").render(
        runs=views,
        comparison=comparison,
        embedded=embedded,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        nothing=NONE,
    )


def _labels(runs: Sequence[Path]) -> list[str]:
    """The name of each folder, or all of its path where two have the same."""
    names = [path.resolve().name for path in runs]
    count = Counter(names)
    return [name if count[name] == 1 else str(path) for name, path in zip(names, runs, strict=True)]


def _inline(name: str) -> Markup:
    """A file of ours, for a block of its own in the page."""
    return Markup((resources.files("bkd.report") / "templates" / name).read_text(encoding="utf-8"))


def _hash(block: str) -> str:
    """As Content-Security-Policy names an inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
