"""What a training starts from: what does not fit is refused, and what changes meanwhile is noticed."""

import json
import shutil
import sys

import pytest
import torch
from diffusers import schedulers

from bkd.cli.app import main
from bkd.diffusion.scheduler_kinds import NOT_FOR_SAMPLE
from bkd.errors import ModelError, OutputError, RecipeError
from bkd.lora.adapter_file import ADAPTER_FILE, Adapter
from bkd.methods.base import NoisyBatch
from bkd.methods.captions import Conditioning
from bkd.models.folder import model_digest, unet_config
from bkd.recipe.load import load_recipe
from bkd.recipe.stages import Stage, Student
from bkd.runs.folder import RunFolder
from bkd.runs.run import check_stages
from bkd.runs.stage import require_same_start
from bkd.surgery.plan import PLAN_FILE
from bkd.surgery.unet import plan_removal
from bkd.training.fit import Fit


@pytest.fixture
def folder(teacher_folder, tmp_path):
    """A copy of the embedded pipeline."""
    return shutil.copytree(teacher_folder, tmp_path / "model")


def change(folder, name, **settings):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def claim(folder, teacher_folder, plan, **facts):
    """Have a folder say that it is a student of the embedded teacher."""
    facts = {**json.loads(plan.to_json()), "teacher_digest": model_digest(teacher_folder), **facts}
    (folder / PLAN_FILE).write_text(json.dumps(facts))


def recipe_of(folder, *overrides):
    return load_recipe("shapes/sd-small", [f"stages.0.student={{path: {folder}}}", *overrides])


@pytest.mark.parametrize("method", ["kd", "finetune"])
def test_a_student_of_one_scale_is_not_made_to_unlearn_it(folder, teacher_folder, method):
    guidance = {"low": 3.0, "high": 3.0, "takes_scale": False}
    claim(folder, teacher_folder, plan_removal(unet_config(teacher_folder), "none"), guidance=guidance)
    with pytest.raises(RecipeError, match=r"(?s)guided in one pass already.*guidance_scale 3; method.*method guided"):
        check_stages(recipe_of(folder, f"stages.0.method={{name: {method}}}"), teacher_folder)
    guided = "stages.0.method={name: guided, guidance_scale: 5}"
    check_stages(recipe_of(folder, guided, "samples.guidance_scale=5"), teacher_folder)


def test_the_size_of_an_earlier_training_does_not_stay(folder, teacher_folder):
    plan = plan_removal(unet_config(teacher_folder), "none")
    native = unet_config(teacher_folder)["sample_size"]
    claim(folder, teacher_folder, plan.at_size(2 * native, native))
    (now,) = check_stages(recipe_of(folder), teacher_folder)
    assert now.plan == plan
    assert plan.at_size(2 * native, native).overrides["sample_size"] == 2 * native


@pytest.mark.parametrize(
    "settings",
    [
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"prediction_type": "flow_prediction"},
    ],
)
def test_schedules_of_another_kind_are_refused_and_not_read_as_ddpm(folder, settings):
    change(folder, "scheduler/scheduler_config.json", **settings)
    with pytest.raises(ModelError, match=r"not trained on a noise schedule of DDPM's kind|prediction_type"):
        check_stages(load_recipe("shapes/sd-small"), folder)


@pytest.mark.parametrize("name", NOT_FOR_SAMPLE)
def test_schedulers_without_sample_prediction_are_known(folder, name):
    change(folder, "scheduler/scheduler_config.json", _class_name=name)
    overrides = ["stages.0.method.prediction_type=sample", "stages.0.method.guidance_scale=3"]
    with pytest.raises(RecipeError, match=name):
        check_stages(load_recipe("shapes/guided", overrides), folder)
    if name != "PNDMScheduler":  # whose constructor refuses it
        scheduler = getattr(schedulers, name)(prediction_type="sample")
        scheduler.set_timesteps(4)
        with pytest.raises(NotImplementedError):
            scheduler.step(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.zeros(1, 4, 8, 8))


def test_a_starting_student_that_changes_is_noticed(folder, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.facts_file.write_text("{}")
    stage = Stage(student=Student(path=str(folder)))
    require_same_start(run, stage, force=False)
    require_same_start(run, stage, force=False)
    change(folder, "unet/config.json", _note="another")
    with pytest.raises(OutputError, match="this run was started with another starting student digest"):
        require_same_start(run, stage, force=False)
    require_same_start(run, stage, force=True)
    require_same_start(run, stage, force=False)


def test_a_teacher_that_changes_meanwhile_is_noticed(folder, shards, cache, tmp_path, monkeypatch):
    """Adapters are merged onto what is read again, and the other parts are copied."""
    run = Fit.run

    def run_and_change(self, stop):
        run(self, stop)
        change(folder, "unet/config.json", _note="another")

    monkeypatch.setattr(Fit, "run", run_and_change)
    command = ["train", "shapes/sd-small-lora", "--teacher", str(folder), f"data.shards={shards[0].parent}"]
    command += ["train.batch=4", "train.max_steps=1", "train.warmup_steps=0", "samples.prompts=[]"]
    monkeypatch.setattr(sys, "argv", ["bkd", *command, "-o", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and not (tmp_path / "run" / "student").exists()


def test_weights_that_cannot_be_finite_are_refused(folder):
    change(folder, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, prediction_type="epsilon")
    recipe = load_recipe("shapes/guided", ["stages.0.method.loss={weighting: truncated-snr}"])
    with pytest.raises(RecipeError, match=r"(?s)noisiest timestep epsilon does not say.*weighting=none"):
        check_stages(recipe, folder)
    check_stages(load_recipe("shapes/guided", ["stages.0.method.loss={weighting: none}"]), folder)


def test_a_run_with_adapters_is_not_done_without_them(shards, cache, tmp_path, monkeypatch):
    command = ["train", "shapes/sd-small-lora", f"data.shards={shards[0].parent}", "train.batch=4", "train.max_steps=1"]
    command += ["train.warmup_steps=0", "samples.prompts=[]", "-o", str(tmp_path / "run")]
    save = Adapter.save

    def disk_full(self, path):
        raise OSError(28, "No space left on device")

    for saving in (disk_full, save):
        monkeypatch.setattr(Adapter, "save", saving)
        monkeypatch.setattr(sys, "argv", ["bkd", *command])
        with pytest.raises((SystemExit, OSError)) as ended:
            main()
        assert (tmp_path / "run" / "student").exists() == (saving is save)
    assert ended.value.code == 0 and (tmp_path / "run" / ADAPTER_FILE).is_file()


def test_sizes_in_pixels_are_not_rounded():
    told = {}

    def unet(latents, timesteps, prompt_embeds, added_cond_kwargs, **others):
        told.update(added_cond_kwargs)
        return (latents,)

    latents, nothing = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    batch = NoisyBatch(latents, latents, nothing.long(), None, nothing.bool(), None, None)
    sizes = torch.tensor([[1333.0, 2001.0, 0, 0, 1024, 1024]])
    conditioning = Conditioning(torch.zeros(1, 3, 8), {"text_embeds": torch.zeros(1, 8), "time_ids": sizes})
    batch.predict(unet, conditioning, torch.bfloat16)
    assert torch.equal(told["time_ids"], sizes) and told["text_embeds"].dtype == torch.bfloat16
