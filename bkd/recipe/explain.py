"""What pydantic finds wrong with a recipe, in the words of its user."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from bkd.errors import suggest
from bkd.recipe.schema import Recipe
from bkd.recipe.stages import Finetune, Guided, Halving, Kd

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "union_tag_not_found": "a mapping of keys",
}
METHODS = {kind.name: kind for kind in (Kd, Guided, Halving, Finetune)}
SCALE = "guidance_scale"
STEPS = "num_inference_steps"


def explain(problem: Mapping[str, Any]) -> str:
    """One line on one of pydantic's errors: the key, what is wrong, what should be there, and what is.

    Args:
        problem: Of `ValidationError.errors()`.
    """
    location = _location(problem["loc"])
    key, kind, got = ".".join(location), problem["type"], problem["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key{_instead_of(location, _method_of(problem['loc']))} (got {got!r})"
    if kind == "union_tag_invalid":
        allowed, tag = problem["ctx"]["expected_tags"], problem["ctx"]["tag"]
        return f"{key}.name: should be {allowed}{suggest(tag, METHODS)} (got {tag!r})"
    if location[-1] == SCALE:
        return f"{key}: should be a number, or a range of two: [low, high] (got {got!r})"
    if kind == "literal_error":
        allowed = problem["ctx"]["expected"]
        return f"{key}: should be {allowed} (got {got!r})"
    if kind == "missing":  # an item of a list: no key has to be there
        return f"{'.'.join(location[:-1])}: too few items{_wanted(location[-2])} (got {got!r})"
    if kind == "too_long":
        return f"{key}: should have {problem['ctx']['max_length']} items{_wanted(location[-1])} (got {got!r})"
    return f"{key}: should be {EXPECTED.get(kind, problem['msg'])} (got {got!r})"


def _wanted(key: str) -> str:
    return ": [N, M], from N steps to M" if key == STEPS else ""


def _location(parts: Sequence[Any]) -> list[str]:
    """The key's path, without the names that pydantic gives to alternatives: a method's, and the types of a scale."""
    location = [str(part) for part in parts]
    if "method" in location[:-1]:
        location.pop(location.index("method") + 1)
    if SCALE in location and "method" in location:
        location = location[: location.index(SCALE) + 1]
    return location


def _method_of(parts: Sequence[Any]) -> str | None:
    """Name of the method whose key it is."""
    return str(parts[parts.index("method") + 1]) if "method" in parts[:-1] else None


def _instead_of(location: Sequence[str], method: str | None) -> str:
    """What an unknown key was meant to be: one of its name elsewhere, or a similar one in its place."""
    *parents, word = location
    if "." in word:
        return "; in a file, keys are nested: " + word.replace(".", ": {") + ": …" + "}" * word.count(".")
    stage = next((part for part in parents if part.isdigit()), "0")
    keys = [key.replace(".0.", f".{stage}.").rpartition(".") for key in _all_keys(Recipe)]
    elsewhere = [f"{place}.{name}" for place, _, name in keys if name == word]
    if ".".join(location) in elsewhere:
        key = ".".join(location[location.index("method") + 1 :])
        owners = [name for name, kind in METHODS.items() if key in _all_keys(kind)]
        return f" of method '{method}'; it belongs to {', '.join(owners)}"
    if elsewhere and parents[-1:] == ["train"] and len(parents) > 1:
        return f"; all stages have it in common: '{elsewhere[0]}'"
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    here = ".".join(parents)
    known = [name for place, _, name in keys if place == here]
    near = suggest(word, known)
    return near.replace("mean '", f"mean '{here}." if here else "mean '") or "; known here: " + ", ".join(known)


def _all_keys(settings: Any, prefix: str = "") -> list[str]:
    """Dotted names of every section and setting, with `.0` for the number of a stage."""
    hints, keys = typing.get_type_hints(settings), []
    for field in dataclasses.fields(settings):
        key, hint = prefix + field.name, hints[field.name]
        if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            key, hint = f"{key}.0", typing.get_args(hint)[0]
        keys.append(key.removesuffix(".0"))
        for section in (hint, *typing.get_args(hint)):  # alternatives, such as methods
            if dataclasses.is_dataclass(section):
                keys += _all_keys(section, f"{key}.")
    return list(dict.fromkeys(keys))
