"""Run folders as training, evaluation and `bkd bench speed` leave them, made in moments and without weights."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from bkd.eval.pictures import save_side_by_side
from bkd.files import write_atomically
from bkd.models.locate import locate
from bkd.recipe.load import dump_recipe, load_recipe
from bkd.report.page import write_report
from bkd.runs.folder import RunFolder
from bkd.surgery.plan import PLAN_FILE
from bkd.surgery.unet import plan_removal

PROMPTS = ("a large red square", "a small blue circle")
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
VERSIONS = {"torch": "2.15.0", "diffusers": "0.42.1"}
TEACHER_DIGEST = "b" * 64
NOISE = np.random.default_rng(0).normal(0, 6, (512, 512))


def make_run(path, recipe="shapes/sd-tiny", *, prompts=PROMPTS, status="done", **facts):
    """A run folder with a log of 40 steps a stage; its students have configurations only."""
    run = RunFolder(path)
    run.path.mkdir(parents=True)
    wanted = [f"samples.prompts={json.dumps(list(prompts))}", "train.max_steps=40"]
    parsed = load_recipe(recipe, wanted)
    write_atomically(run.recipe_file, dump_recipe(parsed))
    known = {"teacher": "shapes", "teacher_digest": TEACHER_DIGEST, "data_fingerprint": "f" * 64, "device": "cpu"}
    made = {"bkd": "0.1.0", "versions": VERSIONS, "command": "bkd train RECIPE"}
    run.record(status=status, **{**known, **made, **facts})
    lines = [line for stage in range(len(parsed.stages)) for line in _log(stage)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status == "done":
        for number, student in enumerate(run.students(parsed)):
            make_student(student, "sd-tiny" if number == 0 and recipe == "shapes/sd-tiny" else "none")
    return run


def make_student(folder, blocks):
    """The configurations of a student of the embedded teacher, with its plan."""
    teacher = locate("shapes")
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    plan = plan_removal(config, "mid" if blocks == "none" else blocks)
    facts = json.loads(plan.to_json())
    if blocks == "none":
        facts |= {"name": "none", "removed": [], "overrides": {}, "renamed": {}, "removed_modules": []}
    (folder / "unet" / "config.json").write_text(json.dumps({**config, **facts["overrides"]}))
    (folder / PLAN_FILE).write_text(json.dumps({**facts, "teacher_digest": TEACHER_DIGEST}))


def _log(stage):
    for step in range(1, 41):
        loss = math.exp(-step / 10) + 0.1 * (step % 3)
        sites = {"feature_kd_loss/down_blocks.0": loss, "feature_kd_loss/up_blocks.1": 2 * loss}
        yield {
            "stage": stage,
            "step": step,
            "task_loss": loss,
            **sites,
            "total": 3 * loss,
            "lr": 1e-4,
            "grad_norm": 1.0,
        }


def add_picture(path, prompts=PROMPTS, models=("teacher", "student"), *, side=32, seed=0, first=0):
    """A comparison picture of patterns; the first model's have a seed of their own."""
    drawn = {
        model: torch.stack([pattern(side, first if row == 0 else seed + row, column) for column in range(len(prompts))])
        for row, model in enumerate(models)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_side_by_side(path, drawn, prompts)


def pattern(side, seed, column):
    """(3, side, side), uint8: waves with a little noise, about as hard to compress as a photograph."""
    rng = np.random.default_rng([seed, column])
    noise = np.roll(NOISE, rng.integers(0, 512, 2), axis=(0, 1))[:side, :side]
    places = np.arange(side)
    across, down = (np.sin(places / rng.uniform(4, 40, (3, 1)) + rng.uniform(0, 6, (3, 1))) for _ in range(2))
    drawn = 127 + 50 * (across[:, None, :] + down[:, :, None]) + noise
    return torch.from_numpy(drawn.clip(0, 255).astype(np.uint8))


def add_evaluation(run, names=("teacher", "student"), *, digests=None, correct=(40, 38), device="cpu", dtype="float32"):
    """Figures of suite `shapes` on one split."""
    models = [
        {
            "name": name,
            "unet_parameters": 5_523_876,
            "unet_macs": 49_624_768,
            "passes_a_step": 2,
            "num_inference_steps": 20,
            "sampler": {},
            "splits": {"test": _split(correct[min(number, 1)])},
        }
        for number, name in enumerate(names)
    ]
    drawing = {"num_inference_steps": 20, "guidance_scale": 3.0, "seed": 0, "rng": "per-image"}
    report = {
        "settings": {"suite": "shapes", "splits": ["test"], "num_prompts": 40, "drawing": drawing, "dtype": dtype},
        "environment": {"device": device, "versions": VERSIONS},
        "digests": dict(zip(names, digests or names, strict=True)),
        "models": models,
    }
    write_atomically(run.eval / "shapes.json", json.dumps(report))
    return report


def _split(right):
    found = {"successes": right, "total": 40, "low": right / 40 - 0.05, "high": min(1.0, right / 40 + 0.05)}
    return {
        "accuracy": found,
        "attributes": {"shape": found, "color": found},
        "by_objects": {"one": found, "two": None},
        "relative": right / 40,
        "mcnemar_p": 0.5,
        "shapes_fid": {"skipped": "40 images are too few"},
    }


def add_speed(run, names=("teacher", "student"), *, few=None, digests=None, device="cpu, 2 threads"):
    """Times and memory of one kind of call; one model may draw in fewer steps."""
    models = [
        {
            "name": name,
            "num_inference_steps": 4 if name == few else 20,
            "guidance_scale": 3.0,
            "cases": {
                "unet, batch 1": {
                    "median_s": 0.2 / (number + 1),
                    "p90_s": 0.25 / (number + 1),
                    "speed_up": 1.0 + number,
                    "memory": {"peak_bytes": 2**30 - 2**28 * number},
                }
            },
        }
        for number, name in enumerate(names)
    ]
    settings = {"rounds": 2, "parts": ["unet", "pipeline"], "num_inference_steps": 20, "guidance_scale": 3.0}
    known = dict(zip(names, digests or names, strict=True))
    report = {"device": device, "versions": VERSIONS, "settings": settings, "digests": known, "models": models}
    write_atomically(run.speed_file, json.dumps(report))


@pytest.fixture(scope="session")
def many_page(tmp_path_factory):
    """The page of a run with 200 pictures of 512 px, no two alike."""
    run = make_run(tmp_path_factory.mktemp("many") / "many", prompts=[f"prompt {number}" for number in range(10)])
    for step in range(10):
        name = f"00-step-{step:08d}.png"
        add_picture(run.samples / name, run.recipe().samples.prompts, side=512, seed=step, first=100 + step)
    return write_report([run.path], run.path)
