"""The model card: true to its run, safe to read, under a licence somebody stated; and the way to the Hub and back."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from bkd.card.license import License, carried_over
from bkd.card.privacy import public_name, public_plan, public_recipe
from bkd.card.tables import table, words
from bkd.cli.app import app
from bkd.errors import HubError
from bkd.model_folder import model_digest
from bkd.recipe.load import load_recipe
from tests.hub_server import hub  # noqa: F401 - a fixture

OPENRAIL = License("creativeml-openrail-m")
PROMPT = "a large red square at the top left on a white background"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards, cache):
    """A short run with figures, and shards in a folder whose name is nobody's business."""
    place = tmp_path_factory.mktemp("secret-project")
    shutil.copytree(shards[0].parent, place / "shards")
    run = place / "small-run"
    data = f"data.shards={place / 'shards'}"
    steps = ["train.batch=4", "train.max_steps=2", "train.log_every=1"]
    drawing = ["--num-prompts", "12", "--num-inference-steps", "2"]
    app(["train", "shapes/sd-tiny", data, *steps, "-o", str(run)], standalone_mode=False)
    app(["eval", str(run), *drawing], standalone_mode=False)
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "small-run")


def head_of(card):
    return yaml.safe_load(card.read_text().split("---\n")[1])


def test_a_card_says_what_the_run_is(bkd, run):
    code, said = bkd("card", run)
    assert code == 0, said
    text, head = (run / "README.md").read_text(), head_of(run / "README.md")
    assert head["license"] == "apache-2.0" and "carried over from shapes" in text
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-image" and "pruned" in head["tags"]
    assert head["bkd_student_sha256"] == model_digest(run / "student")
    measured = json.loads((run / "eval" / "shapes.json").read_text())["models"][-1]["splits"]["test"]["accuracy"]
    figures = head["model-index"][0]["results"][0]
    assert figures["metrics"][0]["value"] == measured["successes"] / measured["total"]
    assert figures["dataset"]["args"] == {"num_prompts": 12, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 0}
    assert "| UNet parameters | 5,523,876 | 2,245,380 | -59.4% |" in text
    assert "59.4% fewer UNet parameters" in text and "1 task + 1 output + 0.1 features (block)" in text
    assert "down.0.1" in text and "bkd remap" in text and "eprint = {2305.15798}" in text
    assert "Not measured." in text and "speed is not measured: bkd bench speed" in said
    for name in re.findall(r"\]\((card/[^)]+)\)", text):
        assert (run / name).is_file(), name
    assert Image.open(run / "card" / "removed.png").width == 1600


def test_a_card_says_nothing_of_this_machine(bkd, run):
    bkd("card", run)
    told = [run / "README.md", *(run / "card").glob("*.yaml"), *(run / "card").glob("*.json")]
    assert len(told) == 3
    for path in told:
        assert "secret-project" not in path.read_text() and str(run.parent) not in path.read_text(), path.name


def test_the_speed_of_a_run_is_in_its_card(bkd, run):
    code, said = bkd(
        "bench",
        "speed",
        run,
        "--part",
        "unet",
        "--batch",
        1,
        "--rounds",
        2,
        "--no-memory",
        "-o",
        run / "eval" / "speed",
    )
    assert code == 0, said
    assert "speed is not measured" not in bkd("card", run)[1]
    text = (run / "README.md").read_text()
    assert "; 2 rounds in turns: median seconds" in text
    assert re.search(r"\| small-run: unet, batch 1[^|]*\| [\d.e-]+ \| [\d.]+ \| . \|", text)


def test_a_card_is_not_written_over(bkd, run):
    (run / "README.md").write_text("mine")
    code, said = bkd("card", run)
    assert code == 1 and "there is a model card already" in said and (run / "README.md").read_text() == "mine"
    assert bkd("card", run, "--overwrite")[0] == 0


def test_figures_of_other_weights_are_refused(bkd, run):
    facts = json.loads((run / "eval" / "shapes.json").read_text())
    facts["digests"]["small-run"] = "0" * 64
    (run / "eval" / "shapes.json").write_text(json.dumps(facts))
    code, said = bkd("card", run)
    assert code == 1 and "these figures are of other weights" in said and "bkd eval" in said
    assert not (run / "README.md").exists()


def test_a_licence_is_asked_for_and_never_guessed(bkd, run, teacher_folder, tmp_path):
    silent = shutil.copytree(teacher_folder, tmp_path / "silent", ignore=shutil.ignore_patterns("README.md"))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("id: shapes", f"id: {silent}"))
    code, said = bkd("card", run)
    assert code == 1 and "no licence is known" in said and "--license ID" in said
    code, said = bkd("card", run, "--license", "creativeml-openrail-m")
    assert code == 0 and "--base-model OWNER/NAME" in said
    text = (run / "README.md").read_text()
    assert "restricts what the model may be used for" in text and "attachment A" in text
    (silent / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    code, said = bkd("card", run, "--license", "mit", "--overwrite")
    assert code == 1 and "the teacher's licence goes along" in said
    code, said = bkd("card", run, "--base-model", "ada/teacher", "--data", "ada/pictures", "--overwrite")
    head = head_of(run / "README.md")
    assert code == 0 and head["license"] == "creativeml-openrail-m"
    assert head["base_model"] == "ada/teacher" and head["datasets"] == ["ada/pictures"]


def test_a_licence_of_another_name_says_where_to_read_it():
    with pytest.raises(HubError, match="needs its name and where to read it"):
        carried_over(None, License("other"), "teacher")
    named = License("other", "Fair AI", "https://example.org/license")
    assert carried_over(None, named, "teacher") == named and str(named) == "Fair AI (https://example.org/license)"
    assert carried_over(OPENRAIL, None, "teacher") == OPENRAIL
    assert carried_over(License("mit"), License("apache-2.0"), "teacher").id == "apache-2.0"


def test_text_stays_text():
    evil = "<script>alert(1)</script> [x](javascript:y) `a` | *b*\n# c"
    escaped = words(evil)
    assert "<" not in escaped and "\n" not in escaped
    assert all(escaped[found.start() - 1] == "\\" for found in re.finditer(r"[\[\]`|*#]", escaped))
    assert table(("a", "b"), [("x|y", "1")]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_places_stay_unknown(tmp_path):
    assert public_name("owner/name") == "owner/name" and public_name("shapes") == "shapes"
    assert public_name("/home/ada/models/sd15") == "sd15" and public_name("~/x/run/student") == "run"
    assert public_name("https://ada:pass@host/a.tar?sig=1") == "https://host/a.tar"
    recipe = load_recipe("shapes/sd-tiny", ["data.shards=/home/ada/{00..09}.tar", "data.cache_dir=/home/ada/c"])
    assert "/home/ada" not in str(public_recipe(recipe))
    plan = {"teacher": "/a/b", "teacher_plan": {"teacher": "../c/d"}}
    assert public_plan(plan) == {"teacher": "b", "teacher_plan": {"teacher": "d"}}


def test_from_run_to_hub_to_picture(run, hub, tmp_path):  # noqa: F811
    """As its author types it, and as somebody else loads it: the card's own example, where `bkd` cannot be imported."""
    keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "HOME") if name in os.environ}
    author = {**keep, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_write_SECRET", "HF_HUB_DISABLE_XET": "1"}
    author |= {"HF_HOME": str(tmp_path / "author"), "PYTHONPATH": str(Path.cwd())}

    def author_types(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "bkd", *map(str, arguments)], capture_output=True, text=True, env=author, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = author_types("card", run) + author_types("push", run, "--repo", "ada/small")
    files = hub.repos["model"]["ada/small"].files()
    card = files["README.md"].decode()
    example = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert 'from_pretrained("ada/small")' in example and PROMPT in example
    reader = {**keep, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "reader")}
    script = 'import sys; sys.modules["bkd"] = None\n' + example
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=reader, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Image.open(tmp_path / "image.png").size == (32, 32)
    hub.requests.clear()
    said += author_types("push", run, "--repo", "ada/small")
    assert "0 files sent" in said and not hub.uploads()
    written = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hf_write_SECRET" in path.read_bytes()] and "SECRET" not in said
    assert {"card/samples.png", "card/recipe.yaml", "card/shapes.json"} <= files.keys()


def test_a_run_that_trains_is_not_pushed(bkd, run):
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    for command in (["push", run, "--repo", "ada/small", "--dry-run"], ["card", run]):
        code, said = bkd(*command)
        assert code == 1 and "this run is not finished" in said
