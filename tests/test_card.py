"""The model card: true to its run, safe to read, under a licence somebody stated; and the way to the Hub and back."""

import ast
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
from bkd.card.privacy import model_name, place_name, public_plan, public_recipe
from bkd.card.tables import table, words
from bkd.card.usage import usage
from bkd.cli.app import app
from bkd.errors import HubError
from bkd.models.folder import model_digest
from bkd.recipe.load import load_recipe
from bkd.recipe.schema import Samples
from tests.hub_server import hub  # noqa: F401 - a fixture
from tests.test_run_lock import US, leave

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
    assert "; 2 rounds in turns" in text
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
    assert "to exploit or harm minors" in text and "CompVis/stable-diffusion-license" in text
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
    with pytest.raises(HubError, match="goes along"):
        carried_over(License("cc-by-nc-4.0"), License("mit"), "teacher")


def test_text_stays_text():
    evil = "<script>alert(1)</script> [x](javascript:y) `a` | *b*\n# c"
    escaped = words(evil)
    assert "<" not in escaped and "\n" not in escaped
    assert all(escaped[found.start() - 1] == "\\" for found in re.finditer(r"[\[\]`|*#]", escaped))
    assert table(("a", "b"), [("x|y", "1")]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


ONE_SCALE = {"low": 3.0, "high": 3.0, "takes_scale": False}
RANGE = {"low": 1.0, "high": 8.0, "takes_scale": True}
FOUR = {"num_inference_steps": 4, "sampler": "deterministic", "direction": "generation"}


@pytest.mark.parametrize(
    ("facts", "call", "said"),
    [
        ({}, "num_inference_steps=20,\n    guidance_scale=7.5", ()),
        ({"guidance": RANGE}, "num_inference_steps=20,\n    guidance_scale=7.5", ("guidance_scale=1 to 8",)),
        ({"guidance": ONE_SCALE}, "num_inference_steps=20,\n    guidance_scale=1,", ("guidance_scale=1.0",)),
        ({"few_steps": FOUR}, "num_inference_steps=4,\n    guidance_scale=7.5", ("halved to 4 steps",)),
        (
            {"guidance": RANGE, "few_steps": {**FOUR, "sampler": "stochastic"}},
            "num_inference_steps=2,\n    guidance_scale=7.5",
            ("guidance_scale=1 to 8", "StochasticScheduler", "stochastic sampler, which stock diffusers lacks"),
        ),
        ({"few_steps": {**FOUR, "direction": "inversion"}}, None, ()),
    ],
)
def test_a_card_calls_each_kind_of_student_as_it_is_to_be_called(tmp_path, teacher_folder, facts, call, said):
    for part in ("model_index.json", "unet/config.json"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(teacher_folder / part, tmp_path / part)
    (tmp_path / "bkd_plan.json").write_text(json.dumps(facts))
    prompt = 'a "quoted" caption\nof two lines'
    found = usage(tmp_path, Samples(prompts=(prompt,), num_inference_steps=20, guidance_scale=7.5))
    assert len(found.notes) == len(said) and all(word in note for word, note in zip(said, found.notes, strict=True))
    assert (found.code is None) == (call is None)
    if found.code is not None:
        assert call in found.code
        strings = [node.value for node in ast.walk(ast.parse(found.code)) if isinstance(node, ast.Constant)]
        assert prompt in strings


def test_places_stay_unknown():
    assert model_name("owner/name") == "owner/name" and model_name("shapes") == "shapes"
    assert model_name("models/sd15", from_hub=False) == "sd15"
    assert model_name("/home/ada/models/sd15") == "sd15" and model_name("~/x/run/student") == "run"
    assert place_name("https://ada:pass@host/a.tar?sig=1") == "https://host/a.tar"
    recipe = load_recipe("shapes/sd-tiny", ["data.shards=secret/latents", "data.cache_dir=/home/ada/c"])
    public = public_recipe(recipe, from_hub=False)
    assert public.data.shards == "latents" and public.data.cache_dir is None
    plan = {"teacher": "/a/b", "teacher_plan": {"teacher": "../c/d"}}
    assert public_plan(plan) == {"teacher": "b", "teacher_plan": {"teacher": "d"}}


def test_nothing_that_a_run_says_is_markdown(bkd, run):
    evil = "<img src=x onerror=1> [x](javascript:y) | a"
    facts = json.loads((run / "run.json").read_text())
    del facts["teacher_commit"]  # an older run has none
    facts |= {"device": evil, "teacher_digest": evil, "versions": {**facts["versions"], "torch": evil}}
    (run / "run.json").write_text(json.dumps(facts))
    report = json.loads((run / "eval" / "shapes.json").read_text())
    report["models"][0]["name"] = evil
    report["environment"]["device"] = evil
    (run / "eval" / "shapes.json").write_text(json.dumps(report))
    assert bkd("card", run, "--data", evil)[0] == 0
    body = (run / "README.md").read_text().split("---\n", 2)[2]
    assert "<img" not in body and "[x](" not in body.replace("\\[", "") and body.count("&lt;img") >= 6


def test_a_teacher_whose_card_cannot_be_read_is_named(bkd, run, teacher_folder, tmp_path):
    broken = shutil.copytree(teacher_folder, tmp_path / "broken")
    (broken / "README.md").write_text("---\nlicense: [\n---\n")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("id: shapes", f"id: {broken}"))
    code, said = bkd("card", run)
    assert code == 1 and "the head of this model card cannot be read" in said and str(broken) in said
    (broken / "README.md").write_text("---\nlicense: [mit, creativeml-openrail-m]\n---\n")
    assert bkd("card", run)[0] == 0 and head_of(run / "README.md")["license"] == "creativeml-openrail-m"


def test_wrong_words_of_the_author(bkd, run):
    assert "not the name of a licence" in bkd("card", run, "--license", "MIT License")[1]
    assert "--license other" in bkd("card", run, "--license-name", "Mine")[1]
    assert "not the name of a model" in bkd("card", run, "--base-model", "junk")[1]
    assert not (run / "README.md").exists()


def test_what_lies_in_the_cards_folder_is_not_lost(bkd, run):
    (run / "card").mkdir()
    (run / "card" / "notes.txt").write_text("mine")
    code, said = bkd("card", run)
    assert code == 1 and "holds something else" in said and (run / "card" / "notes.txt").read_text() == "mine"


def test_speed_of_other_weights_is_refused(bkd, run):
    bench = ["--part", "unet", "--batch", 1, "--rounds", 2, "--no-memory", "-o", run / "eval" / "speed"]
    bkd("bench", "speed", run, *bench)
    path = run / "eval" / "speed" / "speed.json"
    path.write_text(path.read_text().replace(model_digest(run / "student"), "0" * 64))
    code, said = bkd("card", run)
    assert code == 1 and "these figures are of other weights" in said and "bkd bench speed" in said


def test_a_card_goes_along_with_an_export(bkd, run, tmp_path):
    bkd("card", run)
    assert bkd("export", run, "-o", tmp_path / "half", "--dtype", "float16")[0] == 0
    card = tmp_path / "half" / "README.md"
    assert head_of(card)["bkd_student_sha256"] == model_digest(tmp_path / "half") != model_digest(run / "student")
    assert (
        f"These weights are float16. All figures are of the float32 student, SHA-256 {model_digest(run / 'student')}"
        in card.read_text()
    )
    assert (tmp_path / "half" / "card" / "samples.png").is_file()
    assert bkd("export", run, "-o", tmp_path / "half", "--overwrite")[0] == 0
    assert bkd("push", tmp_path / "half", "--repo", "ada/half", "--dry-run")[0] == 0


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

    hub.fail("PUT", "large", 500, "cut")
    said = author_types("card", run) + author_types("push", run, "--repo", "ada/small")
    assert "SECRET" not in said  # of the token, and of signed addresses
    files = hub.repos["model"]["ada/small"].files()
    for name, content in files.items():
        assert not [place for place in (str(run.parent), os.getcwd()) if place.encode() in content], name  # noqa: PTH109
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
    (run / "run.json").write_text(json.dumps(facts))
    leave(run, US)
    code, said = bkd("push", run / "student", "--repo", "ada/small", "--dry-run")
    assert code == 1 and "another process is working on this run" in said
