"""docs/extend.md does what it says: its Python is run, and its method trains the embedded teacher's student."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from bkd.methods.base import Diffusion
from bkd.methods.captions import caption_encoder
from bkd.models.load import load_noise_schedule
from bkd.surgery import presets, unet
from bkd.surgery.build import build_student
from tests.test_data import cached
from tests.training import fit, loss_of

PAGE = Path(__file__).parent.parent / "docs" / "extend.md"


@pytest.fixture(scope="module")
def latents(teacher, teacher_folder, shards, tmp_path_factory):
    return cached(teacher, teacher_folder, shards[0].parent, tmp_path_factory.mktemp("latents"))


@pytest.fixture
def names(monkeypatch):
    """What the page's blocks define, in its order; its preset is taken back."""
    monkeypatch.setattr(unet, "PRESET_NAMES", (*presets.PRESET_NAMES, "sd-flat"))
    monkeypatch.setitem(presets.PRESETS, "sd-flat", None)  # so that it is gone afterwards
    found = {"__name__": "docs.extend"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(block, str(PAGE), "exec"), found)
    return found


def method_of(names, pipe, folder, blocks="sd-flat"):
    diffusion = Diffusion(
        schedule=load_noise_schedule(folder),
        scaling_factor=pipe.vae.config.scaling_factor,
        captions=caption_encoder(pipe),
        prompt_dropout=0.0,
    )
    plan = names["plan_removal"](pipe.unet.config, blocks)
    return names["HuberDistillation"](
        teacher=pipe.unet, student=build_student(pipe.unet, plan), diffusion=diffusion, settings=names["Huber"]()
    )


def test_the_preset_has_a_plan_and_a_student(names, teacher):
    student = build_student(teacher.unet, names["plan"])
    assert len(student.down_blocks) == 3 and student.mid_block is not None


def test_the_vocabulary_is_checked(names):
    adapter = TypeAdapter(names["Huber"])
    assert adapter.validate_json('{"name": "huber", "delta": 0.5}').delta == 0.5
    with pytest.raises(ValidationError):
        adapter.validate_json('{"name": "huber", "detla": 0.5}')


def test_the_teacher_has_nothing_to_learn_from_itself(names, teacher, teacher_folder, latents):
    assert loss_of(method_of(names, teacher, teacher_folder, blocks="none"), latents).total == 0


def test_its_method_trains(names, teacher, teacher_folder, latents, tmp_path):
    method = method_of(names, teacher, teacher_folder)
    before = {name: parameter.detach().clone() for name, parameter in method.trainable.named_parameters()}
    first = loss_of(method, latents).total.item()
    after = fit(method, latents, tmp_path)
    assert all(not torch.equal(before[name], tensor) for name, tensor in after.items())
    assert loss_of(method, latents).total.item() < first
    assert all(parameter.grad is None for parameter in teacher.unet.parameters())
