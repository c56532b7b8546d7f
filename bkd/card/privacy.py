"""What of a run others may read: names, but no folders of the machine it ran on, and no signed addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bkd.data.remote import shown
from bkd.data.shapes import EMBEDDED
from bkd.models.locate import HUB_ID
from bkd.recipe.schema import Recipe
from bkd.recipe.stages import Stage


def place_name(place: str) -> str:
    """Of a folder or file its own name alone, of a run's student that of the run; of an address what may be shown."""
    if "://" in place:
        return shown(place)
    path = Path(place)
    return (path.parent if path.name == "student" else path).name


def model_name(name: str, *, from_hub: bool | None = None) -> str:
    """A model as others may know it.

    Args:
        name: As given: `shapes`, a folder, a file, or a Hub id.
        from_hub: Whether it came from the Hub; where that is not known, what looks like an id is taken for one.
    """
    looks = bool(HUB_ID.fullmatch(name)) and not name.startswith(("~", ".")) and not Path(name).exists()
    return name if name == EMBEDDED or (looks if from_hub is None else from_hub) else place_name(name)


def public_recipe(recipe: Recipe, *, from_hub: bool) -> Recipe:
    """The same training, told without places.

    Args:
        recipe: As trained.
        from_hub: Whether the teacher came from the Hub.
    """
    config = recipe.teacher.config and model_name(recipe.teacher.config)
    return replace(
        recipe,
        teacher=replace(recipe.teacher, id=model_name(recipe.teacher.id, from_hub=from_hub), config=config),
        data=replace(recipe.data, shards=place_name(recipe.data.shards), cache_dir=None),
        stages=tuple(map(_public_stage, recipe.stages)),
    )


def _public_stage(stage: Stage) -> Stage:
    path = stage.student.path
    return stage if path is None else replace(stage, student=replace(stage.student, path=model_name(path)))


def public_plan(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A plan file's facts, and those of the plans before it."""
    public = dict(facts)
    if isinstance(teacher := public.get("teacher"), str) and not teacher.startswith("stages/"):
        public["teacher"] = model_name(teacher)
    if isinstance(before := public.get("teacher_plan"), Mapping):
        public["teacher_plan"] = public_plan(before)
    return public
