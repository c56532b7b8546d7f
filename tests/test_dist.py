"""The wheel and the source archive: whole, and working from any folder without the clone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bkd import __version__

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
from pathlib import Path
import bkd
from bkd.card.write import render_card
from bkd.recipe.load import load_recipe, packaged_recipes
from bkd.report.page import write_report
home = Path(bkd.__file__).parent
assert home.is_relative_to(sys.argv[1]), home
assert {"shapes/sd-small", "sd15/full-chain"} <= set(packaged_recipes())
assert load_recipe("shapes/sd-small").train.max_steps > 0
assert (home / "assets" / "shapes" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
assert list((home / "report" / "templates").glob("*.html")) and list((home / "card" / "templates").glob("*.md"))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both archives, made from the tree as it is: the wheel from the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """Where the wheel is, by itself; what it needs comes from the tests' environment."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([*command, *map(str, dist.glob("*.whl"))], check=True, capture_output=True)
    return site


def run(installed, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_archives_hold_what_they_should(dist):
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if not name.startswith(("bkd/", f"bkd-{__version__}.dist-info/"))]
    assert f"bkd-{__version__}.dist-info/licenses/LICENSE" in names
    with tarfile.open(source) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames()}
    assert tops == {
        "bkd",
        "recipes",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
    }


def test_the_wheel_works_without_the_clone(installed, tmp_path):
    done = run(installed, tmp_path, "-c", SCRIPT, str(installed))
    assert done.returncode == 0, done.stderr


def test_the_command_works_from_any_folder(installed, tmp_path):
    said = run(installed, tmp_path, "-m", "bkd", "--version")
    assert said.stdout == f"bkd {__version__}\n"
    pruned = run(installed, tmp_path, "-m", "bkd", "prune", "shapes", "--blocks", "sd-tiny", "--dry-run")
    assert pruned.returncode == 0 and "2,245,380" in pruned.stdout, pruned.stderr
    planned = run(installed, tmp_path, "-m", "bkd", "train", "shapes/sd-small", "--dry-run")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize(("typed", "offered"), [("bkd pu", "push"), ("bkd bench m", "memory")])
def test_shells_complete_verbs(installed, tmp_path, typed, offered):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    environment |= {"_BKD_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    script = "import sys; sys.argv[0] = 'bkd'; from bkd.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [offered]
