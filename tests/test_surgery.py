"""The surgeon: exact sizes, bit-equal weights, and configurations that say what was built."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from bkd.errors import SurgeryError
from bkd.surgery.build import build_empty, build_student
from bkd.surgery.cost import unet_cost
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.presets import PRESET_NAMES
from bkd.surgery.unet import plan_removal
from tests.conftest import SD1, SD2, SDXL

SD_PRESETS = [name for name in PRESET_NAMES if not name.startswith("koala")]

COUNTS = {
    ("SD1", "none"): 859_520_964,
    ("SD1", "sd-small"): 579_384_964,
    ("SD1", "bk-base"): 579_384_964,
    ("SD1", "bk-small"): 482_346_884,
    ("SD1", "sd-tiny"): 323_384_964,
    ("SD1", "bk-tiny"): 323_384_964,
    ("SD2", "none"): 865_910_724,
    ("SD2", "sd-small"): 583_480_964,
    ("SD2", "bk-small"): 485_787_524,
    ("SD2", "sd-tiny"): 326_825_604,
    ("SDXL", "none"): 2_567_463_684,
    ("SDXL", "koala-1b"): 1_161_184_324,
    ("SDXL", "koala-700m"): 782_822_724,
}


def inputs(unet, seed=0):
    rng = torch.Generator().manual_seed(seed)
    side = unet.config.sample_size
    return (
        torch.randn(2, 4, side, side, generator=rng),
        torch.tensor([3, 700]),
        torch.randn(2, 24, unet.config.cross_attention_dim, generator=rng),
    )


@pytest.mark.parametrize(("model", "preset"), COUNTS)
def test_published_parameter_counts(model, preset):
    config = {"SD1": SD1, "SD2": SD2, "SDXL": SDXL}[model]
    unet = build_empty(config, plan_removal(config, preset))
    assert sum(p.numel() for p in unet.parameters()) == COUNTS[model, preset]


@pytest.mark.parametrize(
    ("preset", "without_attention", "total"),
    [("none", 338.6, 401.6), ("sd-small", 223.7, 261.5), ("bk-small", 217.6, 255.4), ("sd-tiny", 205.0, 242.8)],
)
def test_published_macs(preset, without_attention, total):
    cost = unet_cost(SD1, plan_removal(SD1, preset))
    assert round(cost.macs_without_attention / 1e9, 1) == without_attention
    assert round(cost.macs / 1e9, 1) == total


@pytest.mark.parametrize(
    ("preset", "without_attention", "total"),
    [("none", 2988.7, 3380.6), ("koala-1b", 1515.4, 1715.9), ("koala-700m", 1176.2, 1350.8)],
)
def test_published_macs_of_sdxl(preset, without_attention, total):
    cost = unet_cost(SDXL, plan_removal(SDXL, preset))
    assert round(cost.macs_without_attention / 1e9, 1) == without_attention
    assert round(cost.macs / 1e9, 1) == total


def test_koala_keeps_the_first_layers_of_each_stack():
    plan = plan_removal(SDXL, "koala-700m")
    assert {"mid", "down.2.1", "up.0.1", "up.0.2.t5", "down.2.0.t9"} <= {*plan.removed}
    assert not any(unit.endswith((".t0", ".t4")) for unit in plan.removed)
    block = "up_blocks.0.attentions.1.transformer_blocks.4.attn1.to_q.weight"
    assert plan.source_of(block) == block.replace("attentions.1", "attentions.2")


@pytest.mark.parametrize("preset", SD_PRESETS)
def test_every_tensor_is_the_teachers(teacher, preset):
    plan = plan_removal(teacher.unet.config, preset)
    student = build_student(teacher.unet, plan)
    theirs = teacher.unet.state_dict()
    for key, tensor in student.state_dict().items():
        assert torch.equal(tensor, theirs[plan.source_of(key)]), key
        assert tensor.data_ptr() != theirs[plan.source_of(key)].data_ptr()
    assert type(student) is UNet2DConditionModel


def test_removing_nothing_changes_nothing(teacher):
    student = build_student(teacher.unet, plan_removal(teacher.unet.config, "none"))
    x = inputs(teacher.unet)
    with torch.no_grad():
        assert torch.equal(student(*x).sample, teacher.unet(*x).sample)


@pytest.mark.parametrize("preset", SD_PRESETS)
def test_saved_and_reloaded_students_compute_the_same(teacher, preset, tmp_path):
    student = build_student(teacher.unet, plan_removal(teacher.unet.config, preset))
    student.save_pretrained(tmp_path)
    reloaded, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for parameter in reloaded.parameters():  # unaligned mapped weights may round differently
        parameter.data = parameter.data.clone()
    x = inputs(student)
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(*x).sample, student(*x).sample)


def test_overrides_are_read_back(teacher):
    plan = plan_removal(teacher.unet.config, "bk-small")
    student = build_student(teacher.unet, plan)
    assert student.config.mid_block_type is None and student.config.layers_per_block == 1


def test_an_override_that_diffusers_ignores_is_noticed(teacher):
    plan = plan_removal(teacher.unet.config, "none")
    bent = RemovalPlan(**{**vars(plan), "overrides": {"layers_per_block": [1, 1, 1, 1]}})
    with pytest.raises(SurgeryError, match=r"does not fit this teacher|ignored an override"):
        build_student(teacher.unet, RemovalPlan(**{**vars(bent), "renamed": {"up_blocks.0": "up_blocks.9"}}))


def test_a_plan_for_another_teacher_is_refused(teacher):
    narrower = {**teacher.unet.config, "block_out_channels": (32, 64, 64, 64)}
    with pytest.raises(SurgeryError, match="does not fit this teacher"):
        build_student(teacher.unet, RemovalPlan(**{**vars(plan_removal(narrower, "sd-tiny")), "renamed": {}}))


def test_tiny_renames_blocks_and_layers():
    plan = plan_removal(SD1, "sd-tiny")
    assert plan.source_of("up_blocks.0.resnets.0.conv1.weight") == "up_blocks.1.resnets.0.conv1.weight"
    assert plan.source_of("up_blocks.0.resnets.1.conv1.weight") == "up_blocks.1.resnets.2.conv1.weight"
    assert plan.source_of("up_blocks.1.upsamplers.0.conv.bias") == "up_blocks.2.upsamplers.0.conv.bias"
    assert plan.source_of("down_blocks.1.resnets.0.norm1.weight") == "down_blocks.1.resnets.0.norm1.weight"
    assert plan.source_of("conv_in.weight") == "conv_in.weight"


def test_feature_sites_are_those_of_the_papers():
    def sites(preset, kind):
        return [(p.teacher, p.student) for p in plan_removal(SD1, preset).feature_pairs[kind]]

    down, up = [f"down_blocks.{i}" for i in range(4)], [f"up_blocks.{i}" for i in range(4)]
    assert sites("sd-small", "block") == [(n, n) for n in [*down, "mid_block", *up]]
    assert sites("sd-small", "bk") == [(n, n) for n in [*down, *up]]
    ups = [(f"up_blocks.{i + 1}", f"up_blocks.{i}") for i in range(3)]
    assert sites("sd-tiny", "block") == [(n, n) for n in down[:2]] + [("up_blocks.0", "down_blocks.2"), *ups]
    attention = ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out")
    assert sites("sd-tiny", "bk") == [(n, n) for n in down[:2]] + [attention, *ups]


def test_plans_survive_json():
    plan = plan_removal(SD2, "sd-tiny")
    again = RemovalPlan.from_json(json.dumps({**json.loads(plan.to_json()), "teacher": "a further fact"}))
    assert again.source_of("up_blocks.0.resnets.1.x") == plan.source_of("up_blocks.0.resnets.1.x")
    assert again.feature_pairs == plan.feature_pairs and again.removed == plan.removed


def test_unknown_presets_name_the_nearest():
    with pytest.raises(SurgeryError, match=r"unknown preset or unit 'sd-smal'; did you mean 'sd-small'\?"):
        plan_removal(SD1, "sd-smal")


def test_a_student_cannot_be_pruned_by_preset_again(teacher):
    student = build_student(teacher.unet, plan_removal(teacher.unet.config, "sd-small"))
    with pytest.raises(SurgeryError, match="needs a teacher with two layers in every block"):
        plan_removal(student.config, "sd-small")


def test_the_innermost_level_stays_when_widths_differ():
    with pytest.raises(SurgeryError, match="needs an innermost level as wide as the one above it"):
        plan_removal({**SD1, "block_out_channels": [320, 640, 960, 1280]}, "sd-tiny")
