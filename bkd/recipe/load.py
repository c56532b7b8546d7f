"""Find a recipe, parse it, apply overrides, validate: the one place where text becomes settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from yaml.constructor import ConstructorError

from bkd.data.remote import shown
from bkd.errors import RecipeError, suggest
from bkd.recipe.conflicts import conflicts
from bkd.recipe.explain import explain
from bkd.recipe.schema import FREE_KEYS, RANGES, Recipe, Train
from bkd.surgery.presets import PRESET_NAMES, is_unknown_name, split_list

REQUIRED = "???"
"""A value that the recipe leaves to the command line."""
YAML_1_1_ONLY = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """Plain data, with numbers and booleans as in YAML 1.2: `1e-4` is a number, and `no` is a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML declares it so
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in YAML_1_1_ONLY]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that comes twice: YAML would drop what the first one says."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConstructorError(None, None, f"the key '{key.value}' comes twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever the loader above would not read back as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def recipes_folder() -> Path:
    """The packaged recipes: inside an installed package, or beside it in a source tree."""
    package = Path(__file__).parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with bkd."""
    root = recipes_folder()
    found = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in found if not name.startswith("accelerate/"))  # those are for `accelerate launch`


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of a packaged recipe such as `shapes/sd-small`.

    Raises:
        RecipeError: If there is neither; names the nearest and all packaged ones.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise RecipeError("no such recipe file", where=path)
    packaged = recipes_folder() / f"{name}.yaml"
    if packaged.is_file():
        return packaged
    known = packaged_recipes()
    raise RecipeError(
        f"unknown recipe '{name}'{suggest(name, known)}", allowed=", ".join(known) + ", or the path of a .yaml file"
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with `key=value` overrides.

    Args:
        name: A path or a packaged name.
        overrides: Dotted keys, such as `train.lr=1e-4` or `stages.0.student.blocks=sd-tiny`.

    Raises:
        RecipeError: Listing every problem at once.
    """
    path = find_recipe(name)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError("not readable as YAML", where=f"recipe {name}", got=error) from error
    if raw is None:
        raise RecipeError(
            "is empty", where=f"recipe {name}", remedy=f"start from one of {', '.join(packaged_recipes())}"
        )
    if not isinstance(raw, dict):
        raise RecipeError("should be a mapping of keys", where=f"recipe {name}", got=type(raw).__name__)
    problems: list[str] = []
    for override in overrides:
        _apply(raw, override, problems)
    return parse_recipe(raw, source=f"recipe {name}", problems=problems)


def _raw_keys(node: Any) -> Iterator[Any]:
    """All keys of nested mappings and lists."""
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    yield from node if isinstance(node, dict) else ()
    for value in inner:
        yield from _raw_keys(value)


def parse_recipe(raw: Mapping[str, Any], *, source: str, problems: Sequence[str] = ()) -> Recipe:
    """Validate a recipe's content.

    Raises:
        RecipeError: Listing `problems` and every further one.
    """
    if odd := [key for key in _raw_keys(raw) if not isinstance(key, str)]:
        raise RecipeError("keys should be words", where=source, got=", ".join(map(repr, odd)))
    found = list(problems)
    recipe = None
    try:
        # Strict JSON: lists become tuples and whole numbers floats, but never a word a number.
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        found += [explain(dict(problem)) for problem in error.errors()]
    found += _required_problems(raw)
    found += _range_problems(raw)
    if recipe is not None:
        found += conflicts(recipe)
    if found or recipe is None:
        found = list(dict.fromkeys(found))
        count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise RecipeError("\n".join([count, *(f"  {line}" for line in found)]), where=source)
    return replace(recipe, stages=tuple(each for stage in recipe.stages for each in stage.expanded()))


def written_train(name: str) -> Train:
    """The `train` section as a recipe's file has it, before overrides; it must have been loaded once."""
    raw = yaml.load(find_recipe(name).read_text(encoding="utf-8"), Loader=_Loader).get("train", {})
    return TypeAdapter(Train).validate_json(json.dumps(raw), strict=True)


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML; loading it gives an equal recipe, but for tokens in addresses, which are left out."""
    return yaml.dump(_plain(recipe), Dumper=_Dumper, sort_keys=False)


def _plain(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(TypeAdapter(Recipe).dump_json(recipe))
    plain["data"]["shards"] = shown(recipe.data.shards)
    for stage, written in zip(recipe.stages, plain["stages"], strict=True):
        written["train"] = stage.train.given()
    return plain


def result_keys(recipe: Recipe) -> dict[str, Any]:
    """Flat `key: value` of everything that affects the trained weights."""
    flat = _flatten(_plain(recipe))
    return {key: value for key, value in flat.items() if not any(_inside(_unnumbered(key), k) for k in FREE_KEYS)}


def _unnumbered(key: str) -> str:
    """A key without positions in lists."""
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def _inside(key: str, parent: str) -> bool:
    return key == parent or key.startswith(parent + ".")


def _flatten(value: object, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = {str(i): item for i, item in enumerate(value)}.items()
    else:
        return {prefix: value}
    return {k: v for name, item in pairs for k, v in _flatten(item, f"{prefix}.{name}" if prefix else name).items()}


def _apply(raw: dict[str, Any], override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"{override}: an override is key=value, such as train.lr=1e-4")
        return
    *parents, last = key.split(".")
    node: Any = raw
    for name in parents:
        if isinstance(node, dict):
            node = node.setdefault(name, {})
        elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            there = f"; there are 0 to {len(node) - 1} in the recipe" if isinstance(node, list) and node else ""
            problems.append(f"{key}: there is no '{name}' to set a value in{there}")
            return
    value = _value(text)
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        problems.append(f"{key}: there is no such item")


def _value(text: str) -> Any:
    """An override's value: YAML where it is, and text as it stands where it is not, such as `{00000..00099}.tar`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _required_problems(raw: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: this recipe needs a value; add {key}=… to the command"
        for key, value in _flatten(raw).items()
        if value == REQUIRED
    ]


def _range_problems(raw: Mapping[str, Any]) -> list[str]:
    """Numbers out of range and unknown presets, found even where other keys are of the wrong type."""
    problems = []
    for key, value in _flatten(raw).items():
        name = _unnumbered(key)
        if name in RANGES and isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = RANGES[name]
            if not low <= value <= high:
                problems.append(f"{key}: should lie between {low:g} and {high:g} (got {value!r})")
        if name == "stages.student.blocks" and isinstance(value, str):
            for word in filter(is_unknown_name, split_list(value)):
                near = suggest(word, PRESET_NAMES)
                known = ", ".join(PRESET_NAMES)
                problems.append(f"{key}: unknown preset '{word}'{near} (allowed: {known}, or units of `bkd inspect`)")
    return problems
