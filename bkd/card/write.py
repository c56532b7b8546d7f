"""Write a run's model card, and the files that it shows, into its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from bkd.card.citations import citations
from bkd.card.figures import cost_table, speed_table, summary
from bkd.card.files import CARD_FILE, CARD_FOLDER, SHOWN
from bkd.card.license import RESTRICTIONS
from bkd.card.metadata import metadata
from bkd.card.privacy import public_recipe
from bkd.card.subject import Subject
from bkd.card.tables import Markdown, shown, table
from bkd.card.training import data_sentence, settings_table
from bkd.card.usage import usage
from bkd.errors import OutputError
from bkd.eval.sheet import read_sheet
from bkd.export.other_tools import verdicts
from bkd.files import write_atomically
from bkd.models.folder import read_json, scheduler_config, unet_config
from bkd.models.original_layout import unexpressible
from bkd.models.student_folder import unfinished_folder
from bkd.recipe.load import dump_recipe
from bkd.report.measurements import measurements
from bkd.runs.folder import seconds_key


def write_card(subject: Subject, *, overwrite: bool = False) -> Path:
    """Write the card, after the files that it shows.

    Args:
        subject: What it is written from.
        overwrite: Replace an earlier card.

    Returns:
        The file.

    Raises:
        OutputError: If a card is there, or the folder of what it shows holds something else.
    """
    card, folder = subject.run.path / CARD_FILE, subject.run.path / CARD_FOLDER
    if card.exists() and not overwrite:
        raise OutputError("there is a model card already", where=card, remedy="edit it, or add --overwrite")
    if foreign := [path.name for path in folder.glob("*") if path.name not in SHOWN]:
        raise OutputError(
            "the folder for what the card shows holds something else",
            where=folder,
            got=", ".join(sorted(foreign)),
            allowed=", ".join(SHOWN),
            remedy="move that away",
        )
    text = render_card(subject)
    with unfinished_folder(folder) as unfinished:
        for name, content in _files(subject):
            (unfinished / name).write_bytes(content)
    write_atomically(card, text)
    return card


def render_card(subject: Subject) -> str:
    """The card's text; everything in it is shown as it is, but what is Markdown already."""
    recipe, facts = subject.recipe, subject.run.facts()
    use = usage(subject.student, recipe.samples)
    environment = Environment(
        loader=PackageLoader("bkd.card"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        finalize=shown,
    )
    environment.filters |= {"markdown": Markdown, "table": lambda found: table(found.columns, found.rows)}
    return environment.get_template("card.md").render(
        head=Markdown(metadata(subject)),
        subject=subject,
        facts=facts,
        rows=_rows(subject),
        folder=CARD_FOLDER,
        use=use,
        code=Markdown(use.code or ""),
        summary=summary(subject.built),
        costs=cost_table(subject.built, recipe.origin),
        speed=speed_table(subject.speed) if subject.speed else None,
        measurements=measurements(subject.evaluations),
        data=data_sentence(recipe, facts.get("num_samples"), subject.said.data),
        seconds=sum(facts.get(seconds_key(number), 0.0) for number in range(len(recipe.stages))),
        settings=settings_table(public_recipe(recipe, from_hub=subject.from_hub)),
        tools=_other_tools(subject),
        restrictions=RESTRICTIONS.get(subject.license.id, ()),
        citations=citations(recipe),
    )


def _files(subject: Subject) -> Iterator[tuple[str, bytes]]:
    """What the card shows or speaks of."""
    if subject.picture is not None:
        yield "samples.png", subject.picture.read_bytes()
    if subject.built.drawing is not None and subject.built.removed:
        yield "removed.png", subject.built.drawing.png()
    for path in (*subject.run.evaluations, *([subject.run.speed_file] if subject.speed else [])):
        yield path.name, (json.dumps(read_json(path), indent=1) + "\n").encode()
    yield "recipe.yaml", dump_recipe(public_recipe(subject.recipe, from_hub=subject.from_hub)).encode()


def _other_tools(subject: Subject) -> list[str]:
    """What tools besides diffusers do with the student as a single file."""
    config = unet_config(subject.student)
    if reasons := list(unexpressible(config)):
        return [f"There is no single file of it for other tools: {reasons[0]}."]
    predicts = scheduler_config(subject.student).get("prediction_type", "epsilon")
    return [f"As a single file (`bkd export --format single-file`), {each}." for each in verdicts(config, predicts)]


def _rows(subject: Subject) -> str:
    """The models of the picture's rows, from above; empty where it does not say."""
    sheet = read_sheet(subject.picture) if subject.picture else None
    return ", ".join([*sheet.models[:-1], "this model"]) if sheet else ""
