"""Remap: the student with a carried LoRA is the student of the teacher with that LoRA merged."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bkd.errors import ModelError, OutputError, SurgeryError
from bkd.lora.remap import remap_lora
from bkd.models.load import load_pipeline
from bkd.models.original_layout import unet_name
from bkd.pruning.inspect import lineage_of
from bkd.pruning.prune import plan_pruning, prune
from bkd.surgery.build import build_empty, build_student
from bkd.surgery.plan import Lineage, load_plan
from bkd.surgery.probe import as_arguments, unet_inputs
from bkd.surgery.unet import plan_removal
from tests.conftest import SMALL_SDXL

TARGETS = ["to_q", "to_v", "conv1", "proj_in", "conv_in"]


def lineage(student):
    return Lineage((load_plan(student),))


def output(unet):
    with torch.no_grad():
        return unet(**as_arguments(unet_inputs(unet.config, side=8, num_tokens=6))).sample


@pytest.fixture(scope="module")
def tiny(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remap") / "tiny"
    prune(teacher_folder, "shapes", plan_pruning(teacher_folder, "sd-tiny"), folder)
    return folder


@pytest.fixture(scope="module")
def adapted(teacher_folder, tmp_path_factory):
    """A teacher with a random LoRA in it, and the files that diffusers and kohya's trainer would save of it."""
    torch.manual_seed(0)
    pipe = load_pipeline(teacher_folder)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=TARGETS, rank_pattern={"to_v": 2}))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("lora")
    tensors = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=tensors, **_collate_lora_metadata({"unet": pipe.unet})
    )
    kohya = {}
    for key, tensor in tensors.items():
        module, side = key.removesuffix(".weight").split(".lora_")
        name = f"lora_unet_{module.replace('.', '_')}"
        kohya[f"{name}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor.contiguous()
        kohya[f"{name}.alpha"] = torch.tensor(10.0)
    for name in ("self_attn_q_proj", "mlp_fc1"):
        text = f"lora_te_text_model_encoder_layers_0_{name}"
        kohya[f"{text}.lora_down.weight"] = torch.randn(2, 64)
        kohya[f"{text}.lora_up.weight"] = torch.randn(64 if "attn" in name else 256, 2)
        kohya[f"{text}.alpha"] = torch.tensor(7.0)
    save_file(kohya, folder / "kohya.safetensors")
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    return pipe.unet, {"diffusers": folder / "pytorch_lora_weights.safetensors", "kohya": folder / "kohya.safetensors"}


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_carrying_and_merging_commute(adapted, tiny, form, tmp_path):
    merged, files = adapted
    plan = plan_removal(merged.config, "sd-tiny")
    found = remap_lora(files[form], tiny, lineage(tiny), tmp_path / "tiny.safetensors")
    pipe = load_pipeline(tiny)
    before = output(pipe.unet)
    pipe.load_lora_weights(tmp_path / "tiny.safetensors")
    after = output(pipe.unet)
    assert torch.allclose(after, output(build_student(merged, plan)), atol=1e-5)
    assert not torch.allclose(after, before, atol=0.1)
    with safe_open(tmp_path / "tiny.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and len([*file.keys()]) == found.num_carried
    with safe_open(files["diffusers"], framework="pt") as file:
        text = 4 if form == "kohya" else 0
        assert found.num_carried + len(found.lost) == len([*file.keys()]) + text
    assert not found.unknown
    gone = ("down_blocks.0.attentions.1.", "down_blocks.0.resnets.1.", "mid_block.", "down_blocks.3.", "up_blocks.0.")
    assert {key.split(".")[0] for key in found.lost} == {"unet"}
    assert all(any(key.startswith(f"unet.{prefix}") for key in found.lost) for prefix in gone)


def test_text_encoders_compute_the_same_with_the_carried_file(adapted, tiny, teacher_folder, tmp_path):
    _, files = adapted
    remap_lora(files["kohya"], tiny, lineage(tiny), tmp_path / "tiny.safetensors")
    found = {}
    for name, folder, lora in (
        ("none", teacher_folder, None),
        ("teacher", teacher_folder, files["kohya"]),
        ("student", tiny, tmp_path / "tiny.safetensors"),
    ):
        pipe = load_pipeline(folder)
        if lora is not None:
            pipe.load_lora_weights(lora)
        with torch.no_grad():
            found[name] = pipe.text_encoder(torch.arange(5)[None])[0]
    assert torch.allclose(found["student"], found["teacher"], atol=1e-5)
    assert not torch.allclose(found["student"], found["none"], atol=0.01)


def test_text_encoder_tensors_are_carried_as_they_are(adapted, tiny, tmp_path):
    _, files = adapted
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**load_file(files["diffusers"]), text: torch.ones(2, 64)}, tmp_path / "both.safetensors")
    remap_lora(tmp_path / "both.safetensors", tiny, lineage(tiny), tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[text], torch.ones(2, 64))


def test_what_is_no_lora_of_this_teacher_is_refused(adapted, tiny, tmp_path):
    _, files = adapted
    plan, out = lineage(tiny), tmp_path / "out.safetensors"
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"not a LoRA file|cannot read this as a LoRA"):
        remap_lora(tmp_path / "other.safetensors", tiny, plan, out)
    (tmp_path / "lora.bin").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match="pickled files can run code"):
        remap_lora(tmp_path / "lora.bin", tiny, plan, out)
    with pytest.raises(ModelError, match="no such file"):
        remap_lora(tmp_path / "absent.safetensors", tiny, plan, out)
    (tmp_path / "half.safetensors").write_bytes(files["diffusers"].read_bytes()[:999])
    with pytest.raises(ModelError, match=r"this file cannot be read(.|\n)*download it again"):
        remap_lora(tmp_path / "half.safetensors", tiny, plan, out)
    save_file({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(2, 2)}, tmp_path / "loha.safetensors")
    save_file({"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.zeros(2)}, tmp_path / "dora.safetensors")
    with pytest.raises(ModelError, match="this is a DoRA, not a LoRA"):
        remap_lora(tmp_path / "dora.safetensors", tiny, plan, out)
    names = [f"lora_unet_input_blocks_0_attentions_{number}_proj_in" for number in range(2)]
    sides = {"lora_down": (2, 32, 1, 1), "lora_up": (32, 2, 1, 1)}
    same = {f"{name}.{side}.weight": torch.zeros(shape) for name in names for side, shape in sides.items()}
    save_file(same, tmp_path / "same.safetensors")
    with pytest.raises(ModelError, match=r"does not understand all of this LoRA|cannot read this as a LoRA"):
        remap_lora(tmp_path / "same.safetensors", tiny, plan, out)
    with pytest.raises(ModelError, match=r"this is a LoHa, not a LoRA(.|\n)*hada_w1_a\n.*diffusers, peft or kohya"):
        remap_lora(tmp_path / "loha.safetensors", tiny, plan, out)
    tensors = load_file(files["diffusers"])
    wide = {key: torch.zeros(4, 7) if key.endswith("attn1.to_q.lora_A.weight") else t for key, t in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(
        ModelError, match=r"(?s)model of other widths\n.*\(4, 7\).*trained on the student fits as it is"
    ):
        remap_lora(tmp_path / "wide.safetensors", tiny, plan, out)
    lost = {key: tensor for key, tensor in tensors.items() if "mid_block" in key}
    save_file(lost, tmp_path / "lost.safetensors")
    with pytest.raises(ModelError, match=rf"no UNet tensor of this LoRA fits the student\n.*{len(lost)} tensors"):
        remap_lora(tmp_path / "lost.safetensors", tiny, plan, out)
    out.write_text("mine")
    lora = files["diffusers"]
    for output, message in [
        (lora, "the output is the teacher's LoRA itself"),
        (tmp_path / "lora.bin", "the output is a .safetensors file"),
        (tmp_path / "folder.safetensors", "the output file is a folder"),
    ]:
        (tmp_path / "folder.safetensors").mkdir(exist_ok=True)
        with pytest.raises(OutputError, match=message):
            remap_lora(lora, tiny, plan, output, overwrite=True)
    with pytest.raises(OutputError, match="the output file exists"):
        remap_lora(files["diffusers"], tiny, plan, out)
    assert out.read_text() == "mine" and not list(tmp_path.glob(".*"))


def test_modules_that_the_teacher_never_had_are_told_apart(adapted, tiny, tmp_path):
    _, files = adapted
    odd = "unet.down_blocks.7.attentions.0.proj_in.lora_A.weight"
    save_file({**load_file(files["diffusers"]), odd: torch.zeros(4, 4)}, tmp_path / "odd.safetensors")
    found = remap_lora(tmp_path / "odd.safetensors", tiny, lineage(tiny), tmp_path / "out.safetensors")
    assert found.unknown == (odd,) and odd not in found.lost


def original_names(config):
    """Module -> kohya's name for it, by the block numbers of the original layout; attention projections only."""
    names = {}
    for module, _ in build_empty(config).named_modules():
        if module.endswith("to_q"):
            original = unet_name(f"{module}.weight", config).removesuffix(".weight")
            names[module] = f"lora_unet_{original.replace('.', '_')}"
    return names


@pytest.mark.parametrize("blocks", ["sd-small", "down.0.1", "bk-small,*.t3"])
def test_files_with_block_numbers_of_the_original_layout(family_folders, tmp_path, blocks):
    """As trainers write them for SDXL: the numbers are the teacher's, whatever the student has left."""
    teacher = family_folders["sdxl"]
    plan = plan_removal(SMALL_SDXL, blocks)
    prune(teacher, "xl", plan_pruning(teacher, blocks), tmp_path / "student")
    names = original_names(SMALL_SDXL)
    unet, tensors = build_empty(SMALL_SDXL), {}
    for number, (module, name) in enumerate(names.items()):
        width = unet.get_submodule(module).weight.shape
        tensors[f"{name}.lora_down.weight"] = torch.full((2, width[1]), float(number))
        tensors[f"{name}.lora_up.weight"] = torch.ones(width[0], 2)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    out = tmp_path / "out.safetensors"
    found = remap_lora(tmp_path / "kohya.safetensors", tmp_path / "student", lineage(tmp_path / "student"), out)
    assert not found.unknown
    carried = load_file(out)
    kept = [module for module, _ in build_empty(SMALL_SDXL, plan).named_modules() if module.endswith("to_q")]
    assert len(carried) == 2 * len(kept)
    for module in kept:
        number = list(names).index(plan.source_of(module))
        assert (carried[f"unet.{module}.lora_A.weight"] == number).all(), module


@pytest.mark.filterwarnings("ignore:.*(lora_bias|invalid shape)")
def test_biases_of_up_projections_are_scaled_as_these_are(teacher_folder, tiny, tmp_path):
    pipe = load_pipeline(teacher_folder)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, lora_bias=True, init_lora_weights=False)
    pipe.unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        weight_name="lora.safetensors",
        **_collate_lora_metadata({"unet": pipe.unet}),
    )
    remap_lora(tmp_path / "lora.safetensors", tiny, lineage(tiny), tmp_path / "tiny.safetensors")
    before, after = load_file(tmp_path / "lora.safetensors"), load_file(tmp_path / "tiny.safetensors")
    plan = load_plan(tiny)
    module = (
        next(key for key in after if key.endswith("lora_B.bias")).removeprefix("unet.").removesuffix(".lora_B.bias")
    )
    for tensor in ("lora_B.bias", "lora_B.weight"):
        theirs = before[f"unet.{plan.source_of(module)}.{tensor}"]
        assert theirs.any() and torch.equal(after[f"unet.{module}.{tensor}"], 4 * theirs)


def test_a_student_of_a_student_asks_whose_lora_it_is(adapted, teacher_folder, tmp_path):
    merged, files = adapted
    first, second = tmp_path / "first", tmp_path / "second"
    prune(teacher_folder, "shapes", plan_pruning(teacher_folder, "sd-small"), first)
    prune(first, "first", plan_pruning(first, "mid"), second)
    with pytest.raises(SurgeryError, match=r"pruned in several steps(.|\n)*--teacher MODEL"):
        lineage_of(second, None)
    assert [plan.name for plan in lineage_of(second, first).plans] == ["mid"]
    both = lineage_of(second, teacher_folder)
    assert [plan.name for plan in both.plans] == ["mid", "sd-small"]
    remap_lora(files["diffusers"], second, both, tmp_path / "out.safetensors")
    pipe = load_pipeline(second)
    pipe.load_lora_weights(tmp_path / "out.safetensors")
    expected = build_student(merged, plan_removal(merged.config, "bk-small"))
    assert torch.allclose(output(pipe.unet), output(expected), atol=1e-5)
