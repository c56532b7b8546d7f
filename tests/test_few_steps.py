"""What a folder says of its student's steps and guidance, and what follows from that for every command."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import bkd.edit
from bkd.data.shapes import scene
from bkd.data.shapes_checker import rendered
from bkd.diffusion.few_steps import FewSteps, few_steps
from bkd.diffusion.guidance import OnePassGuidance, StudentKind, one_pass_guidance
from bkd.diffusion.sampling import InversionScheduler, StochasticScheduler
from bkd.edit import Editor
from bkd.errors import ModelError
from bkd.surgery.plan import PLAN_FILE
from tests.test_cli_halving import copied
from tests.test_edit import claimed, half

PROMPT = "a small blue circle at the bottom right on a gray background"


def with_facts(folder, **facts):
    """Change what a model's plan file says."""
    path = folder / PLAN_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    return folder


@pytest.fixture(scope="module")
def students(teacher_folder, tmp_path_factory):
    """Copies of the teacher that say they are students of several kinds: name -> folder."""
    root = tmp_path_factory.mktemp("students")
    kinds = {
        "four": FewSteps(4),
        "eight": FewSteps(8),
        "stochastic": FewSteps(4, "stochastic"),
        "encoder": FewSteps(4, direction="inversion"),
    }
    found = {name: claimed(teacher_folder, root / name, few) for name, few in kinds.items()}
    found["one-scale"] = with_facts(
        claimed(teacher_folder, root / "one-scale", FewSteps(4)), guidance=OnePassGuidance(2.0, 2.0, False).facts()
    )
    return found


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Image.fromarray(rendered([scene("test", 0)])[0].permute(1, 2, 0).numpy()).save(path)
    return path


def test_a_kind_says_how_it_is_drawn_with(students):
    assert str(StudentKind.of(students["one-scale"])) == "guided in one pass, guidance scale 2; 4 steps"
    told = StudentKind(OnePassGuidance(1.0, 8.0, takes_scale=True), None, FewSteps(4, "stochastic"))
    assert str(told) == "guided in one pass, told a guidance scale of 1 to 8; 4 steps (stochastic)"
    assert str(StudentKind()) == ""


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"few_steps": {"steps": 4}}, "'few_steps' of this plan file cannot be read"),
        ({"few_steps": {"num_inference_steps": 4, "sampler": "other"}}, "'deterministic' or 'stochastic'"),
        ({"few_steps": {"num_inference_steps": 0}}, "greater than 0"),
        ({"few_steps": 4}, "'few_steps' of this plan file cannot be read"),
        ({"few_steps": {"num_inference_steps": 4, "order": 2}}, "order"),
        ({"guidance": {"low": 1.0}}, "'guidance' of this plan file cannot be read"),
    ],
)
def test_a_plan_file_that_says_something_else_is_refused(bkd_refuses, students, tmp_path_factory, facts, message):
    other = with_facts(shutil.copytree(students["four"], tmp_path_factory.mktemp("other") / "student"), **facts)
    with pytest.raises(ModelError, match="this plan file cannot be read"):
        _ = few_steps(other), one_pass_guidance(other)
    bkd_refuses(["sample", other, "--prompt", PROMPT, "-o", "out"], message)


def test_inspect_says_how_a_student_is_drawn_with(bkd, students):
    code, printed = bkd("inspect", students["one-scale"])
    assert code == 0 and "drawn with: guided in one pass, guidance scale 2; 4 steps" in printed
    code, printed = bkd("inspect", students["stochastic"], "--json")
    found = json.loads(printed[printed.index("{") :])["drawn_with"]
    assert found == {"guidance": None, "few_steps": FewSteps(4, "stochastic").facts()}
    assert "drawn with" not in bkd("inspect", "shapes")[1]


@pytest.mark.parametrize("method", ["kd", "finetune", "guided", "{name: halving, num_inference_steps: [16, 8]}"])
@pytest.mark.parametrize("student", ["four", "encoder"])
def test_a_student_of_few_steps_is_not_trained_at_others(bkd_refuses, students, method, student):
    method = method if "{" in method else f"{{name: {method}}}"
    changed = [f"stages.0.student={{path: {students[student]}}}", f"stages.0.method={method}", "-o", "run"]
    bkd_refuses(
        ["train", "shapes/sd-small", *changed], "knows a few noise levels only, and other ones than it would be"
    )


def test_a_student_is_halved_further_from_itself_or_its_teacher(bkd, students, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = f"data.shards={shards[0].parent}"
    for student in ("four", "eight"):
        changed = [f"stages.0.student={{path: {students[student]}}}", f"teacher.id={students['eight']}", "--dry-run"]
        method = "stages.0.method={name: halving, num_inference_steps: [8, 4]}"
        code, printed = bkd("train", "shapes/sd-small", *changed, method, where)
        assert code == 0, printed


@pytest.mark.parametrize("count", [96, 192, 224])
def test_a_stochastic_sampler_needs_nested_grids_too(bkd_refuses, count):
    method = f"{{name: halving, num_inference_steps: [{count}, {count}], sampler: stochastic}}"
    bkd_refuses(["train", "shapes/sd-small", f"stages.0.method={method}", "-o", "run"], "do not lie in pairs")


@pytest.mark.parametrize("student", ["four", "encoder"])
def test_units_are_not_chosen_for_what_could_not_be_trained_after(bkd_refuses, students, shards, student):
    pruned = ["prune", students[student], "--keep", "0.7", "--calibration", shards[0], "-o", "out"]
    bkd_refuses(pruned, "--keep prunes before guidance is distilled and steps are halved")


def test_one_stream_of_noise_is_refused_before_anything_is_drawn(bkd_refuses, students):
    models = ["--teacher", "shapes", students["stochastic"], "--guidance-scale", 3]
    wish = ["eval", *models, "--num-prompts", 2, "--split", "test", "--rng", "bksdm", "-o", "out"]
    bkd_refuses(wish, "draws noise on the way: from one generator images would depend on each other")


def test_speed_names_the_steps_and_the_guidance_of_each_model(bkd, students, tmp_path):
    fast = ["--part", "pipeline", "--batch", 1, "--rounds", 2, "--num-inference-steps", 2, "--no-memory"]
    code, printed = bkd("bench", "speed", "shapes", students["one-scale"], *fast, "-o", tmp_path / "out")
    assert code == 0 and "2 steps, guidance 7.5; one-scale: 4 steps, guidance 2" in " ".join(printed.split())
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["models"]
    assert [(row["num_inference_steps"], row["guidance_scale"]) for row in rows] == [(2, 7.5), (4, 2.0)]


def test_a_stochastic_decoder_adds_the_noise_of_its_seed(teacher_folder, students):
    decoder = half(students["stochastic"])
    noise, prompts = torch.randn(2, 4, 8, 8), [PROMPT, PROMPT]

    def drawn(seed, place=slice(None)):
        return Editor(half(teacher_folder), decoder, seed).decode(noise[place], prompts[place])

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert (drawn(0)[:1].float() - drawn(0, slice(1)).float()).abs().max() <= 1  # each image has noise of its own


@pytest.mark.parametrize(
    ("scheduler", "option", "message"),
    [
        ({"prediction_type": "sample"}, "--encoder", "says nothing of noise while there is none"),
        ({"_class_name": "LCMScheduler"}, "--encoder", "is not drawn with as DDIM would"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "--decoder", "DDIMScheduler with thresholding"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "both", "of a schedule without signal"),
    ],
)
def test_models_that_ddim_cannot_walk_do_not_edit(
    bkd_refuses, teacher_folder, tmp_path_factory, picture, scheduler, option, message
):
    model = copied(teacher_folder, tmp_path_factory.mktemp("models"), scheduler)
    models = ["--encoder", model, "--decoder", model] if option == "both" else ["--encoder", "shapes", option, model]
    bkd_refuses(["edit", picture, *models, "--from", "a", "--to", "b", "-o", "out.png"], message)


def test_latents_that_are_not_finite_are_not_written(bkd_refuses, picture, monkeypatch):
    monkeypatch.setattr(
        "bkd.diffusion.sampling.InversionScheduler._moved", lambda self, output, sample, *ends: sample / 0
    )
    edit = ["edit", picture, "--encoder", "shapes", "--from", "a", "--to", "b", "-o", "out.png"]
    bkd_refuses([*edit, "--num-inference-steps", 2], "the latents are not finite numbers any more")


def test_an_encoder_is_no_decoder(bkd_refuses, students, picture):
    edit = ["edit", picture, "--encoder", students["encoder"], "--from", "a", "--to", "b", "-o", "out.png"]
    bkd_refuses(edit, "one that draws, such as its teacher (of an edit: --decoder MODEL)")


@pytest.mark.parametrize("encoder", ["shapes", "encoder"])
def test_an_edit_in_steps_without_a_grid_is_refused(bkd_refuses, students, picture, encoder):
    models = ["--encoder", students.get(encoder, encoder), "--decoder", "shapes", "--num-inference-steps", 61]
    message = "shapes: this number of steps has no grid of its own\n  got: 61 of 1,000 timesteps"
    bkd_refuses(["edit", picture, *models, "--from", "a", "--to", "b", "-o", "out.png"], message)


def test_what_an_edit_lacks_is_said_before_its_models_are_fetched(bkd_refuses):
    edit = ["edit", "none.png", "--encoder", "nobody/nothing", "--from", "a", "--to", "b", "-o", "out.png"]
    bkd_refuses(edit, "none.png: no such image")


def test_a_model_that_encodes_and_decodes_is_loaded_once(teacher_folder, students, monkeypatch):
    loaded = []
    load = bkd.edit.load_pipeline
    monkeypatch.setattr(
        bkd.edit, "load_pipeline", lambda folder, **how: (loaded.append(folder), load(folder, **how))[1]
    )
    editor = Editor(half(teacher_folder), half(teacher_folder))
    assert loaded == [teacher_folder] and type(editor._decoder.scheduler) is DDIMScheduler
    assert type(editor._encoder.scheduler) is InversionScheduler
    Editor(half(students["encoder"]), half(students["four"]))
    assert loaded[1:] == [students["encoder"], students["four"]]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "not trained on a noise schedule of DDPM's kind"),
        ({"_class_name": "EulerDiscreteScheduler", "use_flow_sigmas": True}, "got: EulerDiscreteScheduler with flow"),
        ({"_class_name": "LCMScheduler"}, "is not drawn with as DDIM would"),
    ],
)
def test_another_sampler_takes_noise_levels_that_are_there(
    bkd_refuses, teacher_folder, tmp_path_factory, written, message
):
    model = copied(teacher_folder, tmp_path_factory.mktemp("models"), written)
    bkd_refuses(["sample", model, "--prompt", PROMPT, "--scheduler", "ddim", "-o", "out"], message)
    wish = ["eval", model, "--scheduler", "ddim", "--num-prompts", 2, "--split", "test", "-o", "out"]
    bkd_refuses(wish, message)


def test_samplers_are_made_of_other_schedulers_configurations_without_a_word(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="diffusers")  # every verb wants to hear of errors alone
    logging.getLogger("diffusers.configuration_utils").warning("heard")
    config = DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False).config
    for kind in (StochasticScheduler, InversionScheduler):
        assert kind.from_config(config).config.prediction_type == "epsilon"
    assert set(caplog.messages) == {"heard"}
