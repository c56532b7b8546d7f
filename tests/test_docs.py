"""Documentation that stays true: every command parses, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from bkd.cli.app import app
from bkd.recipe.load import packaged_recipes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bkd/assets/shapes/README.md"]


def commands(text):
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        yield from (line.split("#")[0].strip() for line in block.splitlines())


BKD = sorted({c for page in PAGES for c in commands(page.read_text()) if c.startswith("bkd ")})
BKD += sorted(
    re.search(r"#\s+(?:Run:)?\s+(bkd .*)", line)[1]
    for name in packaged_recipes()
    for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()
    if re.match(r"#\s+(Run:)?\s+bkd ", line)
)
MAKE = sorted({c for page in PAGES for c in commands(page.read_text()) if c.startswith("make ")})


@pytest.mark.parametrize("command", BKD)
def test_commands_parse(command):
    found, arguments = typer.main.get_command(app), shlex.split(command)[1:]
    while hasattr(found, "commands"):  # `bkd data` has verbs of its own
        verb, *arguments = arguments
        found = found.commands[verb]
    found.make_context(verb, arguments, resilient_parsing=False)


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command):
    target = shlex.split(command)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_wrong_commands_would_be_noticed():
    group = typer.main.get_command(app)
    with pytest.raises(Exception, match="No such option"):
        group.commands["train"].make_context("train", ["--no-such-option"])
