"""Write docs/reference/recipe.md and docs/reference/commands.md from the code: dataclasses, docstrings and the app.

Usage: python tools/docs_reference.py. `tests/test_docs.py` holds that both pages are what this would write.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from bkd.cli.app import app
from bkd.recipe.explain import METHODS
from bkd.recipe.lora import Lora
from bkd.recipe.schema import FREE_KEYS, RANGES, Data, Recipe, Samples, Teacher, Train
from bkd.recipe.stages import Stage, StageTrain, Student

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
NOTE = "<!-- Written by tools/docs_reference.py from the code; edit that, or the docstrings. -->\n\n"
WORDS = {int: "whole number", float: "number", bool: "true, false", str: "text"}
SECTIONS: list[tuple[str, str, type]] = [
    ("Top", "", Recipe),
    ("teacher", "teacher", Teacher),
    ("data", "data", Data),
    ("train", "train", Train),
    ("stages", "stages", Stage),
    ("student of a stage", "stages.student", Student),
    *((f"method {name}", "stages.method", kind) for name, kind in METHODS.items()),
    ("lora of a stage", "stages.lora", Lora),
    ("train of a stage", "stages.train", StageTrain),
    ("samples", "samples", Samples),
]
RECIPE_INTRO = """# Recipe reference

A recipe is a YAML file that says only what differs from the defaults below; a packaged one is a good start
([recipes](../../recipes/shapes/sd-small.yaml)). Unknown keys, wrong types and values out of range are errors,
listed all at once, before anything loads. On the command line any key is changed by its path, with a stage's number
in it:

```sh
bkd train shapes/sd-small train.lr=1e-3 stages.0.method.loss.feature_kd=0.5 --dry-run
```

`--dry-run` prints the whole recipe as it was understood. Empty defaults mean "not given". Keys with a * may change
when a run is continued: they do not affect the trained weights. Numbers and booleans are those of YAML 1.2 (`1e-4`
is a number, `no` is a word). A value of `"???"` must be given on the command line.
"""
COMMANDS_INTRO = """# Command line reference

What `--help` says of each verb. A user's error ends with exit code 1 and says what, where, what was found, what is
allowed and what to do; a wrong option ends with 2; `bkd train` stopped on request, with everything saved, with 75.
"""


def recipe_page() -> str:
    """Every section of a recipe: key, values, default, meaning."""
    parts = [RECIPE_INTRO]
    for title, prefix, kind in SECTIONS:
        heading = f"`{title}`" if title == prefix else re.sub(r"^(\w+) (\w+)$", r"\1 `\2`", title)
        parts.append(f"## {heading}\n\n{_summary(kind)}\n\n{_table(kind, prefix)}")
    return NOTE + "\n".join(parts)


def described(kind: type) -> dict[str, str]:
    """What a dataclass' docstring says of each attribute, in one line."""
    text = inspect.getdoc(kind) or ""
    _, _, attributes = text.partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.M)
    return {name: " ".join(words.split()) for name, words in found}


def _summary(kind: type) -> str:
    text, _, _ = (inspect.getdoc(kind) or "").partition("Attributes:")
    return " ".join(text.split()) + _only(kind)


def _only(kind: type) -> str:
    name = getattr(kind, "name", None)
    return f" Written `method: {{name: {name}}}`." if isinstance(name, str) else ""


def _table(kind: type, prefix: str) -> str:
    rows = ["| key | values | default | meaning |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(_cell(part) for part in row)} |" for row in _rows(kind, prefix, "")]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Of a table; pages that help and docstrings name become links."""
    return re.sub(r"docs/(\w+)\.md", r"[\1](../\1.md)", text.replace("|", "\\|"))


def _rows(kind: type, prefix: str, inside: str) -> Iterator[tuple[str, str, str, str]]:
    """One for each key, those of nested settings with their path; sections of their own are left to them."""
    hints, meanings = typing.get_type_hints(kind), described(kind)
    for field in fields(kind):
        hint, key = hints[field.name], f"{prefix}.{field.name}".lstrip(".")
        if field.name == "name" and get_origin(hint) is Literal:
            continue
        if is_dataclass(hint) and "loss" in field.name:
            yield from _rows(hint, key, f"{inside}{field.name}.")
            continue
        free = "*" if any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS) else ""
        default = field.default if field.default is not MISSING else field.default_factory()
        yield f"`{inside}{field.name}`{free}", _values(hint, RANGES.get(key)), _default(default), meanings[field.name]


def _values(hint: Any, bounds: tuple[float, float] | None) -> str:
    words = _type_words(hint)
    if bounds and bounds[1] < 1e5:
        return f"{words}, {bounds[0]:g} to {bounds[1]:g}"
    return f"{words}, {bounds[0]:g} or more" if bounds else words


def _type_words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return "section"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_type_words(each) for each in inner if each is not type(None)))
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"[{', '.join(_type_words(each) for each in inner)}]"
    if origin is tuple:
        return "sections" if is_dataclass(inner[0]) else f"list of {_type_words(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping to {_type_words(inner[1])}"
    return "section" if is_dataclass(hint) else WORDS[hint]


def _default(value: Any) -> str:
    if (
        value is None
        or value == ""
        or is_dataclass(value)
        or (isinstance(value, tuple) and value and is_dataclass(value[0]))
    ):
        return ""
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def commands_page() -> str:
    """Every verb: what it does, its arguments and options."""
    return NOTE + "\n".join([COMMANDS_INTRO, *(_verb(path, command) for path, command in verbs())])


def verbs() -> Iterator[tuple[str, Any]]:
    """`("bkd data check", command)` and so on."""
    waiting = [("bkd", typer.main.get_command(app))]
    while waiting:
        path, command = waiting.pop(0)
        if hasattr(command, "commands"):
            waiting = [(f"{path} {name}", inner) for name, inner in command.commands.items()] + waiting
        else:
            yield path, command


def _verb(path: str, command: Any) -> str:
    named = [parameter for parameter in command.params if parameter.name != "help"]
    arguments = [_name(each) if each.required else f"[{_name(each)}]" for each in named if _bare(each)]
    usage = " ".join([path, *arguments, *["[OPTIONS]"][: len(named)]])
    rows = ["| | | default |", "|---|---|---|", *(_parameter_row(each) for each in named)] if named else []
    return (
        f"## {path}\n\n{' '.join(inspect.cleandoc(command.help or '').split())}\n\n    {usage}\n\n"
        + "\n".join(rows)
        + "\n"
    )


def _bare(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"


def _name(parameter: Any) -> str:
    if _bare(parameter):
        return str(parameter.metavar or parameter.name).upper()
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _parameter_row(parameter: Any) -> str:
    default = parameter.default
    shown = "" if default is None or default is False or callable(default) else f"`{default}`"
    shown = "on" if default is True else shown
    required = "needed" if parameter.required else ""
    return f"| `{_cell(_name(parameter))}` | {_cell(parameter.help or '')} | {shown or required} |"


PAGES = {"recipe.md": recipe_page, "commands.md": commands_page}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
