"""What of a run others may read: names, but no folders of the machine it ran on, and no signed addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bkd.data.remote import shown
from bkd.recipe.schema import Recipe
from bkd.recipe.stages import Stage


def public_name(name: str) -> str:
    """A Hub id, an address or the embedded model as it is called; of a folder or file its own name alone."""
    if "://" in name:
        return shown(name)
    path = Path(name)
    is_place = path.is_absolute() or name.startswith(("~", ".")) or name.count("/") > 1 or path.exists()
    return (path.parent if path.name == "student" else path).name if is_place else name


def public_recipe(recipe: Recipe) -> Recipe:
    """The same training, told without places."""
    config = recipe.teacher.config and public_name(recipe.teacher.config)
    return replace(
        recipe,
        teacher=replace(recipe.teacher, id=public_name(recipe.teacher.id), config=config),
        data=replace(recipe.data, shards=public_name(recipe.data.shards), cache_dir=None),
        stages=tuple(map(_public_stage, recipe.stages)),
    )


def _public_stage(stage: Stage) -> Stage:
    path = stage.student.path
    return stage if path is None else replace(stage, student=replace(stage.student, path=public_name(path)))


def public_plan(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A plan file's facts, and those of the plans before it."""
    public = dict(facts)
    if isinstance(teacher := public.get("teacher"), str) and not teacher.startswith("stages/"):
        public["teacher"] = public_name(teacher)
    if isinstance(before := public.get("teacher_plan"), Mapping):
        public["teacher_plan"] = public_plan(before)
    return public
