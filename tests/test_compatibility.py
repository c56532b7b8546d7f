"""Students elsewhere: what ControlNet really does with them, and students that others pruned."""

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from bkd.errors import SurgeryError
from bkd.surgery.build import build_empty, build_student
from bkd.surgery.compatibility import compatibility_notes
from bkd.surgery.recognise import recognise
from bkd.surgery.unet import plan_removal
from tests.conftest import SD1, SD2, SDXL, SMALL_SD1

# On 8 x 8 latents the innermost features are 1 x 1, which fits anything by broadcasting.
CONFIG = {**SMALL_SD1, "sample_size": 32}


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(CONFIG).eval()


@pytest.fixture(scope="module")
def control(teacher):
    """The residuals of a ControlNet made for the teacher."""
    net = ControlNetModel.from_unet(teacher, conditioning_channels=3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return net


def run(unet, control):
    rng = torch.Generator().manual_seed(0)
    sample, prompt = torch.randn(1, 4, 32, 32, generator=rng), torch.randn(1, 5, 16, generator=rng)
    with torch.no_grad():
        down, mid = control(sample, 10, prompt, torch.ones(1, 3, 256, 256), return_dict=False)
        return unet(sample, 10, prompt, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample


@pytest.mark.parametrize(
    ("blocks", "note"),
    [
        ("mid", "fit: all skip"),
        ("mid.attn", "fit: all skip"),
        ("down.0.attn,up.1.attn,mid.t0", "fit: all skip"),
        ("sd-small", "do not fit"),
        ("bk-small", "do not fit"),
        ("sd-tiny", "do not fit"),
        ("level.3", "do not fit"),
        ("down.0.1", "do not fit"),
        ("down.3.1", "run without an error on this student, and wrongly"),
    ],
)
def test_what_is_said_of_controlnets_is_so(teacher, control, blocks, note):
    plan = plan_removal(CONFIG, blocks)
    notes = compatibility_notes(CONFIG, plan)
    assert note in notes[0]
    student = build_student(teacher, plan)
    if "do not fit" in note:
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(student, control)
    else:
        assert run(student, control).isfinite().all()
    mid_gone = student.mid_block is None
    assert mid_gone == any("no mid block" in line for line in notes)
    if mid_gone:
        with pytest.raises(ValueError, match="unknown mid_block_type"):
            ControlNetModel.from_unet(student)


def test_nothing_is_said_of_a_whole_teacher():
    assert compatibility_notes(SD1, plan_removal(SD1, "none")) == ()


@pytest.mark.parametrize(
    ("config", "blocks"),
    [(SD1, "sd-small"), (SD1, "bk-small"), (SD2, "sd-tiny"), (SDXL, "koala-1b"), (SDXL, "koala-700m"), (SD1, "none")],
)
def test_students_pruned_elsewhere_are_recognised(config, blocks):
    """Their configurations are all that others publish: all keys are there, with lists where tuples went in."""
    student = dict(build_empty(config, plan_removal(config, blocks)).config)
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in student.items()}
    assert recognise(config, listed) == plan_removal(config, blocks)


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        (SD1, "down.1.1"),
        (SD1, "level.3"),
        (SD1, "mid.attn,up.1.attn"),
        (SDXL, "down.2.0.t9"),
        (SDXL, "sd-small,mid.attn"),
    ],
)
def test_other_students_are_taken_to_be_the_default_removal(config, blocks):
    plan = plan_removal(config, blocks)
    assert recognise(config, {**config, **plan.overrides}).removed == plan.removed


def test_renamed_layers_of_a_recognised_student():
    plan = recognise(SD1, {**SD1, "layers_per_block": 1})
    assert plan.name == "sd-small"
    assert plan.source_of("up_blocks.3.resnets.1.conv1.weight") == "up_blocks.3.resnets.2.conv1.weight"


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (SD1, SD2, r"cross_attention_dim: this UNet cannot come from that teacher(.|\n)*1024(.|\n)*768"),
        (SD1, {**SD1, "block_out_channels": [320, 640, 960, 1280]}, "block_out_channels: this UNet cannot come"),
        (SD1, {**SD1, "layers_per_block": 3}, r"layers: this UNet cannot come(.|\n)*\[3, 3, 3, 3\]"),
        (SD1, {**SD1, "layers_per_block": [2, 0, 2, 2]}, r"layers: this UNet cannot come(.|\n)*\[2, 0, 2, 2\]"),
        (SD1, {**SD1, "layers_per_block": 1, "attention_head_dim": 16}, r"attention_head_dim: this UNet(.|\n)*16"),
        (SD2, {**SD2, "attention_head_dim": [5, 10, 20, 40]}, "attention_head_dim: this UNet cannot come"),
        ({**SD1, "mid_block_type": "UNetMidBlock2D"}, SD1, "layers: this UNet cannot come"),
        ({**SD1, "mid_block_type": None}, SD1, "layers: this UNet cannot come(.|\n)*with mid block"),
    ],
)
def test_what_is_no_student_is_said_to_be_none(teacher, student, message):
    with pytest.raises(SurgeryError, match=message):
        recognise(teacher, student)
