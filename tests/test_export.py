"""What is handed on: single files in the original layout, raw weights, students' folders, and what other tools read."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bkd.errors import ModelError
from bkd.export.forms import export_lora, export_pipeline, export_single_file
from bkd.export.other_tools import verdicts
from bkd.export.source import Source
from bkd.models.load import load_unet
from bkd.models.original_layout import original_tensors, unet_name, unexpressible
from bkd.models.student_folder import plan_facts
from bkd.pruning.prune import plan_pruning, prune
from bkd.surgery.build import build_empty
from bkd.surgery.unet import plan_removal
from tests.conftest import SD2, SMALL_SD1, SMALL_SD2, SMALL_SDXL
from tests.training import train_here
from tools.architectures import SD1, SD1_TEXT, SD1_VAE, SDXL

DEEP_SDXL = {**SMALL_SDXL, "transformer_layers_per_block": [1, 2, 7]}
SMALL = {"sd1": SMALL_SD1, "sd2": SMALL_SD2, "inpaint": {**SMALL_SD1, "in_channels": 9}, "sdxl": DEEP_SDXL}
PRESETS = {
    "sd1": ["none", "sd-small", "bk-small", "sd-tiny"],
    "sd2": ["none", "sd-small", "bk-small", "sd-tiny"],
    "inpaint": ["none", "sd-tiny"],
    "sdxl": ["none", "sd-small", "bk-small", "koala-1b", "koala-700m"],
}
PIECES = ["mid.attn", "mid", "down.1.attn", "up.1.attn", "down.1.0.t*", "mid.t*", "sd-small,mid.attn"]
EXPRESSIBLE = [(family, blocks) for family, presets in PRESETS.items() for blocks in (*presets, *PIECES)]
EXPRESSIBLE.append(("sd1", "level.3"))
PREFIX = "model.diffusion_model."


def student_of(config, blocks):
    """A student's empty network, and its whole configuration."""
    teacher = dict(build_empty(config).config)
    student = build_empty(teacher, plan_removal(teacher, blocks))
    return student, dict(student.config)


def pruned(folder, blocks, output):
    """A student's folder."""
    prune(folder, folder.name, plan_pruning(folder, blocks), output)
    return output


@pytest.fixture(scope="module")
def levels_differ(family_folders, tmp_path_factory):
    return pruned(family_folders["sd1"], "down.1.1", tmp_path_factory.mktemp("pruned") / "student")


@pytest.fixture(scope="module")
def tiny(family_folders, tmp_path_factory):
    return pruned(family_folders["sd1"], "sd-tiny", tmp_path_factory.mktemp("pruned") / "student")


@pytest.mark.parametrize(("family", "blocks"), EXPRESSIBLE)
def test_every_tensor_has_a_name_that_diffusers_reads_back(family, blocks):
    student, config = student_of(SMALL[family], blocks)
    assert not list(unexpressible(config))
    tensors = student.state_dict()
    named = {f"{PREFIX}{unet_name(key, config)}": tensor for key, tensor in tensors.items()}
    assert len(named) == len(tensors)
    read = convert_ldm_unet_checkpoint(dict(named), config)
    assert read.keys() == tensors.keys() and all(read[key] is tensors[key] for key in tensors)


@pytest.mark.parametrize(
    ("config", "blocks", "reason"),
    [
        (SMALL_SD1, "down.1.1", r"layers_per_block is \[2, 1, 2, 2\]"),
        (SMALL_SDXL, "level.2", r"layers_per_block is \[2, 1\]"),
        ({**SMALL_SD2, "layers_per_block": [2, 2, 2, 2]}, "none", "one number for all levels"),
        ({**SMALL_SD1, "time_cond_proj_dim": 8}, "sd-small", "it has an input for the guidance scale"),
        ({**SMALL_SD1, "encoder_hid_dim": 8}, "none", r"no name for 2 of its tensors, such as encoder_hid_proj\."),
    ],
)
def test_what_the_layout_cannot_express_is_known_from_the_configuration(config, blocks, reason):
    _, config = student_of(config, blocks)
    assert re.search(reason, " ".join(unexpressible(config)))


SSD_1B = "mid.attn,down.2.*.t[4-9],up.0.0.t[4-9],up.0.1.t[4-9],up.1.1.t1,up.1.2.t1"
KNOWN = {
    "sd1": {
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.middle_block.2.emb_layers.1.bias": (1280,),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
    },
    "sd2": {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.bias": (4096,),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias": (3840,),
    },
}
"""Names and shapes as they stand in the published files."""
NUM_TENSORS = {"sd1": 686 + 248 + 196, "sd2": 686 + 248 + 280, "sdxl": 1680 + 248 + 196 + 389}
UNETS = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}


@pytest.mark.parametrize("family", KNOWN)
def test_the_published_models_get_the_names_of_their_files(family):
    sd2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    big = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    with torch.device("meta"):
        pipe = SimpleNamespace(
            unet=build_empty(UNETS[family]),
            vae=AutoencoderKL(**SD1_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**{**SD1_TEXT, **(sd2 if family == "sd2" else {})})),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**{**SD1_TEXT, **big, "projection_dim": 1280})),
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in original_tensors(pipe).items()}
    assert {name: shapes.get(name) for name in KNOWN[family]} == KNOWN[family]
    assert len(shapes) == NUM_TENSORS[family]


@pytest.mark.parametrize(
    ("family", "blocks", "dtype"),
    [("sd2", "sd-tiny", "float32"), ("sdxl", "bk-small", "bfloat16"), ("inpaint", "sd-small,mid.attn", "float16")],
)
def test_a_single_file_computes_what_the_student_does(bkd, family_folders, family, blocks, dtype, tmp_path):
    student = pruned(family_folders[family], blocks, tmp_path / "student")
    file = tmp_path / "student.safetensors"
    code, printed = bkd("export", student, "--format", "single-file", "-o", file, "--dtype", dtype)
    assert code == 0, printed
    kind = {"sd2": "StableDiffusion", "sdxl": "StableDiffusionXL", "inpaint": "StableDiffusionInpaint"}[family]
    assert f"done: {kind}Pipeline.from_single_file('{file}', config='{student}')" in printed.replace("\n", "")
    assert "ComfyUI: no, its widths" in printed and "AUTOMATIC1111's web UI: no" in printed
    assert {tensor.dtype for tensor in load_file(file).values()} == {getattr(torch, dtype)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "student.safetensors"]
    assert file.stat().st_mode & 0o044 == 0o044


def test_a_file_whose_autoencoder_differs_is_not_kept(tiny, tmp_path, monkeypatch):
    name = "first_stage_model.decoder.conv_in.bias"
    monkeypatch.setattr(
        "bkd.export.forms.original_tensors", lambda pipe: {**(t := original_tensors(pipe)), name: t[name] + 1}
    )
    with pytest.raises(ModelError, match="the file's vae is not the folder's"):
        export_single_file(tiny, tmp_path / "out.safetensors", torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def reloads_otherwise(monkeypatch):
    """Another process that computes something else."""
    monkeypatch.setattr("bkd.models.proof._reloaded_output", lambda *folder, **options: torch.ones(1))


@pytest.mark.parametrize("export", [export_pipeline, export_single_file])
def test_half_of_an_output_is_never_left(tiny, tmp_path, reloads_otherwise, export):
    (tmp_path / "earlier.safetensors").write_bytes(b"earlier")
    output = tmp_path / ("earlier.safetensors" if export is export_single_file else "folder")
    with pytest.raises(ModelError, match="the reloaded student computes something else"):
        export(tiny, output, torch.float32, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier.safetensors"]
    assert (tmp_path / "earlier.safetensors").read_bytes() == b"earlier"


def test_students_that_a_single_file_cannot_express_are_refused(bkd_refuses, levels_differ, tmp_path_factory):
    student = shutil.copytree(levels_differ, tmp_path_factory.mktemp("copies") / "student")
    arguments = ["export", student, "--format", "single-file", "-o", "out.safetensors"]
    bkd_refuses(arguments, "a single file cannot express this student")
    bkd_refuses(arguments, "try: --format pipeline")
    config = student / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderTiny"}))
    bkd_refuses(arguments, "its autoencoder is an AutoencoderTiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "single-file", "-o", "out"], "the output is a .safetensors file"),
        (["--format", "lora", "-o", "out.safetensors"], "a student's folder has no adapters"),
        (["--weights", "raw", "-o", "out"], "a student's folder holds one set of weights"),
        (["--weights", "avg", "-o", "out"], "unknown weights 'avg'"),
        (["-o", "out.safetensors"], "--format single-file or lora"),
    ],
)
def test_wishes_that_a_folder_cannot_fulfil_are_refused(bkd_refuses, levels_differ, arguments, message):
    bkd_refuses(["export", levels_differ, *arguments], message)


def test_a_file_in_use_is_kept(bkd, levels_differ, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    code, printed = bkd("export", levels_differ, "--format", "single-file", "-o", tmp_path / "out.safetensors")
    assert code == 1 and "the output file exists" in printed and "add --overwrite" in printed
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


@pytest.fixture(scope="module")
def train(shards, cache, tmp_path_factory):
    """Train a recipe for four steps in this process, without the reload in another; returns the run folder."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, *overrides):
        short = [
            "train.batch=8",
            "train.max_steps=4",
            "train.checkpoint_every=2",
            "samples.prompts=[]",
            "train.lr=1e-2",
        ]
        train_here(f"shapes/{name}", f"data.shards={shards[0].parent}", *short, *overrides, "-o", root / name)
        return root / name

    return run


@pytest.fixture(scope="module")
def averaged(train):
    return train("sd-tiny")


@pytest.fixture(scope="module")
def adapted(train):
    return train("guided-lora")


def last_step(run, name="trainable"):
    return load_file(run / "checkpoints" / "00" / "00000004" / f"{name}.safetensors")


def test_raw_weights_are_those_of_the_last_checkpoint(averaged, tmp_path):
    for weights in ("ema", "raw"):
        export_pipeline(averaged, tmp_path / weights, torch.float32, raw=weights == "raw")
        export_single_file(averaged, tmp_path / f"{weights}.safetensors", torch.float32, raw=weights == "raw")
    assert [plan_facts(tmp_path / weights).get("weights") for weights in ("ema", "raw")] == [None, "raw"]
    ema, raw = (load_unet(tmp_path / weights).state_dict() for weights in ("ema", "raw"))
    assert all(torch.equal(raw[name], tensor) for name, tensor in last_step(averaged).items())
    assert all(torch.equal(ema[name], tensor) for name, tensor in last_step(averaged, "ema").items())
    assert not any(torch.equal(raw[name], ema[name]) for name in last_step(averaged))
    for weights, state in (("ema", ema), ("raw", raw)):
        with safe_open(tmp_path / f"{weights}.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor(f"{PREFIX}input_blocks.0.0.weight"), state["conv_in.weight"])


def test_raw_adapters_are_handed_on_and_merged(adapted, tmp_path):
    raw = Source.of(adapted, raw=True)
    assert all(torch.equal(raw.raw[name], tensor) for name, tensor in last_step(adapted).items())
    stored = load_unet(adapted / "student").state_dict()
    averages = Source(raw.folder, raw.run, last_step(adapted, "ema")).unet(torch.float32).state_dict()
    assert averages.keys() == stored.keys() and all(torch.equal(averages[name], stored[name]) for name in stored)
    export_lora(adapted, tmp_path / "raw.safetensors", raw=True)
    down = {name: tensor for name, tensor in load_file(tmp_path / "raw.safetensors").items() if ".lora_A." in name}
    ours = {f"unet.{name.replace('.default.', '.')}": name for name in last_step(adapted) if ".lora_A." in name}
    assert down.keys() == ours.keys()
    assert all(torch.equal(tensor[: len(raw.raw[ours[name]])], raw.raw[ours[name]]) for name, tensor in down.items())


def test_raw_weights_that_a_run_does_not_keep_are_refused(bkd_refuses, averaged, tmp_path_factory):
    run = shutil.copytree(averaged, tmp_path_factory.mktemp("copies") / "run")
    arguments = ["export", run, "--weights", "raw", "-o", "out"]
    shutil.rmtree(run / "checkpoints" / "00" / "00000004")
    bkd_refuses(arguments, "keeps no checkpoint of its last step")
    bkd_refuses(arguments, "got: step 2")
    shutil.rmtree(run / "checkpoints")
    bkd_refuses(arguments, "got: none")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("ema: 0.98", "ema: 0.0"))
    bkd_refuses(arguments, "trained without averaging")
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "status": "stopped"}))
    bkd_refuses(arguments, "this run is not finished")


@pytest.mark.parametrize(
    ("config", "blocks", "comfyui", "automatic1111"),
    [
        (SD1, "none", "yes", "yes"),
        (SD1, "sd-small", "yes", "no"),
        (SD1, "sd-tiny", "yes", "no"),
        (SD2, "bk-small", "yes", "no"),
        (SD1, "down.1.0.t*", "no, it leaves out attentions", "no"),
        (SDXL, "none", "yes", "yes"),
        (SDXL, "sd-small", "no, of SDXL it knows", "no"),
        (SDXL, "koala-700m", "yes", "no"),
        (SDXL, "koala-1b", "yes", "no"),
        (SDXL, "mid", "yes", "no"),
        (SDXL, SSD_1B, "yes", "yes"),
        (SMALL_SD1, "none", "no, its widths", "no, its widths"),
    ],
)
def test_what_other_tools_load(config, blocks, comfyui, automatic1111):
    said = [str(verdict) for verdict in verdicts(student_of(config, blocks)[1])]
    assert said[0].startswith(f"ComfyUI: {comfyui}") and said[1].startswith(f"AUTOMATIC1111's web UI: {automatic1111}")


def test_a_tool_that_loads_a_file_must_be_told_what_it_predicts():
    comfyui, automatic1111 = map(str, verdicts(student_of(SD2, "sd-small")[1], "v_prediction"))
    assert comfyui.endswith("the file does not say v_prediction, choose it there")
    assert "v_prediction" not in automatic1111
