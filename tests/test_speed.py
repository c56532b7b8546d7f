"""`bkd bench speed`: what is timed, how models take turns, and what stays on disk."""

import json
import shutil

import numpy as np
import pytest
import torch

from bkd.eval.candidates import Named
from bkd.eval.peak_memory import measure_peak
from bkd.eval.speed import Case, SpeedWish, call_of, size_of, take_turns
from bkd.report.speed_chart import write_speed_report

CPU = torch.device("cpu")
FAST = ("--rounds", 2, "--num-inference-steps", 1)


@pytest.fixture(scope="module")
def two_models(teacher_folder, tmp_path_factory):
    """The same model under two names."""
    other = tmp_path_factory.mktemp("models") / "same"
    shutil.copytree(teacher_folder, other)
    return teacher_folder, other


def test_models_take_turns_and_change_who_begins():
    called, told = [], []
    calls = [lambda number=number: called.append(number) for number in range(3)]
    times = take_turns(calls, 4, CPU, lambda done, total: told.append((done, total)))
    assert times.shape == (4, 3) and (times >= 0).all() and told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert called == [0, 1, 2, 0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_step_is_one_pass_of_the_batch(family_folders, family):
    from bkd.models.load import load_pipeline

    pipe = load_pipeline(family_folders[family], dtype=torch.bfloat16)
    output = call_of(Case("unet", 3, "eager", "bfloat16"), pipe, SpeedWish())().sample
    assert output.shape == (3, 4, 8, 8) and output.dtype == torch.bfloat16


def test_a_pipeline_call_draws_the_batch_with_guidance(teacher):
    evaluated = []
    handle = teacher.unet.register_forward_hook(lambda module, args, output: evaluated.append(len(output[0])))
    try:
        wish = SpeedWish(num_inference_steps=2, guidance_scale=3.0)
        images = call_of(Case("pipeline", 3, "eager", "float32"), teacher, wish)().images
    finally:
        handle.remove()
    assert images.shape == (3, 3, 32, 32) and evaluated == [6, 6]


def test_sizes_are_counted(teacher_folder):
    found = size_of(Named("shapes", teacher_folder))
    assert found["unet_parameters"] == 5_523_876
    assert found["unet_macs_without_attention"] < found["unet_macs"]
    assert found["unet_bytes"] == (teacher_folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert found["pipeline_bytes"] > found["unet_bytes"]


def test_peak_memory_is_that_of_a_process_of_its_own(teacher_folder):
    """This process has grown by more than the whole of that one before it is asked."""
    grown = np.ones(3 * 2**29, np.uint8)
    found = measure_peak(
        teacher_folder,
        {"part": "unet", "batch": 1, "mode": "eager", "dtype": "float32"},
        num_inference_steps=1,
        guidance_scale=1.0,
        device=CPU,
    )
    assert 0 < found["before_bytes"] < found["peak_bytes"] < grown.nbytes


def test_the_table_the_file_and_the_chart(bkd, two_models, tmp_path):
    out = tmp_path / "out"
    arguments = ("bench", "speed", *two_models, *FAST, "--batch", 1, "--mode", "eager", "-o", out)
    code, printed = bkd(*arguments, "--dtype", "float32", "--dtype", "bfloat16", "--no-memory")
    assert code == 0 and "speed-up" in printed and "pipeline, batch 1, eager, bfloat16" in printed
    report = json.loads((out / "speed.json").read_text())
    first, second = report["models"]
    assert first["name"] == "shapes" and second["name"] == "same" and report["versions"]["torch"]
    assert len(first["cases"]) == 4 and first["cases"]["unet, batch 1, eager, float32"]["speed_up"] == 1.0
    assert all(case["median_s"] <= case["p90_s"] and case["rounds"] == 2 for case in second["cases"].values())
    assert (out / "speed.svg").read_text().startswith("<?xml")
    code, printed = bkd(*arguments)
    assert code == 1 and "--overwrite" in printed


def test_a_chart_of_one_call_and_of_a_model_that_never_varies(tmp_path):
    case = {"median_s": 1.0, "p90_s": 1.0, "speed_up": 1.0}
    models = [{"name": "a", "cases": {"unet": case}}, {"name": "b", "cases": {"unet": case}}]
    write_speed_report({"device": "cpu", "models": models}, tmp_path)
    assert "<svg" in (tmp_path / "speed.svg").read_text()


@pytest.mark.slow
def test_compiled_models_are_timed(bkd, teacher_folder, tmp_path):
    arguments = ("--part", "unet", "--batch", 1, "--mode", "eager", "--mode", "compiled", "--no-memory", *FAST)
    code, _ = bkd("bench", "speed", "shapes", *arguments, "-o", tmp_path / "out")
    cases = json.loads((tmp_path / "out" / "speed.json").read_text())["models"][0]["cases"]
    assert code == 0 and list(cases) == ["unet, batch 1, eager, float32", "unet, batch 1, compiled, float32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "vae"), "unknown part 'vae'"),
        (("--mode", "compile"), "did you mean 'compiled'?"),
        (("--dtype", "half"), "unknown dtype 'half'"),
        (("--dtype", "float16"), "float16 needs a GPU"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--device", "cuda"), "there is no cuda device here"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(bkd_refuses, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    bkd_refuses(("bench", "speed", "shapes", *arguments), message)


def test_a_model_that_does_not_exist_is_refused(bkd_refuses):
    bkd_refuses(("bench", "speed", "nowhere", "-o", "out"), "no model 'nowhere'")
