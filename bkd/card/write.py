"""Write a run's model card, and the files that it shows, into its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from bkd.card.citations import citations
from bkd.card.figures import cost_table, speed_table, summary
from bkd.card.files import CARD_FILE, CARD_FOLDER, REPO_PLACEHOLDER
from bkd.card.metadata import metadata
from bkd.card.privacy import public_name, public_recipe
from bkd.card.subject import Subject
from bkd.card.tables import table, words
from bkd.card.training import data_sentence, settings_table
from bkd.card.usage import usage
from bkd.errors import OutputError
from bkd.files import replace_file, write_atomically
from bkd.model_folder import read_json, scheduler_config, unet_config
from bkd.original_layout import unexpressible
from bkd.other_tools import verdicts
from bkd.recipe.load import dump_recipe
from bkd.report.measurements import measurements


def write_card(subject: Subject, *, overwrite: bool = False) -> Path:
    """Write the card, last of all: it never speaks of a file that is missing.

    Args:
        subject: What it is written from.
        overwrite: Replace an earlier card.

    Returns:
        The file.

    Raises:
        OutputError: If a card is there.
    """
    card, folder = subject.run.path / CARD_FILE, subject.run.path / CARD_FOLDER
    if card.exists() and not overwrite:
        raise OutputError("there is a model card already", where=card, remedy="edit it, or add --overwrite")
    text = render_card(subject)
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in _pictures(subject):
        with replace_file(folder / name) as stream:
            stream.write(content)
    for path in (*subject.run.evaluations, *([subject.run.speed_file] if subject.speed else [])):
        write_atomically(folder / path.name, json.dumps(read_json(path), indent=1) + "\n")
    write_atomically(folder / "recipe.yaml", dump_recipe(public_recipe(subject.recipe)))
    write_atomically(card, text)
    return card


def render_card(subject: Subject) -> str:
    """The card's text."""
    facts, recipe = subject.run.facts(), subject.recipe
    environment = Environment(
        loader=PackageLoader("bkd.card"), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    environment.filters |= {"words": words, "table": lambda found: table(found.columns, found.rows)}
    return environment.get_template("card.md").render(
        head=metadata(subject),
        subject=subject,
        teacher=subject.base_model or public_name(recipe.teacher.id),
        rows=_rows(subject),
        folder=CARD_FOLDER,
        repo=REPO_PLACEHOLDER,
        use=usage(subject.student, recipe.samples),
        summary=summary(subject.built),
        costs=cost_table(subject.built),
        speed=speed_table(subject.speed) if subject.speed else None,
        measurements=measurements(subject.evaluations),
        data=data_sentence(recipe, facts.get("num_samples"), subject.said.data),
        device=facts.get("device", "device unknown"),
        seconds=sum(value for key, value in facts.items() if key.startswith("stage_") and key.endswith("_seconds")),
        settings=settings_table(public_recipe(recipe)),
        versions={"bkd": facts["bkd"], **facts["versions"]},
        teacher_digest=facts.get("teacher_digest", "unknown"),
        tools=_other_tools(subject),
        citations=citations(recipe),
    )


def _pictures(subject: Subject) -> Iterator[tuple[str, bytes]]:
    if subject.picture is not None:
        yield "samples.png", subject.picture.read_bytes()
    if subject.built.drawing is not None and subject.built.removed:
        yield "removed.png", subject.built.drawing.png()


def _other_tools(subject: Subject) -> list[str]:
    """What tools besides diffusers do with the student as a single file."""
    config = unet_config(subject.student)
    if reasons := list(unexpressible(config)):
        return [f"No other tools: a single file in the original layout cannot express it, for {reasons[0]}."]
    predicts = scheduler_config(subject.student).get("prediction_type", "epsilon")
    return [f"As a single file (`bkd export --format single-file`), {each}." for each in verdicts(config, predicts)]


def _rows(subject: Subject) -> str:
    """What the picture shows, from above."""
    if not subject.evaluations:
        return "teacher, this model"
    names = [model["name"] for model in subject.evaluations[0]["models"]]
    return ", ".join([*names[:-1], "this model"])
