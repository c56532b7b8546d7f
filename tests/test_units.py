"""Units: any wish is granted with every proof holding, or refused with a reason; there is no third outcome."""

import itertools
import random
import re
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel

from bkd.errors import SurgeryError
from bkd.hooks import FeatureTap
from bkd.surgery.anatomy import read_anatomy
from bkd.surgery.build import build_empty, build_student
from bkd.surgery.options import level_choices
from bkd.surgery.probe import as_arguments, unet_inputs
from bkd.surgery.unet import parse_blocks, plan_removal
from bkd.surgery.units import all_units, is_within, removed_units
from tests.conftest import SD1, SD2, SDXL, SMALL_SD1, SMALL_SD2, SMALL_SDXL

SMALL_CONFIGS = {"SD1": SMALL_SD1, "SD2": SMALL_SD2, "SDXL": SMALL_SDXL}


@pytest.fixture(scope="module", params=SMALL_CONFIGS)
def small(request):
    """A small UNet of each topology, with random weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(SMALL_CONFIGS[request.param]).eval()


def run(unet):
    inputs = unet_inputs(unet.config, side=8, num_tokens=5)
    with torch.no_grad():
        return unet(**as_arguments(inputs)).sample


def prove(teacher, plan, folder):
    """Every proof of `bkd prune` but the second process."""
    student = build_student(teacher, plan, share_base=True)
    theirs = teacher.state_dict()
    for key, tensor in student.state_dict().items():
        assert torch.equal(tensor, theirs[plan.source_of(key)]), key
    student.save_pretrained(folder)
    reloaded, info = UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for parameter in reloaded.parameters():  # unaligned mapped weights may round differently
        parameter.data = parameter.data.clone()
    output = run(reloaded.eval())
    assert torch.equal(output, run(build_student(teacher, plan))) and output.isfinite().all()
    return student


@pytest.mark.parametrize("seed", range(12))
def test_random_subsets_are_pruned_or_refused(small, seed, tmp_path):
    rng = random.Random(seed)
    anatomy = read_anatomy(small.config)
    wish = rng.sample(all_units(anatomy), k=rng.choice([1, 1, 2, 3, 5, 9]))
    try:
        plan = plan_removal(small.config, ",".join(wish))
    except SurgeryError as refusal:
        assert re.search(r"lacks|nothing would be left|only go together", refusal.what)
        assert refusal.remedy
        return
    prove(small, plan, tmp_path)
    assert all(any(is_within(unit, gone, anatomy) for gone in plan.removed) for unit in wish)
    named = {unit for unit in plan.removed if any(is_within(unit, other, anatomy) for other in wish)}
    assert named | {*plan.partners} == {*plan.removed} and not named & {*plan.partners}
    with pytest.raises(SurgeryError, match="only go together") if plan.partners else torch.no_grad():
        plan_removal(small.config, ",".join(wish), strict=True)


@pytest.mark.parametrize("seed", range(3))
def test_students_are_teachers_again(small, seed, tmp_path):
    """A pruned student's own configuration, with its lists from JSON, can be read and pruned further."""
    rng = random.Random(1000 + seed)
    unet = small
    for _ in range(3):
        wish = rng.choice(all_units(read_anatomy(unet.config)))
        try:
            plan = plan_removal(unet.config, wish)
        except SurgeryError:
            continue
        prove(unet, plan, tmp_path)
        unet = UNet2DConditionModel.from_pretrained(tmp_path)


def widths_fit(teacher, level, down, up):
    """Ask diffusers itself: the layers' shapes at the places that a student would give them, and whether it runs."""
    counts = [2] * len(teacher.down_blocks)
    counts[level] = len(down)
    student = build_empty({**teacher.config, "layers_per_block": counts})
    mirrored = len(counts) - 1 - level
    pairs = [(student.down_blocks[level], teacher.down_blocks[level], down)]
    pairs += [(student.up_blocks[mirrored], teacher.up_blocks[mirrored], up)]
    for ours, theirs, layers in pairs:
        for place, layer in enumerate(layers):
            shapes = [[p.shape for p in block.parameters()] for block in (ours.resnets[place], theirs.resnets[layer])]
            if shapes[0] != shapes[1]:
                return False
    try:
        run(student.to_empty(device="cpu"))
    except (RuntimeError, AssertionError):
        return False
    return True


def test_the_rule_of_widths_is_that_of_diffusers(small):
    anatomy = read_anatomy(small.config)
    for level in range(anatomy.num_levels):
        found = {(choice.down, choice.up) for choice in level_choices(anatomy, level, anatomy.num_levels)}
        for count in range(3):
            for down in itertools.combinations(range(2), count):
                for up in itertools.combinations(range(3), count + 1):
                    assert ((down, up) in found) == widths_fit(small, level, down, up), (level, down, up)


DROPPABLE = {
    "SD1": [({0, 1}, {1, 2}), ({1}, {1}), ({1}, {0, 1}), ({0, 1}, {0, 1, 2})],
    "SDXL": [({0, 1}, {1, 2}), ({1}, {1}), ({1}, {0, 1})],
}


@pytest.mark.parametrize("model", DROPPABLE)
def test_the_table_of_droppable_layers(model):
    anatomy = read_anatomy({"SD1": SD1, "SDXL": SDXL}[model])
    for level, (down, up) in enumerate(DROPPABLE[model]):
        choices = [c for c in level_choices(anatomy, level, anatomy.num_levels) if len(c.down) == 1]
        assert set().union(*({0, 1} - {*c.down} for c in choices)) == down
        assert set().union(*({0, 1, 2} - {*c.up} for c in choices)) == up


@pytest.mark.parametrize(
    ("wish", "removed", "partners"),
    [
        ("down.1.1", {"down.1.1", "up.2.1"}, {"up.2.1"}),
        ("up.2.1", {"down.1.1", "up.2.1"}, {"down.1.1"}),
        ("down.1.1,up.2.1", {"down.1.1", "up.2.1"}, set()),
        ("up.1.0", {"down.2.1", "up.1.0"}, {"down.2.1"}),
        ("down.3.0,down.3.1", {"down.3.0", "down.3.1", "up.0.1", "up.0.2"}, {"up.0.1", "up.0.2"}),
        ("mid", {"mid"}, set()),
        ("mid.attn,mid.t0", {"mid.attn"}, set()),
        ("level.3,down.3.1,mid", {"level.3", "mid"}, set()),
        ("down_blocks.1.resnets.1", {"down.1.1", "up.2.1"}, {"up.2.1"}),
        ("mid_block", {"mid"}, set()),
        ("up_blocks.0", {"level.3"}, set()),
        ("down_blocks.0.attentions", {"down.0.attn"}, set()),
        ("mid_block.attentions.0.transformer_blocks.0", {"mid.t0"}, set()),
        ("up.3.attn, up.3.2.t0", {"up.3.attn"}, set()),
        ("down.*.attn", {"down.0.attn", "down.1.attn", "down.2.attn"}, set()),
    ],
)
def test_partners_of_sd1(wish, removed, partners):
    plan = plan_removal(SD1, wish)
    assert ({*plan.removed}, {*plan.partners}) == (removed, partners)


def test_the_mid_block_of_sdxl_is_as_deep_as_the_first_innermost_attention():
    plan = plan_removal(SDXL, "down.2.0.t[6-9]")
    assert {*plan.partners} == {f"mid.t{number}" for number in range(6, 10)}
    assert plan.overrides["transformer_layers_per_block"] == (1, 2, (6, 10))
    assert plan_removal(SDXL, "down.2.0.t2,mid.t7").partners == ()
    assert plan_removal(SDXL, "mid,down.2.0.t2").partners == ()
    assert plan_removal(SD1, "mid.t0").partners == ()


def test_presets_and_units_combine():
    assert plan_removal(SD1, "sd-small,mid").name == "bk-small"
    assert plan_removal(SD1, "sd-small,mid,level.3").name == "sd-tiny"
    assert plan_removal(SDXL, "sd-small,*.t[6-9]").name == "koala-1b"
    assert plan_removal(SDXL, "bk-small,*.t[5-9]").name == "koala-700m"
    assert plan_removal(SD1, "down.1.1").name == "down.1.1,up.2.1"


@pytest.mark.parametrize(
    ("config", "wish", "message"),
    [
        (
            SD1,
            "down.1.0",
            r"no stock configuration of level 1 lacks down\.1\.0(.|\n)*alone turns 320 channels into 640",
        ),
        (SD1, "down.1.0", r"nearest that can go: down\.1\.1, up\.2\.1"),
        (SD1, "up.1.2", r"up\.1\.2 alone takes 1280 \+ 640 channels"),
        (SD1, "up.0.*", r"lacks up\.0\.0, up\.0\.1, up\.0\.2(.|\n)*nearest"),
        (SD1, "level.2", r"level\.2 can only go together with the levels inside it(.|\n)*level\.2, level\.3"),
        (SD1, "level.0", "nothing would be left"),
        (SD1, "*", "nothing would be left"),
        (SD1, "sd-smal", r"unknown preset or unit 'sd-smal'; did you mean 'sd-small'\?"),
        (SD1, "down.1.2", r"unknown unit 'down\.1\.2'; did you mean 'down\.1\.[01]'\?"),
        (SD1, "down_blocks.1.resnet.1", r"unknown unit(.|\n)*did you mean 'down_blocks\.1\.resnets\.1'"),
        (SD1, "down_blocks.9", "unknown unit"),
        (SD1, "conv_in", "unknown preset or unit 'conv_in'(.|\\n)*units of `bkd inspect`"),
        (SD1, "conv_in.weight", "unknown unit 'conv_in.weight'(.|\\n)*bkd inspect"),
        (SD1, "down_blocks.9.attentions.0", "unknown unit"),
        (SD1, "down_blocks.3.attentions.0", "unknown unit"),
        (SD1, "down_blocks.²", "unknown unit"),
        (SD1, " , ", "nothing would be removed"),
        ({**SD1, "block_out_channels": [320, 640]}, "mid", "block_out_channels does not have one entry for each level"),
        (SD1, "x.*", "no unit matches the pattern"),
        (SD1, "down_blocks.1.attentions.1", r"cannot drop a single attention(.|\n)*down\.1\.1\.t\*"),
        (SDXL, "sd-tiny", r"as wide as the one above it(.|\n)*koala-700m"),
        (SD2, "koala-1b", r"deeper transformer stacks \(SDXL\)"),
        ({**SD1, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid", "unsupported kind of mid block"),
        ({**SD1, "down_block_types": ["KDownBlock2D"] * 4}, "mid", "unsupported kind of block"),
    ],
)
def test_refusals_say_why_and_what_is_nearest(config, wish, message):
    with pytest.raises(SurgeryError, match=message):
        plan_removal(config, wish)


def test_the_mid_block_goes_where_its_heads_would_change():
    """Attention heads are in no tensor's shape: they would change without an error."""
    config = {**SD2, "attention_head_dim": [5, 10, 20, 40]}
    assert plan_removal(config, "level.3").partners == ("mid",)
    assert plan_removal(SD2, "level.3").partners == ()


@pytest.mark.parametrize("model", SMALL_CONFIGS)
@pytest.mark.parametrize("seed", range(8))
def test_feature_pairs_have_equal_shapes(model, seed):
    """At the usual size: on small latents a 1 x 1 map would fit anywhere."""
    config, rng = {**SMALL_CONFIGS[model], "sample_size": 16}, random.Random(seed)
    units = all_units(read_anatomy(config))
    wishes = ["level.3", "level.3,mid", "level.3,down.2.attn"] if model != "SDXL" else ["level.2", "level.2,up.1.attn"]
    wish = ",".join(rng.sample(units, k=3)) if seed >= len(wishes) else wishes[seed]
    try:
        plan = plan_removal(config, wish)
    except SurgeryError:
        return
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(config).eval()
    student = build_student(teacher, plan)
    for pairs in plan.feature_pairs.values():
        shapes = []
        for unet, names in ((teacher, [p.teacher for p in pairs]), (student, [p.student for p in pairs])):
            inputs = as_arguments(unet_inputs(config, side=16, num_tokens=5))
            with torch.no_grad(), FeatureTap(unet, names) as tap:
                shapes.append([feature.shape for feature in tap.run(partial(unet, **inputs))[1]])
        assert shapes[0] == shapes[1] and pairs


def test_where_a_level_is_gone_and_the_mid_block_stays_it_hands_over():
    pairs = [(p.teacher, p.student) for p in plan_removal(SD1, "level.3").feature_pairs["block"]]
    assert ("up_blocks.0", "mid_block") in pairs
    assert ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.1.proj_out") in pairs
    assert not [pair for pair in pairs if pair[1] == "down_blocks.2"]


def test_every_unit_of_a_list_is_found():
    anatomy = read_anatomy(SDXL)
    assert parse_blocks(anatomy, "mid, down.1.1") == {"mid", "down.1.1"}
    assert len(parse_blocks(anatomy, "*.t*")) == 70
    assert parse_blocks(anatomy, "mid.t[3,5],down.1.1") == {"mid.t3", "mid.t5", "down.1.1"}
    assert removed_units(anatomy, anatomy.whole) == ()
