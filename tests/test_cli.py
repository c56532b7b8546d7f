"""The command line as a user meets it: runs that continue, errors that say what to do, pages that escape."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from bkd import __version__
from bkd.runs.folder import RunFolder

SETTINGS = ["train.batch=8", "train.max_steps=6", "train.checkpoint_every=2", "train.log_every=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards, cache):
    """A finished run of a few steps, made by the command line in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = train_in_subprocess(folder, shards, cache)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def command(folder, shards, *more):
    data = f"data.shards={shards[0].parent}"
    return [sys.executable, "-m", "bkd", "train", "shapes/sd-tiny", data, *SETTINGS, *more, "-o", str(folder)]


def train_in_subprocess(folder, shards, cache, *more):
    environment = {**os.environ, "BKD_CACHE": str(cache), "OMP_NUM_THREADS": "2"}
    return subprocess.run(command(folder, shards, *more), capture_output=True, text=True, env=environment, check=False)


def weights(folder):
    return load_file(folder / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_run_folder_holds_everything(finished):
    run = RunFolder(finished)
    assert run.facts()["status"] == "done" and run.facts()["teacher"] == "shapes"
    assert [line["step"] for line in map(json.loads, run.metrics.read_text().splitlines())] == [1, 2, 4, 6]
    first = json.loads(run.metrics.read_text().splitlines()[0])
    assert {"task_loss", "output_kd_loss", "feature_kd_loss", "total", "lr", "grad_norm"} <= first.keys()
    assert (run.samples / "00-final.png").is_file() and run.recipe().train.max_steps == 6


def test_the_student_draws_the_same_image_where_bkd_cannot_be_imported(finished, tmp_path):
    from bkd.eval.generate import generate
    from bkd.models.load import load_pipeline

    prompt = "a large red square at the top left on a white background"
    script = f"""
import sys
sys.modules["bkd"] = None
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads({torch.get_num_threads()})
pipe = StableDiffusionPipeline.from_pretrained({str(finished / "student")!r}, torch_dtype=torch.float32)
generator = torch.Generator().manual_seed(0)
image = pipe({prompt!r}, num_inference_steps=5, guidance_scale=3.0, generator=[generator]).images[0]
image.save({str(tmp_path / "stock.png")!r})
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, capture_output=True)
    from PIL import Image

    pipe = load_pipeline(finished / "student")
    ours = generate(pipe, [prompt], num_inference_steps=5, guidance_scale=3.0)[0]
    stock = torch.tensor(list(Image.open(tmp_path / "stock.png").tobytes()), dtype=torch.uint8).reshape(32, 32, 3)
    assert torch.equal(stock, ours.permute(1, 2, 0))


def test_the_same_command_again_says_already_done(bkd, finished, shards):
    code, printed = bkd(*command(finished, shards)[3:])
    assert code == 0 and "already done" in printed


def test_cadences_may_change(bkd, finished, shards):
    code, printed = bkd(*command(finished, shards, "train.log_every=7")[3:])
    assert code == 0 and "already done" in printed


def test_other_settings_are_refused_with_both_values(bkd, finished, shards):
    code, printed = bkd(*command(finished, shards, "train.lr=1e-5")[3:])
    assert code == 1 and "run with other settings" in printed
    assert "train.lr is 0.002 there and 1e-05 here" in printed


def test_a_finished_run_with_other_settings_is_not_forced(bkd, finished, shards):
    code, printed = bkd(*command(finished, shards, "train.lr=1e-5", "--force")[3:])
    assert code == 1 and "holds a finished run with other settings" in printed


def test_a_folder_that_another_process_works_on_is_left_alone(bkd, finished, shards, tmp_path):
    folder = tmp_path / "held"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "student")
    holder = {"host": socket.gethostname(), "pid": os.getppid(), "since": "2026-01-01T00:00:00"}
    (folder / "run.lock").write_text(json.dumps(holder))
    for more in ((), ("--overwrite",), ("--force",)):
        code, printed = bkd(*command(folder, shards, *more)[3:])
        assert code == 1 and f"process {os.getppid()} on {socket.gethostname()}" in printed
    assert (folder / "checkpoints").is_dir()


def test_constant_schedules_may_grow_and_forced_runs_may_change(bkd, shards, tmp_path):
    """The longer run is what it would have been at once; the forced one goes on with other settings."""
    settings = ["train.lr_schedule=constant", "samples.prompts=[]", "train.trackers=[]", "train.checkpoint_every=3"]
    runs = {}
    for name, calls in {"grown": [3, 6], "whole": [6]}.items():
        for steps in calls:
            call = command(tmp_path / name, shards, *settings, f"train.max_steps={steps}")[3:]
            code, printed = bkd(*call)
            assert code == 0, printed
        runs[name] = weights(tmp_path / name)
    assert "continuing after step" not in printed
    assert all(torch.equal(runs["grown"][key], runs["whole"][key]) for key in runs["whole"])
    shutil.rmtree(tmp_path / "grown" / "student")
    longer = command(tmp_path / "grown", shards, *settings, "train.max_steps=7", "train.lr=1e-5")[3:]
    code, printed = bkd(*longer)
    assert code == 1 and "--force continues with the new settings" in printed
    before = {path: path.read_bytes() for path in (tmp_path / "grown").rglob("*") if path.is_file()}
    code, printed = bkd(*longer, "--force", "stages.0.student.blocks=sd-small")
    assert code == 1 and "do not fit this student" in printed
    assert {path: path.read_bytes() for path in (tmp_path / "grown").rglob("*") if path.is_file()} == before
    code, printed = bkd(*longer, "--force")
    assert code == 0 and "continuing after step 6" in printed


def test_a_killed_run_continues_to_the_same_weights(finished, shards, cache, tmp_path):
    folder = tmp_path / "killed"
    environment = {**os.environ, "BKD_CACHE": str(cache), "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command(folder, shards), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not list(folder.glob("checkpoints/00/00000002/manifest.json")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "student").exists()
    continued = train_in_subprocess(folder, shards, cache)
    assert continued.returncode == 0 and "continuing after step" in continued.stdout
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(folder).items())
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 4, 6]


def test_an_interrupted_run_says_how_to_continue(finished, shards, cache, tmp_path):
    folder = tmp_path / "interrupted"
    environment = {**os.environ, "BKD_CACHE": str(cache), "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command(folder, shards, "train.checkpoint_every=1"), env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.time() + 300
    while not list(folder.glob("checkpoints/00/*/manifest.json")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[0]
    assert process.returncode == 75 and "everything is saved; the same command continues" in printed
    assert train_in_subprocess(folder, shards, cache, "train.checkpoint_every=1").returncode == 0
    assert all(torch.equal(tensor, weights(finished)[name]) for name, tensor in weights(folder).items())


def test_evaluation_shows_teacher_untrained_and_student(bkd, finished):
    arguments = ("eval", finished, "--num-prompts", 4, "--num-inference-steps", 3)
    code, printed = bkd(*arguments)
    assert code == 0 and all(name in printed for name in ("teacher", "small untrained", "95 % interval"))
    report = json.loads((finished / "eval" / "shapes.json").read_text())
    assert [model["name"] for model in report["models"]] == ["teacher", "small untrained", "small"]
    assert report["models"][1]["unet_parameters"] == report["models"][2]["unet_parameters"] == 2_245_380
    assert (finished / "eval" / "shapes.png").is_file()
    code, printed = bkd(*arguments)
    assert code == 0 and "already measured" in printed


def test_the_report_is_one_page_of_a_real_run(bkd, finished):
    code, printed = bkd("report", finished)
    page = (finished / "report.html").read_text()
    assert code == 0 and f"report: {finished / 'report.html'}" in printed.replace("\n", "")
    assert "<svg" in page and "data:image/webp;base64," in page and "feature_kd_loss" in page
    assert "http://" not in page and "https://" not in page and 'src="/' not in page


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {"drawing": {}}, "models": []}', '{"settings": 3}'])
def test_a_damaged_measurement_is_named(bkd, finished, text):
    evaluation = finished / "eval" / "prompts.json"
    evaluation.parent.mkdir(exist_ok=True)
    evaluation.write_text(text)
    code, printed = bkd("report", finished, "-o", finished.parent / "other.html")
    evaluation.unlink()
    assert code == 1 and "Traceback" not in printed and "prompts.json" in " ".join(printed.split())
    assert not (finished.parent / "other.html").exists()


def test_sampling_writes_numbered_pictures(bkd, tmp_path):
    prompt = "a small blue circle at the bottom right on a gray background"
    arguments = ["sample", "shapes", "--prompt", prompt, "--num-inference-steps", 2, "-o", tmp_path / "out"]
    arguments += ["--prompt", prompt.replace("blue", "red")]
    code, printed = bkd(*arguments)
    assert code == 0 and "drawing 2 pictures: 2 steps, guidance 3" in printed and "done: 2 pictures" in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0000.png", "0001.png", "prompts.txt"]
    code, printed = bkd(*arguments)
    assert code == 1 and "holds an earlier output" in printed and "--overwrite" in printed


def test_dry_runs_write_nothing(bkd, tmp_path, monkeypatch, shards):
    monkeypatch.chdir(tmp_path)
    code, printed = bkd("train", "shapes/sd-small", f"data.shards={shards[0].parent}", "--dry-run")
    assert code == 0 and "max_steps" in printed and "3,707,652 of 5,523,876" in printed
    assert not list(tmp_path.iterdir())


def test_every_verb_is_described_on_its_line(bkd):
    code, printed = bkd("--help")
    assert code == 0 and "train    Distil a student" in printed and "..." not in printed.partition("Commands:")[2]


def test_the_version(bkd):
    assert bkd("--version") == (0, f"bkd {__version__}\n")


def test_processes_after_the_first_say_in_one_line_what_stopped_them(bkd, monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    code, printed = bkd("train", "shapes/sd-smal")
    assert code == 1 and printed.splitlines() == [
        "error: process 3: unknown recipe 'shapes/sd-smal'; did you mean 'shapes/sd-small'?"
    ]


def test_doctor_lists_versions(bkd):
    code, printed = bkd("doctor")
    assert code == 0 and "torchvision and torch" in printed and "disk free" in printed


def test_doctor_says_what_mends_a_mismatch(bkd, monkeypatch):
    monkeypatch.setattr("bkd.environment.torchvision_problem", lambda: "torchvision 1 was built for torch 1")
    code, printed = bkd("doctor")
    assert code == 1 and "pip install --force-reinstall torch torchvision" in printed


@pytest.mark.parametrize("command", [("train", "shapes/sd-small", "-o"), ("export", "-o", "out"), ("eval",)])
def test_a_run_whose_facts_are_no_facts_is_refused(bkd, tmp_path, command):
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "run.json").write_text("[1]")
    (run / "recipe.yaml").write_text("teacher: {id: shapes}")
    code, printed = bkd(*command, run)
    assert code == 1 and "run.json cannot be read" in printed and "got: list" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "shapes/sd-smal"], "did you mean 'shapes/sd-small'?"),
        (["train", "sd15/sd-small"], "data.shards: this recipe needs a value"),
        (["train", "shapes/sd-small", "train.max_step=3"], "did you mean 'train.max_steps'?"),
        (["train", "shapes/sd-small", "data.resolution=512"], "the teacher shapes draws 32 px"),
        (["train", "shapes/sd-small", "train.mixed_precision=fp16"], "float16 training needs a GPU"),
        (["train", "shapes/sd-small", "data.shards=missing/{00000..00003}.tar"], "00000.tar: shard missing"),
        (["train", "shapes/sd-small", "data.shards=missing"], "shard missing"),
        (["train", "shapes/sd-small", "teacher.id=nobody/nothing"], "teacher.id="),
        (["eval", "nowhere"], "no model 'nowhere'"),
        (["eval", "shapes", "--suite", "shape"], "did you mean 'shapes'?"),
        (["eval", "shapes", "--suite", "prompts"], "no prompts"),
        (["sample", "shapes", "-o", "out"], "no prompts"),
        (["report", "nowhere"], "not a run folder"),
        (["train", "shapes/sd-small", "data.cache_dir=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_bad_input_is_an_error_and_writes_nothing(bkd_refuses, arguments, message):
    bkd_refuses(arguments, message)


def test_a_run_folder_with_something_else_is_left_alone(bkd, tmp_path, shards):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, printed = bkd(*command(tmp_path, shards)[3:])
    assert code == 1 and "holds something else" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_starts_a_run_again_and_spares_everything_else(bkd, tmp_path, shards):
    from bkd.recipe.load import load_recipe
    from bkd.runs.opening import open_run

    run, state = open_run(tmp_path / "run", load_recipe("shapes/sd-small"))
    (run.path / "metrics.jsonl").write_text("{}")
    run, state = open_run(tmp_path / "run", load_recipe("shapes/sd-tiny"), overwrite=True)
    assert state == "new" and not run.metrics.exists()
    (tmp_path / "thesis.txt").write_text("years of work")
    code, printed = bkd(*command(tmp_path, shards, "--overwrite")[3:])
    assert code == 1 and "holds something else" in printed and (tmp_path / "thesis.txt").exists()


def test_overwrite_spares_a_teacher_inside_the_run(tmp_path):
    from bkd.errors import OutputError
    from bkd.recipe.load import load_recipe
    from bkd.runs.opening import open_run

    run, _ = open_run(tmp_path, load_recipe("shapes/sd-small"))
    again = load_recipe("shapes/sd-small", [f"teacher.id={run.student}"])
    with pytest.raises(OutputError, match="the teacher lies inside the run"):
        open_run(tmp_path, again, overwrite=True)
    assert run.facts_file.is_file()


def test_a_run_that_never_got_going_does_not_block_its_folder(tmp_path):
    from bkd.recipe.load import load_recipe
    from bkd.runs.opening import open_run

    run, _ = open_run(tmp_path, load_recipe("shapes/sd-small"))
    run.record(teacher_digest="of a teacher that was the wrong one")
    again, state = open_run(tmp_path, load_recipe("shapes/sd-tiny"))
    assert state == "new" and "teacher_digest" not in again.facts()


def test_a_student_that_lost_its_weights_is_not_done(finished, tmp_path):
    import shutil

    from bkd.runs.folder import RunFolder
    from bkd.runs.opening import open_run

    copy = RunFolder(shutil.copytree(finished, tmp_path / "copy"))
    assert open_run(copy.path, copy.recipe())[1] == "done"
    (copy.student / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert open_run(copy.path, copy.recipe())[1] == "continue"


def test_a_crash_at_the_very_start_does_not_block_the_folder(tmp_path):
    from bkd.recipe.load import dump_recipe, load_recipe
    from bkd.runs.opening import open_run

    recipe = load_recipe("shapes/sd-small")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert open_run(tmp_path, recipe)[1] == "new"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_evaluating_several_models_leaves_their_own_results_alone(bkd, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(finished / "eval")
    code, _ = bkd("eval", finished, "shapes", "--num-prompts", 2, "--num-inference-steps", 1)
    assert code == 0 and contents(finished / "eval") == before
    names = [model["name"] for model in json.loads((tmp_path / "eval" / "shapes.json").read_text())["models"]]
    assert names == ["teacher", "small untrained", "small", "shapes"]


def test_the_same_model_twice_is_refused(bkd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = bkd("eval", "shapes", "shapes")
    assert code == 1 and "the same model is named twice" in printed and not list(tmp_path.iterdir())


def test_recipe_files_run_beside_the_packaged_ones(bkd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("train: {max_steps: 1, batch: 2}")
    monkeypatch.setattr("bkd.cli.train._train", lambda name, folder, *_: print(folder))
    assert "runs/mine" in bkd("train", tmp_path / "mine.yaml")[1]


def test_a_damaged_run_file_is_named(bkd, tmp_path, shards):
    (tmp_path / "run.json").write_text("{")
    code, printed = bkd(*command(tmp_path, shards)[3:])
    assert code == 1 and "run.json cannot be read" in printed


def test_models_of_the_same_name_stay_apart(teacher_folder, tmp_path):
    import shutil

    from bkd.eval.candidates import name_candidates

    folders = [str(shutil.copytree(teacher_folder, tmp_path / name / "pruned")) for name in ("a", "b")]
    assert [named.name for named in name_candidates([*folders], "shapes")] == ["teacher", *folders]
    students = [str(shutil.copytree(teacher_folder, tmp_path / name / "student")) for name in ("a", "b")]
    assert [named.name for named in name_candidates([*students], "shapes")] == ["teacher", "a", "b"]


def test_a_corrupt_shard_stops_before_the_run_starts(bkd, tmp_path, shards):
    broken = tmp_path / "shards" / "00000.tar"
    broken.parent.mkdir()
    broken.write_bytes(shards[0].read_bytes()[:5000])
    code, printed = bkd(*command(tmp_path / "run", [broken])[3:])
    assert code == 1 and "shard truncated" in printed
    assert not (tmp_path / "run").exists()
