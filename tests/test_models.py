"""Model folders: every missing part is named before anything is loaded, and written students are proved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bkd.environment import torchvision_problem
from bkd.errors import EnvironmentProblem, ModelError, OutputError
from bkd.models.folder import check_pipeline_folder, model_digest, native_resolution
from bkd.models.load import load_pipeline, load_unet
from bkd.models.locate import locate
from bkd.models.original_layout import original_tensors
from bkd.models.proof import check_reload, check_tensors, probe_output
from bkd.models.unet_weights import check_unet_weights, stored_dtype, weights_problem
from bkd.pruning.inspect import inspect_model
from bkd.pruning.prune import plan_pruning
from bkd.pruning.prune import prune as write_pruned
from bkd.recipe.load import load_recipe
from bkd.runs.run import check_inputs


def prune(teacher, name, blocks, output, **options):
    pruning = plan_pruning(teacher, blocks)
    write_pruned(teacher, name, pruning, output, **options)
    return pruning


@pytest.fixture
def folder(teacher_folder, tmp_path):
    """A copy of the embedded pipeline, to be damaged."""
    return shutil.copytree(teacher_folder, tmp_path / "model")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler", "unet"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ModelError, match=f"lacks its part '{part}'"):
        locate(folder)


def test_missing_weights_are_named(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="the part 'vae' has no safetensors weights"):
        locate(folder)


def test_pickled_weights_are_not_read(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.bin or \.ckpt: pickled files can run code"):
        locate(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights_are_refused_by_their_header(folder, part):
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ModelError, match=f"the weights of part '{part}' are damaged"):
        locate(folder)


def test_a_tokenizer_without_a_length_is_named(folder):
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if "max_length" not in k}))
    with pytest.raises(
        ModelError, match=r"(?s)tokenizer_config\.json: .*how many tokens a prompt has.*model_max_length"
    ):
        load_pipeline(folder)


def test_a_broken_configuration_is_named(folder):
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        locate(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("addition_embed_type", "image", r"not supported\n.*addition_embed_type image\n.*SDXL"),
        ("in_channels", 8, r"not supported\n.*8 input channels for 4 output channels"),
        ("sample_size", None, r"not supported\n.*sample_size None"),
        ("class_embed_type", "timestep", r"not supported\n.*class_embed_type timestep"),
        ("down_block_types", ["KDownBlock2D"] * 4, r"not supported\n.*kind of block KDownBlock2D"),
        ("layers_per_block", [2, 2], r"not supported\n.*layers_per_block does not have one entry"),
        ("layers_per_block", "two", r"not supported\n.*a configuration that cannot be read"),
    ],
)
def test_unsupported_unets_are_refused_at_once(folder, key, value, message):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ModelError, match=message):
        locate(folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler", "unet"])
def test_the_digest_follows_every_part(folder, part):
    before = model_digest(folder)
    path = min((folder / part).glob("*.json"))
    path.write_text(path.read_text() + " ")
    assert model_digest(folder) != before


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(ModelError, match="not a diffusers pipeline folder"):
        locate(tmp_path)


def test_an_output_that_cannot_be_made_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="the output folder is a file"):
        prune(folder, "model", "mid", tmp_path / "file")
    with pytest.raises(OutputError, match=r"file: nothing can be written there\n.*-o .*student"):
        prune(folder, "model", "mid", tmp_path / "file" / "deep" / "student")
    with pytest.raises(OutputError, match=r"output folder cannot be made|nothing can be written there"):
        prune(folder, "model", "mid", Path("/proc/student"))
    assert (tmp_path / "file").read_text() == "mine"


def test_overwriting_spares_runs_teachers_and_what_others_put_there(folder, tmp_path):
    prune(folder, "model", "mid", tmp_path / "out")
    with pytest.raises(OutputError, match=r"holds an earlier output(.|\n)*--overwrite"):
        prune(folder, "model", "mid", tmp_path / "out")
    prune(folder, "model", "mid.attn", tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "lora").mkdir()
    with pytest.raises(OutputError, match=r"more than an earlier student\n.*got: lora\n"):
        prune(folder, "model", "mid", tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="lies inside the teacher's"):
        prune(folder, "model", "mid", folder / "student")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(OutputError, match=r"lies inside a run\n"):
        prune(folder, "model", "mid", tmp_path / "run" / "student", overwrite=True)
    assert not list((tmp_path / "run").glob("student"))


def test_weights_that_are_not_of_their_configuration_are_noticed_by_looking(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights_problem(folder) is None
    tensors = load_file(weights)
    save_file({**tensors, "foo.bar": torch.zeros(1)}, weights)
    assert weights_problem(folder) is None and check_unet_weights(folder) == ("foo.bar",)
    save_file({key: tensor for key, tensor in tensors.items() if key != "conv_in.bias"}, weights)
    problem = inspect_model(folder)["weights_problem"]
    assert problem == (
        "the UNet's weights are not those of its configuration: 1 tensors missing or of another shape, "
        "the first: conv_in.bias"
    )
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in weights_problem(folder)
    weights.unlink()
    assert weights_problem(folder) is None  # nothing was downloaded


def test_a_part_by_itself_is_refused_by_its_kind(folder):
    with pytest.raises(ModelError, match=r"not a diffusers pipeline folder(.|\n)*UNet2DConditionModel\n.*every part"):
        locate(folder / "unet")


def test_a_teacher_with_spoiled_weights_is_refused_and_nothing_is_written(folder, tmp_path):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"hold NaN or infinity(.|\n)*1 tensors, the first: conv_in\.bias"):
        prune(folder, "spoiled", "mid", tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_broken_index_is_refused(folder):
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json cannot be read"):
        locate(folder)


def test_other_architectures_are_refused(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no UNet that bkd can prune"):
        check_pipeline_folder(folder)


def test_a_missing_hub_repository_says_what_to_give():
    with pytest.raises(ModelError, match=r"cannot get 'nobody/nothing' from the Hub(.|\n)*teacher.id=, make: TEACHER="):
        locate("nobody/nothing")


def test_nonsense_names_say_what_is_allowed():
    with pytest.raises(ModelError, match=r"no model 'no such thing'\n.*allowed: 'shapes', a pipeline folder"):
        locate("no such thing")


def test_facts_of_the_embedded_teacher(teacher_folder):
    assert native_resolution(teacher_folder) == 32
    assert stored_dtype(teacher_folder) == torch.float16
    assert model_digest(teacher_folder) == model_digest(teacher_folder)


def test_an_autoencoder_of_another_kind_is_named(folder):
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ModelError, match=r"of another kind(.|\n)*got: AutoencoderTiny"):
        native_resolution(folder)


def test_pruning_writes_a_whole_folder_with_its_plan(teacher_folder, tmp_path):
    pruning = prune(teacher_folder, "shapes", "sd-tiny", tmp_path / "out")
    written = tmp_path / "out"
    locate(written)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for path in (teacher_folder / part).iterdir():
            assert (written / part / path.name).read_bytes() == path.read_bytes()
    plan = json.loads((written / "bkd_plan.json").read_text())
    assert plan["teacher_digest"] == model_digest(teacher_folder)
    assert plan["cost_after"]["parameters"] == pruning.after.parameters
    assert sum(p.numel() for p in load_unet(written).parameters()) == pruning.after.parameters
    assert stored_dtype(written) == torch.float16


def test_pruning_and_training_start_from_identical_bytes(teacher_folder, teacher, tmp_path):
    from bkd.surgery.build import build_student
    from bkd.surgery.unet import plan_removal

    prune(teacher_folder, "shapes", "sd-small", tmp_path / "out")
    student = build_student(teacher.unet, plan_removal(teacher.unet.config, "sd-small")).state_dict()
    pruned = load_unet(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, pruned[name]) for name, tensor in student.items())


def test_other_variants_are_neither_read_nor_copied(folder, tmp_path):
    unet, vae = folder / "unet", folder / "vae"
    digest = model_digest(folder)
    for part in (unet, vae):
        (part / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
        (part / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    assert model_digest(folder) == digest and stored_dtype(folder) == torch.float16
    prune(folder, "shapes", "sd-small", tmp_path / "out")
    assert [p.name for p in sorted((tmp_path / "out" / "vae").iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize("family", ["sd1", "sd2", "inpaint", "sdxl"])
def test_every_family_can_be_pruned_with_every_proof(family_folders, family, tmp_path):
    teacher, out = family_folders[family], tmp_path / "out"
    pruning = plan_pruning(teacher, "bk-small,down.1.attn")
    written = write_pruned(teacher, family, pruning, out)
    student = load_unet(locate(out))
    assert written.num_tensors == len(student.state_dict())
    facts = json.loads((out / "bkd_plan.json").read_text())
    assert (facts["teacher"], facts["teacher_digest"]) == (family, model_digest(teacher))
    assert facts["cost_after"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert facts["cost_before"]["macs"] > facts["cost_before"]["macs_without_attention"] > 0
    assert facts["removed"] == list(pruning.plan.removed) and facts["feature_pairs"]["block"] and facts["renamed"]


def test_students_of_inpainting_teachers_cannot_be_distilled(family_folders):
    recipe = load_recipe("shapes/sd-small", [f"teacher.id={family_folders['inpaint']}"])
    with pytest.raises(ModelError, match=r"can be pruned, but not distilled\n.*learns from masks"):
        check_inputs(recipe)


def test_a_missing_part_of_numbered_weights_is_named(folder):
    load_unet(folder).save_pretrained(folder / "unet", max_shard_size="8MB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert locate(folder)
    gone = sorted((folder / "unet").glob("*-00002-of-*"))[0]
    gone.unlink()
    with pytest.raises(ModelError, match=f"weights of part 'unet' are incomplete\n.*missing: {gone.name}"):
        locate(folder)


def test_numbered_parts_need_their_index(folder):
    load_unet(folder).save_pretrained(folder / "unet", max_shard_size="8MB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"are incomplete\n.*index\.json of the numbered parts"):
        locate(folder)


def test_a_unet_that_lost_blocks_in_place_is_refused(folder, tmp_path):
    """As in-place pruners save it: fewer tensors than the configuration names; diffusers would make up the rest."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if not key.startswith("mid_block.")}, path)
    for use in (lambda: prune(folder, "mine", "sd-small", tmp_path / "out"), lambda: load_pipeline(folder)):
        with pytest.raises(ModelError, match=r"not those of its configuration\n.*the first: mid_block(.|\n)*in place"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("model_index.json", "[]", "model_index.json cannot be read"),
        ("model_index.json", '{"unet": ["diffusers"]}', "no UNet that bkd can prune"),
        ("unet/config.json", "3", "config.json cannot be read"),
    ],
)
def test_odd_configurations_are_no_tracebacks(folder, path, text, message):
    (folder / path).write_text(text)
    with pytest.raises(ModelError, match=message):
        locate(folder)


def test_a_damaged_plan_is_named(folder):
    from bkd.errors import SurgeryError
    from bkd.surgery.plan import load_plan

    for text in ("{", "[]", '{"name": "x"}'):
        (folder / "bkd_plan.json").write_text(text)
        with pytest.raises(SurgeryError, match=r"bkd_plan\.json: this plan file cannot be read"):
            load_plan(folder)


def test_configurations_alone_are_enough_to_look(folder):
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    assert inspect_model(locate(folder, weights=False))["parameters"] == 5_523_876
    with pytest.raises(ModelError, match="has no safetensors weights"):
        locate(folder)


@pytest.fixture(scope="module")
def single_file(teacher_folder, tmp_path_factory):
    """The embedded pipeline as one file in the original layout."""
    path = tmp_path_factory.mktemp("single") / "shapes.safetensors"
    save_file(original_tensors(load_pipeline(teacher_folder, dtype=torch.float16)), path)
    return path


def test_a_single_file_is_the_pipeline_it_was_made_from(single_file, teacher_folder, cache, tmp_path):
    folder = locate(single_file, config="shapes")
    assert cache in folder.parents and stored_dtype(folder) == torch.float16
    for name, loaded in load_pipeline(folder).components.items():
        if isinstance(loaded, torch.nn.Module):
            original = getattr(load_pipeline(teacher_folder), name).state_dict()
            assert all(torch.equal(tensor, original[key]) for key, tensor in loaded.state_dict().items()), name
    prune(folder, str(single_file), "sd-small", tmp_path / "out")
    assert locate(single_file, config="shapes") == folder
    assert locate(single_file, config="shapes", weights=False) == teacher_folder


@pytest.mark.parametrize("family", ["sd2", "sdxl", "inpaint"])
def test_single_files_of_other_families(family_folders, family, cache, tmp_path):
    from diffusers import DiffusionPipeline

    original = DiffusionPipeline.from_pretrained(family_folders[family], safety_checker=None)
    path = tmp_path / f"{family}.safetensors"
    save_file(original_tensors(original), path)
    imported = DiffusionPipeline.from_pretrained(locate(path, config=family_folders[family]))
    assert type(imported) is type(original)
    for name, part in original.components.items():
        if isinstance(part, torch.nn.Module):
            found = getattr(imported, name).state_dict()
            assert all(torch.equal(tensor, found[key]) for key, tensor in part.state_dict().items()), name


def test_single_files_say_what_they_need(single_file, family_folders, tmp_path, cache):
    with pytest.raises(ModelError, match=r"does not say its architecture\n.*--config FOLDER-OR-ID"):
        locate(single_file)
    with pytest.raises(ModelError, match=r"not the one that the configuration describes\n.*5,523,876(.|\n)*allowed: "):
        locate(single_file, config=family_folders["sd1"])
    with pytest.raises(ModelError, match="no such file"):
        locate(tmp_path / "absent.safetensors", config="shapes")
    (tmp_path / "zeros.safetensors").write_bytes(bytes(3000))
    with pytest.raises(ModelError, match="damaged file"):
        locate(tmp_path / "zeros.safetensors", config="shapes", weights=False)
    with pytest.raises(ModelError, match=r"--revision is for Hub ids"):
        locate(single_file, config="shapes", revision="main")
    with pytest.raises(ModelError, match="--config is for single files"):
        locate("shapes", config="shapes")
    (tmp_path / "model.ckpt").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match=r"pickled checkpoints can run code(.|\n)*\.safetensors version"):
        locate(tmp_path / "model.ckpt", config="shapes")
    half = tmp_path / "half.safetensors"
    half.write_bytes(single_file.read_bytes()[:1_000_000])
    with pytest.raises(ModelError, match=r"damaged file(.|\n)*download the file again"):
        locate(half, config="shapes")


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (("first_stage_model.", "cond_stage_model."), "holds no UNet in the original layout"),
        (("model.diffusion_model.", "cond_stage_model."), "cannot read this file"),
        (("model.diffusion_model.", "first_stage_model."), "cannot read this file"),
    ],
)
def test_a_single_file_must_hold_every_part(single_file, prefixes, message, tmp_path, cache):
    part = tmp_path / "part.safetensors"
    save_file({key: tensor for key, tensor in load_file(single_file).items() if key.startswith(prefixes)}, part)
    before = {*cache.rglob("*")}
    with pytest.raises(ModelError, match=message):
        locate(part, config="shapes")
    assert {path for path in {*cache.rglob("*")} - before if path.name != "models"} == set()


def test_a_folder_in_use_is_left_alone(teacher_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds something else\n.*thesis"):
        prune(teacher_folder, "shapes", "sd-small", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_students_and_nothing_else(folder, teacher_folder, tmp_path):
    out = tmp_path / "out"
    prune(teacher_folder, "shapes", "sd-small", out)
    with pytest.raises(OutputError, match="or add --overwrite"):
        prune(teacher_folder, "shapes", "sd-tiny", out)
    prune(teacher_folder, "shapes", "sd-tiny", out, overwrite=True)
    assert json.loads((out / "bkd_plan.json").read_text())["name"] == "sd-tiny"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds something else"):
        prune(teacher_folder, "shapes", "sd-tiny", tmp_path / "home", overwrite=True)
    with pytest.raises(OutputError, match="is or holds the teacher itself"):
        prune(folder, "mine", "sd-tiny", folder, overwrite=True)
    with pytest.raises(OutputError, match="is or holds the teacher itself"):
        prune(folder, "mine", "sd-tiny", folder.parent, overwrite=True)
    own = shutil.copytree(folder, tmp_path / "own")
    with pytest.raises(OutputError, match="holds something else"):  # a pipeline, but none that bkd wrote
        prune(teacher_folder, "shapes", "sd-tiny", own, overwrite=True)


def test_a_failed_proof_leaves_nothing(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("bkd.models.proof.RELOAD_SCRIPT", "raise SystemExit('no diffusers here')")
    with pytest.raises(ModelError, match=r"does not load in stock diffusers(.|\n)*no diffusers here"):
        prune(teacher_folder, "shapes", "sd-small", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_proof_notices_other_weights(teacher_folder, teacher):
    unet = load_unet(teacher_folder)
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 0.1
    with pytest.raises(ModelError, match="the reloaded student computes something else"):
        check_reload(teacher_folder, probe_output(unet))


def test_the_proof_compares_every_tensor(teacher_folder, tmp_path):
    pruning = prune(teacher_folder, "shapes", "sd-tiny", tmp_path / "out")
    (weights,) = (tmp_path / "out" / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    assert check_tensors(tmp_path / "out", teacher_folder, pruning.plan) == len(tensors)
    key = "up_blocks.0.resnets.1.conv1.bias"
    tensors[key] = torch.nextafter(tensors[key], torch.tensor(9.0, dtype=tensors[key].dtype))
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"is not its teacher's\n.*up_blocks.0.resnets.1.conv1.bias <- up_blocks.1"):
        check_tensors(tmp_path / "out", teacher_folder, pruning.plan)


@pytest.mark.parametrize(
    ("torch_version", "torchvision_version", "requires", "problem"),
    [
        ("2.15.0", "0.29.2", "torch==2.15.0", None),
        ("2.15.0+cpu", "0.29.2+cpu", "torch==2.15.0", None),
        ("2.13.0", "0.29.2", "torch==2.15.0", "was built for torch 2.15.0, but torch 2.13.0 is installed"),
        ("2.15.0+cpu", "0.29.2", "torch==2.15.0", "come from different indexes"),
        ("2.15.0", None, None, None),
        ("2.11.0a0+nv25", "0.26.0a0", "torch==2.11.0a0", None),
        ("2.6.0", "0.21.0+abc123", "torch==2.6.0", None),
    ],
)
def test_torchvision_must_match_torch(monkeypatch, torch_version, torchvision_version, requires, problem):
    versions = {"torch": torch_version, "torchvision": torchvision_version}
    monkeypatch.setattr("bkd.environment.installed_version", versions.get)
    monkeypatch.setattr("bkd.environment.metadata.requires", lambda name: ["numpy", requires])
    found = torchvision_problem()
    assert found is None if problem is None else problem in found


def test_a_mismatch_stops_every_verb_with_the_remedy(monkeypatch):
    from bkd.environment import require_working_environment

    monkeypatch.setattr("bkd.environment.torchvision_problem", lambda: "torchvision 1 was built for torch 1")
    with pytest.raises(EnvironmentProblem, match="pip install --force-reinstall torch torchvision"):
        require_working_environment()
