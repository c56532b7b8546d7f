"""How a student was trained, as a table: what one needs to know to believe it, or to do it again."""

from __future__ import annotations

from bkd.card.tables import Markdown, table
from bkd.recipe.schema import Recipe
from bkd.recipe.stages import Guided, Kd, Stage
from bkd.runs.measuring import WORLD

COLUMNS = ("stage", "steps", "images a step", "learning rate", "loss", "trained", "averaged")


def settings_table(recipe: Recipe) -> Markdown:
    """A line for each stage."""
    return table(COLUMNS, [_row(recipe, number) for number in range(len(recipe.stages))])


def _row(recipe: Recipe, number: int) -> tuple[str, ...]:
    stage, train = recipe.stages[number], recipe.train_of(number)
    precision = "" if train.mixed_precision == "no" else f", {train.mixed_precision}"
    return (
        stage.title,
        f"{train.max_steps:,}",
        f"{train.batch:,}",
        f"{train.lr:g}, {train.lr_schedule}",
        _loss(stage),
        (f"adapters of rank {stage.lora.r}" if stage.lora else "all weights") + precision,
        f"{train.ema:g}" if train.ema else "no",
    )


def _loss(stage: Stage) -> str:
    """The terms with their weights."""
    method = stage.method
    if isinstance(method, Kd):
        loss, features = method.loss, f"features ({method.sites})"
        terms = {"task": loss.task, "output": loss.output_kd, features: loss.feature_kd}
    elif isinstance(method, Guided):
        terms = {"guided output": method.loss.output_kd, f"features ({method.sites})": method.loss.feature_kd}
    else:
        return "diffusion" if method.name == "finetune" else "max(SNR, 1) on the clean latents"
    return " + ".join(f"{weight:g} {name}" for name, weight in terms.items() if weight)


def data_sentence(recipe: Recipe, num_samples: int | None, said: str | None) -> str:
    """What it was trained on.

    Args:
        recipe: As trained.
        num_samples: Of the data set.
        said: By the author, of the data.
    """
    counted = f"{num_samples:,} image-caption pairs" if num_samples else "image-caption pairs"
    if recipe.data.shards in WORLD:
        counted += " of the embedded world: procedurally drawn shapes"
    filters = ", ".join(f"{field} {rule}" for field, rule in recipe.data.filters.items())
    return f"Trained on {counted}{f', kept where {filters}' if filters else ''}{f': {said}' if said else ''}."
