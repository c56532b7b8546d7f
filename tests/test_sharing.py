"""Adapters over the teacher's own tensors: nothing is copied, nothing of the teacher changes, files say the same."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from bkd.errors import BkdError
from bkd.lora.adapter_file import Adapter
from bkd.lora.adapters import add_adapters, merged, require_adaptable, scaled_tensors, trained_tensors, unshared
from bkd.models.load import load_pipeline, load_unet
from bkd.recipe.lora import Lora
from bkd.surgery.build import build_student
from bkd.surgery.probe import as_arguments, unet_inputs
from bkd.surgery.unet import plan_removal
from bkd.training.checkpoint import Checkpoints
from tests.conftest import SMALL_SD1, SMALL_SDXL
from tests.test_data import cached
from tests.training import fit, kd, make_fit, run

EVERYTHING = Lora(
    r=4,
    lora_alpha=6,
    target_modules=(
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv1",
        "conv_in",
        "conv",
        "time_emb_proj",
        "proj_in",
        "conv_out",
    ),
    also_train=("biases", "norms"),
)
PLAIN = Lora(r=4)


@pytest.fixture(scope="module")
def data(teacher, teacher_folder, shards, tmp_path_factory):
    return cached(teacher, teacher_folder, shards[0].parent, tmp_path_factory.mktemp("sharing"))


@pytest.fixture
def pipe(teacher_folder):
    """A pipeline of its own: its tensors are shared, moved and cast."""
    return load_pipeline(teacher_folder)


def adapted(teacher, preset="sd-small", lora=EVERYTHING, *, share=True, scale=None):
    plan = plan_removal(teacher.config, preset)
    plan = plan.with_guidance_input(scale) if scale else plan
    student = build_student(teacher, plan, share_base=share)
    require_adaptable(student, lora)
    add_adapters(student, lora, seed=1)
    return student, plan


def shaken(student):
    """As after a training: every tensor that trains has moved."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained_tensors(student).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng).to(parameter))
    return student


def output(unet, dtype=torch.float32):
    inputs = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in unet_inputs(unet.config, side=8, num_tokens=7).items()
    }
    with torch.no_grad():
        return unet.eval()(**as_arguments(inputs)).sample


@pytest.mark.parametrize("config", [SMALL_SD1, SMALL_SDXL], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("preset", ["none", "sd-small", "bk-small"])
def test_frozen_weights_are_the_teachers_whatever_is_done_to_either(config, preset, tmp_path):
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
    student, plan = adapted(
        teacher, preset, replace(EVERYTHING, target_modules=("to_q", "to_out.0", "conv1")), scale=64
    )
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    frozen = [parameter for parameter in student.parameters() if not parameter.requires_grad]
    assert len(frozen) > 50 and unshared(student, teacher, plan) == []
    teacher.to(torch.bfloat16)
    assert unshared(student, teacher, plan) == [] and {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained_tensors(student).values()} == {torch.float32}
    student.to(memory_format=torch.channels_last).train().to("cpu")
    assert unshared(student, teacher, plan) == []
    student.load_state_dict(student.state_dict())
    assert unshared(student, teacher, plan) == []
    teacher.to(torch.float32)
    assert unshared(student, teacher, plan) == []
    assert len(unshared(copy.deepcopy(student), teacher, plan)) == len(frozen)  # so the check can fail


@pytest.mark.parametrize("preset", ["none", "sd-small"])
def test_adapters_change_nothing_until_they_train(pipe, preset):
    plain = output(build_student(pipe.unet, plan_removal(pipe.unet.config, preset)))
    assert torch.equal(output(adapted(pipe.unet, preset)[0]), plain)


def test_training_leaves_the_teacher_as_it_was_bit_for_bit(pipe, teacher, teacher_folder, data, tmp_path):
    expected, before = output(teacher.unet), copy.deepcopy(pipe.unet.state_dict())
    student, plan = adapted(pipe.unet)
    method = kd(pipe, teacher_folder, "sd-small", student=student)
    losses = []
    trained = fit(method, data, tmp_path, lambda report: losses.append(report.total), max_steps=8, lr=5e-3)
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(output(pipe.unet), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    assert unshared(student, pipe.unet, plan) == []
    names = {name for name in trained if name in trained_tensors(student)}
    assert any("conv1.lora_A" in name for name in names) and any(name.endswith("norm1.bias") for name in names)


def test_checkpoints_hold_what_trains_and_resuming_is_exact(teacher_folder, data, tmp_path):
    """With dropout inside the adapters: what it draws is a function of the step, too."""
    settings = {"lora": replace(PLAIN, lora_dropout=0.3, also_train=("norms",)), "max_steps": 4, "lr": 5e-3}

    def train(folder, steps):
        pipe = load_pipeline(teacher_folder)
        student, plan = adapted(pipe.unet, "sd-tiny", settings["lora"])
        made = make_fit(kd(pipe, teacher_folder, "sd-tiny", student=student), data, folder, max_steps=steps, lr=5e-3)
        run(made)
        assert unshared(student, pipe.unet, plan) == []
        return {name: tensor.detach().clone() for name, tensor in trained_tensors(student).items()}

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts", 4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    saved = Checkpoints(tmp_path / "whole").load(4)
    assert set(saved.trainable) == set(saved.ema) == set(saved.optimizer) == set(whole)


@pytest.mark.parametrize("preset", ["none", "sd-tiny"])
def test_a_merged_student_draws_what_the_adapted_one_does(pipe, preset):
    student, _ = adapted(pipe.unet, preset, scale=32)
    shaken(student)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    stock = merged(student)
    assert type(stock) is UNet2DConditionModel and not any("lora" in name for name in stock.state_dict())
    assert torch.allclose(output(stock), output(student), atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_an_adapter_file_gives_the_student_back(pipe, teacher_folder, tmp_path):
    student, plan = adapted(pipe.unet, scale=32)
    shaken(student)
    tensors = {name: tensor.detach() for name, tensor in trained_tensors(student).items()}
    Adapter(tensors, EVERYTHING, plan, "digest").save(tmp_path / "adapter.safetensors")
    loaded = Adapter.load(tmp_path / "adapter.safetensors")
    assert (loaded.lora, loaded.plan, loaded.teacher_digest) == (EVERYTHING, plan, "digest")
    again = build_student(load_unet(teacher_folder), plan)
    loaded.put_on(again)
    assert torch.equal(output(again), output(student))
    assert "time_embedding.cond_proj.weight" in loaded.beside
    other = build_student(load_unet(teacher_folder), plan_removal(pipe.unet.config, "sd-tiny"))
    with pytest.raises(BkdError, match="another student's"):
        loaded.put_on(other)
    (tmp_path / "adapter.safetensors").write_bytes(b"no")
    with pytest.raises(BkdError, match="cannot be read"):
        Adapter.load(tmp_path / "adapter.safetensors")


def test_a_lora_file_on_the_original_model_is_the_student(pipe, teacher_folder, tmp_path):
    from safetensors.torch import save_file

    student, _ = adapted(pipe.unet, "none", replace(EVERYTHING, also_train=()))
    shaken(student)
    save_file({f"unet.{name}": tensor for name, tensor in scaled_tensors(student).items()}, tmp_path / "l.safetensors")
    original = load_pipeline(teacher_folder)
    original.load_lora_weights(str(tmp_path / "l.safetensors"))
    assert torch.allclose(output(original.unet), output(student), atol=1e-5)


def test_precision_of_forward_passes_is_that_of_the_frozen_weights(pipe):
    """Frozen weights in bfloat16, what trains in float32: as `train.mixed_precision=bf16` has it."""
    student, _ = adapted(pipe.unet)
    shaken(student)
    exact = output(student)
    pipe.unet.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = output(student)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(target_modules=("to_qq",)), "ends in 'to_qq'; did you mean 'to_q'?"),
        (Lora(target_modules=("to_q", "attn3.to_k")), "ends in 'attn3.to_k'; did you mean 'attn2.to_k'?"),
        (Lora(target_modules=("norm1",)), "no linear or convolutional module's path ends in 'norm1'"),
        (Lora(target_modules=()), "no module is adapted"),
        (Lora(target_modules=("to_q", "2")), "'2' is also the end of paths of modules that are neither"),
        (Lora(r=64), "got: 64\n  allowed: at most 32 there\n  try: stages.0.lora.r=32"),
        (Lora(r=4, rank_pattern={"conv9": 2}), "no adapted module's path ends like 'conv9'"),
    ],
)
def test_adapters_that_peft_would_take_without_a_word(teacher, lora, message):
    with pytest.raises(BkdError) as refused:
        require_adaptable(teacher.unet, lora)
    assert message in str(refused.value)


def test_files_hold_adapters_of_one_rank(pipe, teacher_folder, tmp_path):
    """Where ranks differ and no alphas are given, diffusers 0.37 scales all adapters by one of the ranks."""
    from safetensors.torch import save_file

    student = build_student(pipe.unet, plan_removal(pipe.unet.config, "none"))
    add_adapters(student, Lora(r=8, target_modules=("to_q", "conv_out"), rank_pattern={"conv_out": 2}))
    shaken(student)
    tensors = scaled_tensors(student)
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {8}
    assert {tensor.shape[1] for name, tensor in tensors.items() if "lora_B" in name} == {8}
    save_file({f"unet.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "l.safetensors")
    original = load_pipeline(teacher_folder)
    original.load_lora_weights(str(tmp_path / "l.safetensors"))
    assert torch.allclose(output(original.unet), output(student), atol=1e-5)
    assert not torch.allclose(output(student), output(pipe.unet), atol=1e-3)


def test_ranks_by_pattern(pipe):
    lora = Lora(r=64, rank_pattern={r"(down_blocks.0|up_blocks.3)..*": 32})
    student, _ = adapted(pipe.unet, "none", lora)
    shapes = {tuple(tensor.shape) for name, tensor in trained_tensors(student).items() if "to_q.lora_B" in name}
    assert shapes == {(32, 32), (64, 64), (96, 64)}
    assert {layer.scaling["default"] for layer in student.modules() if hasattr(layer, "scaling")} == {1.0}
