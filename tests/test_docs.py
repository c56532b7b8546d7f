"""Documentation that stays true: commands parse, links and anchors lead somewhere, recipes load, messages exist."""

import ast
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer
import yaml

from bkd.cli.app import app
from bkd.recipe.explain import _all_keys
from bkd.recipe.load import load_recipe, packaged_recipes
from bkd.recipe.schema import Recipe
from tools.docs_reference import FOLDER, PAGES, verbs

ROOT = Path(__file__).parent.parent
GUIDES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent != FOLDER),
    ROOT / "bkd/assets/shapes/README.md",
]
EVERY_PAGE = [*GUIDES, *sorted(FOLDER.glob("*.md")), ROOT / "CHANGELOG.md"]
HOSTS = {
    "arxiv.org",
    "github.com",
    "huggingface.co",
    "laion.ai",
    "download.pytorch.org",
    "keepachangelog.com",
    "semver.org",
}


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def commands(page):
    return [line.split("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]


BKD = sorted({c for page in EVERY_PAGE for c in commands(page) if c.startswith("bkd ")})
BKD += sorted(
    re.search(r"#\s+(?:Run:)?\s+(bkd .*)", line)[1]
    for name in packaged_recipes()
    for line in (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()
    if re.match(r"#\s+(Run:)?\s+bkd ", line)
)
MAKE = sorted({c for page in EVERY_PAGE for c in commands(page) if c.startswith("make ")})
YAML = [(page, block) for page in EVERY_PAGE for block in blocks(page, "yaml")]


@pytest.mark.parametrize("command", BKD)
def test_commands_parse(command):
    found, arguments = typer.main.get_command(app), shlex.split(command)[1:]
    while hasattr(found, "commands"):  # `bkd data` has verbs of its own
        verb, *arguments = arguments
        found = found.commands[verb]
    found.make_context(verb, arguments, resilient_parsing=False)


def test_wrong_commands_would_be_noticed():
    group = typer.main.get_command(app)
    with pytest.raises(Exception, match="No such option"):
        group.commands["train"].make_context("train", ["--no-such-option"])


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command):
    target = shlex.split(command)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("verb", [path for path, _ in verbs()])
def test_every_verb_is_in_a_guide(verb):
    assert any(re.search(rf"\b{verb}\b", page.read_text()) for page in GUIDES[1:])


def anchors(page):
    """Of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named(EVERY_PAGE)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            aim = page.parent / path if path else page
            assert aim.exists(), target
            assert not anchor or anchor in anchors(aim), target


@named(EVERY_PAGE)
def test_links_go_to_known_hosts(page):
    assert set(re.findall(r"https?://([\w.-]+\w)", page.read_text())) <= HOSTS


def test_every_asset_has_its_origin_stated():
    stated = re.findall(r"`([\w./*-]+)`", (ROOT / "docs" / "origins.md").read_text())
    patterns = [*stated, *(f"docs/images/{name}" for name in stated)]
    for kind in ("png", "svg", "csv", "safetensors", "json"):
        for asset in (*(ROOT / "docs").rglob(f"*.{kind}"), *(ROOT / "bkd").rglob(f"*.{kind}")):
            name = asset.relative_to(ROOT).as_posix()
            assert any(fnmatch(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns), name


@named(EVERY_PAGE)
def test_python_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize(("page", "block"), YAML, ids=[f"{page.stem}-{n}" for n, (page, _) in enumerate(YAML)])
def test_recipes_load(page, block, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block)
    load_recipe(str(recipe))


@pytest.mark.parametrize("name", PAGES)
def test_reference_is_current(name):
    assert (FOLDER / name).read_text() == PAGES[name](), "run: python tools/docs_reference.py"


def test_every_recipe_key_is_in_the_reference():
    text = PAGES["recipe.md"]()
    for key in _all_keys(Recipe):
        last = key.removeprefix("stages.0.").rpartition(".")[2]
        assert re.search(rf"`(loss\.)?{last}`", text) or last in ("loss", "name"), key


def messages():
    """What docs/troubleshooting.md quotes: the code in the first column of its tables."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def spoken():
    """Every text in the code but docstrings, with a mark where a value goes, and the Makefile."""
    found = []
    for path in (ROOT / "bkd").rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join([*found, (ROOT / "Makefile").read_text()])


def test_quoted_messages_are_what_the_code_says():
    others = ("ModuleNotFoundError", "'fcntl'", "bkd ")  # Python's own; commands
    text, quoted = spoken(), [message for message in messages() if not message.startswith(others)]
    assert len(quoted) > 60
    for message in quoted:
        for part in re.split(r"…|s3", message):
            assert part.strip(" ;'") in text, message


@named([ROOT / "docs/benchmarks.md"])
def test_figures_name_their_command(page):
    for section in re.split(r"^## ", page.read_text(), flags=re.M)[1:]:
        assert "|---" not in section or re.search(r"^    (bkd|python) |`(bkd|make) ", section, re.M), section[:40]


def test_the_site_has_every_page():
    class Loader(yaml.SafeLoader):
        """mkdocs.yml names a function of Python, which is of no interest here."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    listed = set(re.findall(r"[\w/-]+\.md", str(settings["nav"])))
    there = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert listed == there | {"changelog.md"}
