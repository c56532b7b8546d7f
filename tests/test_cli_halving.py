"""Recipes of several stages and students of few steps, as a user meets them."""

import json
import shutil
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from bkd.diffusion.few_steps import FewSteps, few_steps
from bkd.diffusion.guidance import one_pass_guidance
from bkd.diffusion.sampling import StochasticScheduler
from bkd.diffusion.schedulers import CHOICES
from bkd.diffusion.terms import SCHEDULERS
from bkd.eval.generate import generate
from bkd.eval.shown import TIMES
from bkd.models.load import load_pipeline
from bkd.models.locate import locate
from bkd.runs.folder import RunFolder
from bkd.surgery.plan import load_plans
from bkd.training.fit import Fit
from bkd.training.stop import Interrupted
from tests.training import train_here

PROMPT = "a small blue circle at the bottom right on a gray background"
CHAIN = """
teacher: {id: shapes}
train: {batch: 8, lr: 5e-4, max_steps: 2, ema: 0.5, checkpoint_every: 2, log_every: 1, trackers: []}
stages:
  - student: {blocks: sd-tiny}
    method: {name: kd}
  - method: {name: guided, guidance_scale: [1, 8]}
    train: {max_steps: 3, lr_schedule: linear}
  - method: {name: halving, num_inference_steps: [16, 4]}
    train: {batch: 4, prompt_dropout: 0.0}
samples: {num_inference_steps: 2, guidance_scale: 3.0, prompts: [a small blue circle]}
"""
NAMES = ["00-kd", "01-guided", "02-halving-8"]


@pytest.fixture(scope="module")
def train(shards, cache, tmp_path_factory):
    """Train a recipe in this process, without the reload in another; returns the run folder."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, text, *overrides, code=0):
        recipe = root / f"{name}.yaml"
        recipe.write_text(text)
        train_here(recipe, f"data.shards={shards[0].parent}", *overrides, "-o", root / name, code=code)
        return root / name

    return run


@pytest.fixture(scope="module")
def chain(train):
    return train("chain", CHAIN)


@pytest.fixture(scope="module")
def stochastic(train):
    return train("stochastic", halving_recipe(num_inference_steps="[4, 4]", sampler="stochastic"))


def halving_recipe(**settings):
    method = ", ".join(f"{key}: {value}" for key, value in settings.items())
    train = "{batch: 4, lr: 1e-4, max_steps: 2, checkpoint_every: 2, log_every: 1, trackers: []}"
    return f"teacher: {{id: shapes}}\ntrain: {train}\nstages: [{{method: {{name: halving, {method}}}}}]\n"


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_stage_ends_in_a_student_that_teaches_the_next(chain):
    folders = [chain / "stages" / name / "student" for name in NAMES] + [chain / "student"]
    assert sorted(p.name for p in (chain / "stages").iterdir()) == NAMES
    facts = [json.loads((folder / "bkd_plan.json").read_text()) for folder in folders]
    assert [each["steps"] for each in facts] == [2, 3, 2, 2]
    assert [each["teacher"] for each in facts] == ["shapes", *(f"stages/{name}/student" for name in NAMES)]
    assert [few_steps(folder) for folder in folders] == [None, None, FewSteps(8), FewSteps(4)]
    assert [one_pass_guidance(folder) is not None for folder in folders] == [False, True, True, True]
    assert [plan.name for plan, _ in load_plans(folders[-1])] == ["none", "none", "none", "sd-tiny"]
    lines = [json.loads(line) for line in (chain / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (s, k + 1) for s, n in enumerate([2, 3, 2, 2]) for k in range(n)
    ]
    rates = [line["lr"] for line in lines if line["stage"] == 1]
    assert rates == pytest.approx([5e-4, 5e-4 * 2 / 3, 5e-4 / 3])  # a schedule of its own
    assert {"halving_loss", "single_step_loss"} <= lines[-1].keys()
    assert sorted(p.name for p in (chain / "samples").iterdir()) == [f"0{n}-final.png" for n in range(4)]


def test_a_student_of_few_steps_draws_the_same_in_stock_diffusers(chain, stochastic):
    for run, steps, stock in ((chain, 4, DDIMScheduler), (stochastic, 2, DDIMScheduler)):
        pipe = StableDiffusionPipeline.from_pretrained(run / "student", safety_checker=None)
        assert type(pipe.scheduler) is stock
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn = pipe(PROMPT, latents=noise, num_inference_steps=steps, guidance_scale=1.0, output_type="pt").images
        ours = load_pipeline(run / "student")
        ours.scheduler = stock.from_config(pipe.scheduler.config)
        inside = generate(ours, [PROMPT], num_inference_steps=steps, guidance_scale=1.0, seed=0)
        assert ((drawn[0] * 255).round() - inside[0].float()).abs().max() <= 1
    middle = StableDiffusionPipeline.from_pretrained(chain / "stages" / NAMES[1] / "student", safety_checker=None)
    assert middle.scheduler.config.timestep_spacing == "trailing"


def test_a_count_that_does_not_divide_gets_the_other_scheduler(train):
    run = train("sixteen", halving_recipe(num_inference_steps="[32, 16]"))
    pipe = StableDiffusionPipeline.from_pretrained(run / "student", safety_checker=None)
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler and pipe.scheduler.config.solver_order == 1
    json.loads((run / "student" / "scheduler" / "scheduler_config.json").read_text(), parse_constant=pytest.fail)


def test_a_stochastic_student_is_drawn_with_its_sampler(bkd, stochastic, tmp_path):
    assert few_steps(stochastic / "student") == FewSteps(4, "stochastic")
    ours = load_pipeline(stochastic / "student")
    assert type(ours.scheduler) is StochasticScheduler
    stock = StableDiffusionPipeline.from_pretrained(stochastic / "student", safety_checker=None)
    stock.scheduler = StochasticScheduler.from_config(stock.scheduler.config)  # as the documentation has it
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    how = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    drawn = ((ours, 0), (stock, 0), (stock, 1))
    one, same_noise, other = (pipe(PROMPT, generator=torch.manual_seed(seed), **how) for pipe, seed in drawn)
    assert torch.allclose(one.images, same_noise.images, atol=1e-5) and not torch.equal(one.images, other.images)
    assert bkd("sample", stochastic, "--prompt", PROMPT, "--guidance-scale", 1, "-o", tmp_path / "drawn")[0] == 0


def test_a_run_continues_inside_a_stage_and_between_stages(train, chain, monkeypatch):
    """Stopped four times, in and after stages, it ends in the same weights."""
    saves, stops = [], [1, 2, 4, 6]
    save = Fit._save

    def save_and_stop(fit, step):
        save(fit, step)
        saves.append(step)
        if len(saves) in stops:
            raise Interrupted

    monkeypatch.setattr(Fit, "_save", save_and_stop)
    for _ in stops:
        train("cut", CHAIN, "train.checkpoint_every=1", code=75)
    cut = train("cut", CHAIN, "train.checkpoint_every=1")
    for name in [*(f"stages/{name}/student" for name in NAMES), "student"]:
        assert same(weights(cut / name), weights(chain / name)), name
    assert (cut / "metrics.jsonl").read_text().count("\n") == 9
    train("cut", CHAIN, "train.checkpoint_every=1")  # done already
    assert len(saves) == 2 + 3 + 2 + 2  # no step was repeated


def test_what_a_stage_held_is_gone_when_the_next_begins(train, monkeypatch):
    held, run = [], Fit.run

    def watched(fit, stop):
        assert not any(reference() is not None for reference in held)
        held.extend(map(weakref.ref, (fit, fit._method.trainable, fit._method.teacher, fit._optimizer)))
        run(fit, stop)

    monkeypatch.setattr(Fit, "run", watched)
    train("released", halving_recipe(num_inference_steps="[4, 1]"))
    assert len(held) == 8


def test_a_finished_stage_keeps_its_student_and_no_checkpoints(bkd, train, chain, tmp_path):
    assert [path.name for path in (chain / "checkpoints").iterdir()] == ["03"]  # the last stage may grow
    copy = shutil.copytree(chain, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints"), shutil.rmtree(copy / "student")
    code, printed = bkd("train", RunFolder(copy).recipe_file, "seed=7", "-o", copy)
    assert code == 1 and "seed is 0 there and 7 here" in printed  # and not a new run of students of other seeds


def test_only_the_last_stage_may_grow(bkd, train, chain):
    def asked(*overrides, run=chain):
        return bkd("train", RunFolder(run).recipe_file, *overrides, "-o", run)

    assert asked()[1].startswith("already done")
    code, printed = asked("stages.0.train.max_steps=4")
    assert code == 1 and "stage 1: train.max_steps is None there and 4 here" in printed
    grown = train("grown", halving_recipe(num_inference_steps="[4, 1]"))
    bkd("train", "--help")  # what it printed before is out of the way
    code, printed = asked("stages.1.train.max_steps=3", run=grown)
    assert code == 0 and "stage 2 of 2" in printed and "stage 1 of 2" not in printed
    assert json.loads((grown / "student" / "bkd_plan.json").read_text())["steps"] == 3


def test_adapters_are_halved_over_shared_weights(train, chain):
    text = halving_recipe(num_inference_steps="[4, 1]").replace("stages: [{", "stages: [{lora: {r: 2}, ")
    text = text.replace("id: shapes", f"id: {chain}")
    run = train("adapted", text, "train.lr=1e-2")
    assert (run / "adapter.safetensors").is_file() and (
        run / "stages" / "00-halving-2" / "adapter.safetensors"
    ).is_file()
    assert one_pass_guidance(run / "student") == one_pass_guidance(chain / "student")  # what it halves is what it was
    before, after = weights(chain / "student"), weights(run / "student")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".weight") for name in changed)
    assert "time_embedding.cond_proj.weight" in changed


def test_models_of_different_steps_are_measured_side_by_side(bkd, chain, tmp_path):
    models = [chain, chain / "stages" / NAMES[1] / "student"]
    code, printed = bkd("eval", *models, "--num-prompts", 2, "--split", "test", "-o", tmp_path / "out")
    assert code == 0, printed
    found = json.loads((tmp_path / "out" / "shapes.json").read_text())["models"]
    rows = {row["name"]: (row["num_inference_steps"], row["passes_a_step"]) for row in found}
    earlier = {"chain untrained": (2, 2), "chain/00-kd": (2, 2), "chain/02-halving-8": (8, 1)}
    assert rows == {"teacher": (2, 2), **earlier, "chain": (4, 1), "01-guided": (2, 1)}
    assert f"4 {TIMES} 1" in printed and "MACs an image" in printed
    assert "with the steps and the sampler that they were trained for: chain/02-halving-8, chain" in printed
    assert bkd("report", chain)[0] == 0
    page = (chain / "report.html").read_text()
    titles = ["sd-tiny by kd", "all blocks by guided", "halving 16 to 8 steps", "halving 8 to 4 steps"]
    assert all(f"Stage {number} of 4: {title}" in page for number, title in enumerate(titles, 1))
    assert page.count("removed: ") == 1 and page.count("<strong>halving_loss</strong>") == 1
    assert page.count("stage 4 of 4") > 0 and "<td>stages/02-halving-8/student</td>" in page


def test_another_sampler_for_a_model_of_any_number_of_steps(bkd, tmp_path):
    assert tuple(CHOICES) == SCHEDULERS
    for name in SCHEDULERS:
        arguments = ["--scheduler", name, "--num-inference-steps", 4, "-o", tmp_path / name]
        assert bkd("sample", "shapes", "--prompt", PROMPT, *arguments)[0] == 0
    ddim, dpm = ((tmp_path / name / "0000.png").read_bytes() for name in ("ddim", "dpm++"))
    assert ddim != dpm


def test_a_sampler_that_nobody_knows_or_that_is_not_the_students(bkd_refuses, chain):
    bkd_refuses(["sample", "shapes", "--prompt", PROMPT, "--scheduler", "ddi", "-o", "out"], "did you mean 'ddim'?")
    trained = ["sample", chain / "student", "--prompt", PROMPT, "--scheduler", "ddim", "-o", "out"]
    bkd_refuses(trained, "was trained for one sampler\n  got: ddim\n  allowed: 4 steps")


def test_the_folders_of_a_run_are_drawn_with_alike(bkd, chain, tmp_path):
    stage = chain / "stages" / NAMES[0]
    for model, how in (
        (chain, "4 steps, guidance 3"),
        (chain / "student", "4 steps, guidance 3"),
        (stage, "2 steps, guidance 3"),
        (stage / "student", "2 steps, guidance 3"),
    ):
        code, printed = bkd("sample", model, "--prompt", PROMPT, "-o", tmp_path / f"{model.parent.name}-{model.name}")
        assert code == 0 and f"drawing 1 picture: {how}" in printed


def test_a_teacher_that_another_recipe_makes_is_named(bkd_refuses):
    message = "teacher.id=runs/shapes/halving/stages/00-guided/student: no model"
    bkd_refuses(["train", "shapes/encoder"], message)
    bkd_refuses(["train", "shapes/encoder"], "try: train it first: bkd train shapes/halving")


def test_a_note_is_printed_once_for_all_stages_that_it_is_true_of(bkd, shards):
    where = f"data.shards={shards[0].parent}"
    code, printed = bkd("train", "shapes/halving", where, "train.batch=4", "train.ema=0.9999", "--dry-run")
    assert code == 0
    notes = " ".join(printed[printed.index("note: ") :].split())
    assert notes.count("averages over 10,000 steps of only 250") == notes.count("of only 800") == 1
    assert "note: stages 2, 3, 4, 5: train.ema=0.9999 averages" in notes


def test_a_wish_that_cannot_be_halved_is_refused(bkd_refuses, chain, stochastic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")

    def refuses(message, teacher="shapes", **settings):
        recipe = folder / "recipe.yaml"
        recipe.write_text(halving_recipe(**settings).replace("id: shapes", f"id: {teacher}"))
        bkd_refuses(["train", recipe, "-o", "run"], message)

    refuses(
        "8 steps cannot be halved until 3 are left (allowed: [8, M] with M one of 4, 2, 1)",
        num_inference_steps="[8, 3]",
    )
    refuses("4 steps cannot be halved until 8 are left; did you mean [8, 4]?", num_inference_steps="[4, 8]")
    refuses("1 step cannot be halved until 8 are left; did you mean [8, 1]?", num_inference_steps="[1, 8]")
    refuses("num_inference_steps: too few items: [N, M], from N steps to M (got [8])", num_inference_steps="[8]")
    refuses("should have 2 items: [N, M], from N steps to M (got [8, 4, 2])", num_inference_steps="[8, 4, 2]")
    refuses("4 steps cannot be halved until 4 are left", num_inference_steps="[4, 4]")
    refuses("7 steps cannot be halved until 1 are left (allowed: an even number", num_inference_steps="[7, 1]")
    refuses("16 steps cannot be halved until 0 are left", num_inference_steps="[16, 0]")
    refuses("should lie between 1 and 1000 (got 0)", num_inference_steps="[0, 0]", sampler="stochastic")
    refuses("should be a whole number (got 2.5)", num_inference_steps="[5, 2.5]")
    refuses("two steps ahead, and 1 is odd", num_inference_steps="[2, 1]", sampler="stochastic")
    refuses("an inversion is deterministic", num_inference_steps="[8, 4]", sampler="stochastic", direction="inversion")
    for count in (96, 192, 224):
        refuses("do not lie in pairs on the grid of half as many", num_inference_steps=f"[{count}, {count // 2}]")
    student = chain / "student"
    refuses("got: 4 steps; to be halved: 8 steps", teacher=student, num_inference_steps="[8, 4]")
    refuses("method.num_inference_steps=[4, M]", teacher=student, num_inference_steps="[8, 4]")
    refuses("halve the model that it was made of", teacher=stochastic / "student", num_inference_steps="[4, 2]")
    inverted = {"num_inference_steps": "[8, 4]", "direction": "inversion", "prediction_type": "sample"}
    refuses("stages.0.method.prediction_type: of an image without noise, which an inversion begins with", **inverted)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("[8, 4]", "[8, 4]", "the student of stage 1 (halving 8 to 4 steps): this teacher takes other steps"),
        ("[4, 1]", "[2, 1]", "got: 1 step; to be halved: 2 steps\n  try: leave the stage out: an odd number of steps"),
        ("[192, 48]", "[48, 24]", "stage 1 (halving 192 to 96 steps): method.num_inference_steps: the steps of this"),
    ],
)
def test_what_is_wrong_with_a_stage_names_it_as_people_count(bkd_refuses, first, second, message):
    stages = ", ".join(f"{{method: {{name: halving, num_inference_steps: {steps}}}}}" for steps in (first, second))
    bkd_refuses(["train", "shapes/halving", f"stages=[{stages}]", "-o", "run"], message)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
            "without signal at its end\n  allowed: v_prediction or sample, of teacher and student",
        ),
        ({"_class_name": "LCMScheduler"}, "is not drawn with as DDIM would"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "DDIMScheduler with thresholding"),
        ({"_class_name": "EDMEulerScheduler"}, "not trained on a noise schedule of DDPM's kind"),
    ],
)
def test_a_teacher_that_ddim_does_not_describe_is_refused(bkd_refuses, tmp_path_factory, scheduler, message):
    folder = copied(locate("shapes"), tmp_path_factory.mktemp("teacher"), scheduler)
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(halving_recipe(num_inference_steps="[8, 4]").replace("id: shapes", f"id: {folder}"))
    bkd_refuses(["train", recipe, "-o", "run"], message)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers_of_the_same_noise_levels_are_converted(train, tmp_path_factory, name):
    folder = copied(locate("shapes"), tmp_path_factory.mktemp("teacher"), {"_class_name": name, "steps_offset": 1})
    text = halving_recipe(num_inference_steps="[8, 4]").replace("id: shapes", f"id: {folder}")
    run = train(f"of-{name}", text)
    assert (
        type(StableDiffusionPipeline.from_pretrained(run / "student", safety_checker=None).scheduler) is DDIMScheduler
    )


def copied(folder, target, scheduler):
    """A model with another scheduler's configuration."""
    made = shutil.copytree(folder, target / "model")
    path = made / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scheduler}))
    if "_class_name" in scheduler:
        index = made / "model_index.json"
        known = json.loads(index.read_text())
        index.write_text(json.dumps({**known, "scheduler": ["diffusers", scheduler["_class_name"]]}))
    return made


def test_what_a_halved_student_does_not_do(bkd_refuses, chain):
    student = chain / "student"
    drawn = ["sample", student, "--prompt", PROMPT, "--num-inference-steps", 25, "-o", "out"]
    bkd_refuses(drawn, "got: 25 steps\n  allowed: 4 steps")
    for method in ("kd", "finetune", "guided"):
        arguments = ["train", "shapes/sd-small", f"teacher.id={student}", f"stages.0.method={{name: {method}}}"]
        bkd_refuses([*arguments, "-o", "run"], "knows a few noise levels only")
    later = ["train", "shapes/sd-small", "-o", "run", "stages=[{}, {student: {path: x}}]"]
    bkd_refuses(later, "stages.1.student.path: a later stage goes on with the student of the stage before it")


def test_what_is_handed_on_says_how_many_steps_it_takes(bkd, train, chain, tmp_path):
    code, printed = bkd("export", chain, "-o", tmp_path / "folder")
    assert code == 0 and "it was halved to 4 steps: call the pipeline with num_inference_steps=4" in printed
    assert "it is told the guidance scale: call the pipeline with guidance_scale=1 to 8" in printed
    assert few_steps(tmp_path / "folder") == FewSteps(4)
    text = halving_recipe(num_inference_steps="[4, 2]").replace("stages: [{", "stages: [{lora: {r: 2}, ")
    run = train("lora", text)
    code, printed = bkd("export", run, "--format", "lora", "-o", tmp_path / "two.safetensors")
    printed = " ".join(printed.split())
    assert code == 0 and "call the pipeline with num_inference_steps=2" in printed
    assert f"its scheduler: {run / 'student' / 'scheduler'}" in printed
    encoder = train("encoder", halving_recipe(num_inference_steps="[4, 2]", direction="inversion"))
    printed = " ".join(bkd("export", encoder, "-o", tmp_path / "encoder")[1].split())
    assert "the image's latents and bkd.diffusion.sampling.InversionScheduler, or use bkd edit" in printed
    chained = text.replace("[4, 2]", "[4, 1]")
    code, printed = bkd("export", train("loras", chained), "--format", "lora", "-o", tmp_path / "one.safetensors")
    assert code == 1 and "adapters of stage 2, over the student of stage 1" in printed


def test_a_pruned_student_still_knows_its_steps(bkd, stochastic, tmp_path):
    assert bkd("prune", stochastic / "student", "--blocks", "sd-tiny", "-o", tmp_path / "tiny")[0] == 0
    assert few_steps(tmp_path / "tiny") == FewSteps(4, "stochastic")
