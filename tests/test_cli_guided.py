"""One-pass students, adapters, fine-tuning and export as a user meets them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from bkd.diffusion.guidance import one_pass_guidance
from bkd.errors import ModelError
from bkd.eval.candidates import Named
from bkd.eval.generate import generate
from bkd.eval.speed import SpeedWish, wish_for
from bkd.lora.adapter_file import ADAPTER_FILE, Adapter
from bkd.models.load import load_pipeline
from bkd.models.locate import locate
from bkd.runs.folder import RunFolder
from bkd.surgery.build import build_student
from bkd.surgery.plan import load_plan
from tests.training import train_here

SHORT = ["train.batch=8", "train.max_steps=4", "train.checkpoint_every=2", "train.log_every=1", "train.warmup_steps=0"]
PROMPT = "a small blue circle at the bottom right on a gray background"
DRAWING = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def train(shards, cache, tmp_path_factory):
    """Train a recipe for four steps in this process, without the reload in another; returns the run folder."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, recipe, *overrides):
        train_here(recipe, f"data.shards={shards[0].parent}", *SHORT, *overrides, "-o", root / name)
        return root / name

    return run


@pytest.fixture(scope="module")
def told(train):
    """A pruned student with an input for the guidance scale."""
    return train("told", "shapes/guided", "stages.0.student.blocks=sd-tiny", "samples.num_inference_steps=2")


@pytest.fixture(scope="module")
def fixed(train):
    """The teacher's architecture, adapters alone, one guidance scale."""
    return train("fixed", "shapes/guided-lora", "train.lr=5e-3", "samples.prompts=[]")


@pytest.fixture(scope="module")
def pruned(train):
    """A pruned student's adapters over its teacher's weights, and norms of its own."""
    overrides = ["stages.0.student.blocks=sd-tiny", "stages.0.lora.also_train=[norms]", "samples.prompts=[]"]
    return train("pruned", "shapes/sd-small-lora", *overrides)


def image_of(folder, guidance_scale, lora=None):
    pipe = load_pipeline(folder)
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    return generate(pipe, [PROMPT], guidance_scale=guidance_scale, **DRAWING).int()


def test_a_student_with_a_scale_draws_in_single_passes_in_the_stock_pipeline(told):
    pipe = StableDiffusionPipeline.from_pretrained(told / "student", safety_checker=None)
    counts = []
    pipe.unet.register_forward_pre_hook(lambda unet, inputs: counts.append(len(inputs[0])))
    one, other = (pipe(PROMPT, guidance_scale=s, generator=torch.manual_seed(0), **DRAWING).images[0] for s in (1, 8))
    assert counts == [1] * 8 and one != other
    assert one_pass_guidance(told / "student").facts() == {"low": 1.0, "high": 8.0, "takes_scale": True}
    lines = [json.loads(line) for line in (told / "metrics.jsonl").read_text().splitlines()]
    assert {"output_kd_loss", "unguided_loss"} <= lines[0].keys() and not {"task_loss", "feature_kd_loss"} & lines[
        0
    ].keys()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (told / "student").rglob("*.*"))  # others can read it
    assert (told / "samples" / "00-final.png").is_file()


def test_scales_that_a_student_has_not_learnt_are_refused(bkd_refuses, told, fixed):
    for model, scale, allowed in ((told, 9, "1 to 8"), (fixed, 5, "allowed: 3")):
        message = "has not learnt that guidance scale"
        bkd_refuses(["sample", model, "--prompt", PROMPT, "--guidance-scale", scale, "-o", "pictures"], message)
        bkd_refuses(["eval", model, "--guidance-scale", scale, "-o", "measured"], allowed)
        bkd_refuses(["bench", "speed", model, "--guidance-scale", scale, "-o", "timed"], allowed)
        prompts = ["--prompts", RunFolder(model).recipe_file]
        bkd_refuses(["data", "generate", model, *prompts, "--guidance-scale", scale, "-o", "drawn"], message)


def test_a_student_of_one_scale_is_drawn_without_guidance_on_top(bkd, fixed, tmp_path):
    arguments = ["--num-inference-steps", 4, "-o", tmp_path / "pictures"]
    assert bkd("sample", fixed, "--prompt", PROMPT, *arguments)[0] == 0  # the scale is the run's own
    assert bkd("sample", fixed / "student", "--prompt", PROMPT, *arguments[:2], "-o", tmp_path / "folder")[0] == 0
    expected = image_of(fixed / "student", 1.0)[0].permute(1, 2, 0)
    for name in ("pictures", "folder"):
        drawn = Image.open(tmp_path / name / "0000.png")
        assert torch.equal(torch.tensor(list(drawn.getdata())).reshape(32, 32, 3), expected)


def test_evaluation_counts_steps_not_passes(bkd, told, tmp_path):
    code, printed = bkd("eval", told, "--num-prompts", 2, "--num-inference-steps", 2, "-o", tmp_path / "out")
    assert code == 0, printed
    models = json.loads((tmp_path / "out" / "shapes.json").read_text())["models"]
    passes = {model["name"]: model["passes_a_step"] for model in models}
    assert passes == {"teacher": 2, "told untrained": 1, "told": 1}


def test_a_student_is_timed_at_a_scale_that_it_knows(fixed, told, teacher_folder):
    wish = SpeedWish(guidance_scale=7.5, nearest_scale=True)
    models = [Named("teacher", teacher_folder), Named("told", told / "student"), Named("fixed", fixed / "student")]
    assert [wish_for(model, wish).guidance_scale for model in models] == [7.5, 7.5, 1.0]
    with pytest.raises(ModelError, match="has not learnt"):
        wish_for(models[2], replace(wish, nearest_scale=False))


def test_a_lora_file_and_a_merged_folder_draw_what_the_student_does(bkd, fixed, teacher_folder, tmp_path):
    code, printed = bkd("export", fixed, "--format", "lora", "-o", tmp_path / "out.safetensors")
    assert code == 0 and "guidance_scale 3: call the pipeline with guidance_scale=1.0" in printed
    student = image_of(fixed / "student", 1.0)
    assert (image_of(teacher_folder, 1.0, tmp_path / "out.safetensors") - student).abs().max() <= 1
    assert (image_of(teacher_folder, 1.0) - student).abs().max() > 1  # so the adapters do something
    code, printed = bkd("export", fixed, "-o", tmp_path / "half", "--dtype", "float16")
    assert code == 0, printed
    assert (image_of(tmp_path / "half", 1.0) - student).abs().max() <= 4
    size = (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.51 * (fixed / "student" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert one_pass_guidance(tmp_path / "half") == one_pass_guidance(fixed / "student")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "out.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("told", "trained the weights themselves"),
        ("pruned", "the student lacks"),
        ("pruned", "trained without adapters"),
    ],
)
def test_what_a_lora_file_cannot_express_is_refused_with_the_reasons(bkd_refuses, request, name, message):
    run = request.getfixturevalue(name)
    bkd_refuses(["export", run, "--format", "lora", "-o", "out.safetensors"], message)


def test_an_input_for_the_scale_and_another_prediction_are_reasons_too(bkd, bkd_refuses, train):
    overrides = [
        "stages.0.method.guidance_scale=[1,8]",
        "stages.0.method.prediction_type=epsilon",
        "samples.prompts=[]",
    ]
    run = train("both", "shapes/guided-lora", *overrides)
    for message in ("has an input for the guidance scale", "predicts epsilon, and the original"):
        bkd_refuses(["export", run, "--format", "lora", "-o", "out.safetensors"], message)
    assert json.loads((run / "student/scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"


def test_adapters_over_other_weights_than_the_teachers_make_no_file_for_it(bkd_refuses, train, pruned, fixed):
    path = f"stages.0.student={{path: {fixed}}}"
    run = train("over", "shapes/guided-lora", path, "stages.0.lora.share_base=false", "samples.prompts=[]")
    bkd_refuses(["export", run, "--format", "lora", "-o", "out.safetensors"], "the adapters belong to the weights of")


def test_adapters_that_no_loss_reaches_are_kept_all_the_same(train):
    features = "stages.0.method.loss={task: 0, output_kd: 0, feature_kd: 1}"
    overrides = ["stages.0.student.blocks=sd-tiny", "stages.0.lora.also_train=[norms]", features, "samples.prompts=[]"]
    run = train("unreached", "shapes/sd-small-lora", "stages.0.method.sites=self-attn", *overrides)
    adapter = Adapter.load(run / ADAPTER_FILE)
    adapter.put_on(build_student(load_pipeline(locate("shapes")).unet, adapter.plan))


def test_a_pruned_one_pass_student_still_knows_its_scale(bkd, fixed, tmp_path):
    code, printed = bkd("prune", fixed, "--blocks", "sd-tiny", "-o", tmp_path / "smaller")
    assert code == 0, printed
    assert one_pass_guidance(tmp_path / "smaller") == one_pass_guidance(fixed / "student")


def test_another_prediction_type_says_what_the_first_loss_is(capsys, train):
    train("epsilon", "shapes/guided", "stages.0.method.prediction_type=epsilon", "samples.prompts=[]")
    assert "the student predicts epsilon and its teacher does not: loss " in capsys.readouterr().out


def test_adapters_of_another_teacher_are_refused(bkd_refuses, fixed, told, tmp_path_factory):
    run = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(fixed, run)
    adapter = Adapter.load(run / ADAPTER_FILE)
    Adapter(adapter.tensors, adapter.lora, adapter.plan, "0" * 64).save(run / ADAPTER_FILE)
    bkd_refuses(["export", run, "--format", "lora", "-o", "x.safetensors"], "were trained on another teacher")


def test_adapters_of_another_plan_are_not_continued(bkd, train, shards):
    overrides = ["stages.0.student.blocks=sd-tiny", "samples.prompts=[]", "train.lr_schedule=constant"]
    run = train("forced", "shapes/sd-small-lora", *overrides)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "status": "stopped"}))
    shutil.rmtree(run / "student")
    again = ["train", "shapes/sd-small-lora", f"data.shards={shards[0].parent}", *SHORT, *overrides, "-o", run]
    other = [word.replace("sd-tiny", "sd-small") for word in map(str, again)]
    assert "run with other settings" in bkd(*other)[1]
    code, printed = bkd(*other, "--force")
    assert code == 1 and "the checkpoint's weights do not fit this student" in printed
    text = (run / "recipe.yaml").read_text()
    assert "blocks: sd-tiny" in text and "blocks: sd-small" not in text


def test_checkpoints_and_adapter_files_hold_what_trained(pruned):
    from safetensors.torch import load_file

    names = set(load_file(pruned / "checkpoints" / "00" / "00000004" / "trainable.safetensors"))
    assert all(".lora_" in name or "norm" in name for name in names)
    assert set(Adapter.load(pruned / ADAPTER_FILE).tensors) == names
    assert not any("lora" in name for name in load_file(next((pruned / "student" / "unet").glob("*.safetensors"))))


def test_a_students_guidance_is_distilled_from_the_full_teacher(bkd, train, pruned, tmp_path):
    path = f"stages.0.student={{path: {pruned}}}"
    run = train("path", "shapes/guided", path, "samples.prompts=[]")
    plan = load_plan(run / "student")
    assert plan.name == "sd-tiny" and plan.added
    code, printed = bkd("eval", run, "--num-prompts", 2, "--num-inference-steps", 2, "-o", tmp_path / "out")
    assert code == 0, printed
    rows = json.loads((tmp_path / "out" / "shapes.json").read_text())["models"]
    assert rows[0]["unet_parameters"] > rows[1]["unet_parameters"]


def test_a_finished_student_is_fine_tuned_with_and_without_adapters(bkd, train, pruned, tmp_path):
    for name in ("finetune", "lora-finetune"):
        run = train(name, f"shapes/{name}", f"teacher.id={pruned}", "samples.num_inference_steps=2")
        code, printed = bkd("eval", run, "--num-prompts", 2, "--num-inference-steps", 2, "--split", "theme-test")
        assert code == 0, printed
        names = [model["name"] for model in json.loads((run / "eval" / "shapes.json").read_text())["models"]]
        assert names == ["original", name] and "of original" in printed
        assert (run / "samples" / "00-final.png").is_file()
    assert "done" in bkd("export", run, "--format", "lora", "-o", tmp_path / "lora.safetensors")[1]
    assert (
        image_of(run / "student", 3.0) - image_of(pruned / "student", 3.0, tmp_path / "lora.safetensors")
    ).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes/guided", "stages.0.method.guidance_scale=[0.5,8]"], "should lie between 1 and 1000 (got 0.5)"),
        (["shapes/guided", "stages.0.method.guidance_scale=0.5"], "should lie between 1 and 1000 (got 0.5)"),
        (["shapes/guided", "stages.0.method.guidance_scale=[8,2]"], "a range goes up (got [8, 2])"),
        (["shapes/guided", "stages.0.method.name=guidd"], "did you mean 'guided'? (got 'guidd')"),
        (["shapes/guided", "stages.0.method.random_conditioning=true"], "of method 'guided'; it belongs to kd"),
        (["shapes/sd-small", "stages.0.student={path: nowhere}"], "stages.0.student.path=nowhere: no model 'nowhere'"),
        (["shapes/guided", "samples.guidance_scale=9"], "samples.guidance_scale=9 is not one that the student learns"),
        (["shapes/guided-lora", "stages.0.lora.target_modules=[to_qq]"], "did you mean 'to_q'?"),
        (["shapes/guided-lora", "stages.0.lora.r=64"], "this rank is larger than the module it would adapt"),
        (["shapes/guided-lora", "stages.0.lora.rank_pattern={to_q: 0}"], "a rank is 1 or more (got to_q: 0)"),
        (["shapes/guided-lora", "stages.0.lora.rank_pattern={'to_q[': 4}"], "is no regular expression"),
        (["shapes/guided-lora", "train.parallel=fsdp2"], "use train.parallel=ddp, or lora.share_base=false"),
        (["shapes/guided-lora", "stages.0.student={path: x}"], "lora.share_base: the weights of student.path"),
        (["shapes/guided", "stages.0.student.path=x"], "give either blocks or path"),
        (["shapes/guided", "stages.0.method.loss={output_kd: 0}"], "at least one weight should not be 0"),
        (["shapes/finetune", "teacher.id=nowhere"], "no model 'nowhere'"),
    ],
)
def test_recipes_that_cannot_be_are_refused(bkd_refuses, arguments, message):
    bkd_refuses(["train", *arguments, "-o", "run"], message)


def test_a_one_pass_student_teaches_nobody(bkd_refuses, told, fixed):
    message = "this model draws guided in one pass already"
    bkd_refuses(["train", "shapes/guided", "--teacher", told, "-o", "run"], message)
    bkd_refuses(["train", "shapes/guided", "--teacher", fixed, "-o", "run"], message)
    bkd_refuses(["train", "shapes/finetune", "--teacher", told, "-o", "run"], message)
    bkd_refuses(["train", "shapes/finetune", "--teacher", fixed, "samples.prompts=[]", "-o", "run"], message)
    bkd_refuses(["train", "shapes/sd-small", f"stages.0.student={{path: {told}}}", "-o", "run"], "does not train it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a run nor a student"),
        (["shapes"], "neither a run nor a student"),
        (["{fixed}", "--format", "onnx"], "unknown format 'onnx'"),
        (["{fixed}", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["{fixed}", "--format", "lora", "--dtype", "float16"], "a LoRA file is float32"),
        (["{fixed}", "--format", "lora"], "the output is a .safetensors file"),
    ],
)
def test_exports_that_cannot_be_are_refused(bkd_refuses, fixed, arguments, message):
    bkd_refuses(["export", *(word.format(fixed=fixed) for word in arguments), "-o", "out"], message)


def test_files_that_only_look_alike_are_told_apart(bkd_refuses, fixed, told):
    bkd_refuses(["export", fixed, "-o", "out.safetensors"], "a pipeline is a folder")
    adapter = ["remap", fixed / "adapter.safetensors", "--student", told / "student", "-o", "out.safetensors"]
    bkd_refuses(adapter, "--format lora -o lora.safetensors")
