"""Several processes compute what one does: real `accelerate launch` runs on this machine's CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel_runs import RUNS, STEPS, run
from tests.test_data import cached

ROOT = Path(__file__).parent.parent
PLAIN = ["sgd", "adamw", "passes", "recomputed", "features-only", "captions", "adapters"]


@pytest.fixture(scope="module")
def latents(teacher, teacher_folder, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    return Path(cached(teacher, teacher_folder, shards[0].parent, folder).name)


@pytest.fixture(scope="module")
def alone(latents, tmp_path_factory):
    """The same runs on one process: this one."""
    out = tmp_path_factory.mktemp("alone")
    for name in PLAIN:
        run(name, latents, out)
    return out


def launch(kind, num_processes, out, *arguments, check=True):
    """`accelerate launch` with a packaged configuration, on the CPU."""
    text = (ROOT / "recipes" / "accelerate" / f"{kind}.yaml").read_text().replace("use_cpu: false", "use_cpu: true")
    config = out / f"{kind}.yaml"
    config.write_text(text)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command = [*accelerate, "--num_processes", num_processes, "--main_process_port", 0, "-m", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def launched(kind, num_processes, latents, out, names):
    launch(kind, num_processes, out, "tests.parallel_runs", latents, out, *names)
    return out


@pytest.fixture(scope="module")
def two_copies(latents, tmp_path_factory):
    return launched("ddp", 2, latents, tmp_path_factory.mktemp("ddp2"), [*PLAIN, "stopped", "continued"])


@pytest.fixture(scope="module")
def four_copies(latents, tmp_path_factory):
    return launched("ddp", 4, latents, tmp_path_factory.mktemp("ddp4"), ["sgd", "adamw", "passes"])


@pytest.fixture(scope="module")
def shards_of_networks(latents, tmp_path_factory):
    return launched("fsdp2", 2, latents, tmp_path_factory.mktemp("fsdp2"), [*PLAIN, "stopped", "continued"])


def facts(folder, name):
    return json.loads((folder / name / "facts.json").read_text())


def require_equal(alone, other, name):
    totals, expected = facts(other, name)["totals"], facts(alone, name)["totals"]
    assert len(totals) == RUNS[name].get("max_steps", STEPS) and totals == pytest.approx(expected, rel=1e-5)
    found, wanted = (load_file(folder / name / "weights.safetensors") for folder in (other, alone))
    assert found.keys() == wanted.keys()
    # AdamW divides by the root of the second moment: where gradients are tiny, their rounding decides.
    bound = 0.1 * RUNS[name]["lr"] * STEPS if name == "adamw" else 1e-5
    assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) <= bound


@pytest.mark.parametrize("name", PLAIN)
def test_two_copies_train_as_one_process(alone, two_copies, name):
    assert facts(two_copies, name)["kind"] == "ddp"
    require_equal(alone, two_copies, name)


@pytest.mark.parametrize("name", ["sgd", "adamw", "passes"])
def test_four_copies_train_as_one_process(alone, four_copies, name):
    require_equal(alone, four_copies, name)


@pytest.mark.parametrize("name", PLAIN)
def test_shards_of_both_networks_train_as_one_process(alone, shards_of_networks, name):
    assert facts(shards_of_networks, name)["kind"] == "fsdp2"
    require_equal(alone, shards_of_networks, name)


@pytest.mark.parametrize("kind", ["two_copies", "shards_of_networks"])
def test_a_stopped_run_continues_exactly(request, kind):
    """All processes stop at the same step though one alone was asked; the rest is what an unbroken run does."""
    out = request.getfixturevalue(kind)
    totals = facts(out, "stopped")["totals"] + facts(out, "continued")["totals"]
    assert len(facts(out, "stopped")["totals"]) == 7 and totals == facts(out, "adamw")["totals"]
    found, wanted = (load_file(out / name / "weights.safetensors") for name in ("continued", "adamw"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_sharded_run_leaves_what_any_run_leaves(shards, cache, tmp_path):
    """The whole verb: latents encoded together, pictures on the way, one student that stock diffusers loads."""
    settings = ["train.max_steps=3", "train.batch=8", "train.samples_every=2", "samples.num_inference_steps=2"]
    run = tmp_path / "run"
    arguments = ["bkd", "train", "shapes/sd-tiny", f"data.shards={shards[0].parent}", *settings, "-o", run]
    done = launch("fsdp2", 2, tmp_path, *arguments)
    assert done.stdout.count("training sd-tiny") == 1  # one process speaks
    facts = json.loads((run / "run.json").read_text())
    assert (facts["status"], facts["processes"], facts["parallel"]) == ("done", 2, "fsdp2")
    assert {path.name for path in (run / "samples").iterdir()} == {"00-step-00000002.png", "00-final.png"}
    assert not list(run.glob("*.lock"))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3]
    from diffusers import UNet2DConditionModel

    student = UNet2DConditionModel.from_pretrained(run / "student", subfolder="unet")
    assert student.num_parameters() == 2_245_380


def test_a_run_of_several_stages_is_the_same_on_two_processes(bkd, shards, tmp_path):
    """Every process takes up the student that the first one wrote, as the teacher of the next stage."""
    recipe = tmp_path / "chain.yaml"
    recipe.write_text("""
teacher: {id: shapes}
train: {batch: 8, lr: 1e-3, max_steps: 2, ema: 0.5, optimizer: sgd, trackers: []}
stages:
  - student: {blocks: sd-tiny}
    method: {name: kd}
  - method: {name: guided, guidance_scale: [1, 8]}
  - method: {name: halving, num_inference_steps: [2, 1]}
samples: {num_inference_steps: 2, guidance_scale: 3.0}
""")
    arguments = ["train", recipe, f"data.shards={shards[0].parent}", "-o"]
    code, printed = bkd(*arguments, tmp_path / "one")
    assert code == 0, printed
    done = launch("fsdp2", 2, tmp_path, "bkd", *arguments, tmp_path / "two")
    assert done.stdout.count("stage 3 of 3: training halving 2 to 1 step") == 1
    for folder in ("stages/00-kd/student", "stages/01-guided/student", "student"):
        one, two = (load_file(next((tmp_path / run / folder / "unet").glob("*.safetensors"))) for run in ("one", "two"))
        assert one.keys() == two.keys()
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
