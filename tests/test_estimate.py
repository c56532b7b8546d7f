"""What a training will take: counted without memory, and right."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.autograd.graph import saved_tensors_hooks

from bkd.recipe.load import load_recipe, written_train
from bkd.recipe.schema import Train
from bkd.recipe.stages import Kd, Loss, Stage
from bkd.surgery.build import build_empty
from bkd.surgery.probe import as_arguments, unet_inputs
from bkd.surgery.unet import plan_removal
from bkd.training.estimate import activation_bytes, advice, training_memory
from tests.conftest import SMALL_SD1, SMALL_SDXL
from tools.architectures import SD1

CPU = torch.device("cpu")
IMAGES = 2


def really_kept(config, checkpointing):
    """Bytes that a real forward pass keeps for its backward pass."""
    unet = UNet2DConditionModel.from_config(config).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    inputs = unet_inputs(unet.config, side=config["sample_size"], num_tokens=77)
    inputs = as_arguments({name: torch.cat([tensor] * IMAGES) for name, tensor in inputs.items()})
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    with saved_tensors_hooks(count, lambda tensor: tensor):
        output = unet(**inputs).sample.float().square().mean()
    assert output.requires_grad
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize("config", [SMALL_SD1, SMALL_SDXL], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_counted_as_they_are_kept(config, checkpointing):
    train = Train(batch=IMAGES, gradient_checkpointing=checkpointing)
    assert activation_bytes(build_empty(config), train, IMAGES) == pytest.approx(
        really_kept(config, checkpointing), rel=0.02
    )


def test_memory_of_a_real_pair():
    plan = plan_removal(SD1, "sd-small")
    memory = training_memory(SD1, plan, Train(batch=1, ema=0.99, mixed_precision="bf16"), Stage())
    assert memory.parameters == 579_384_964
    assert memory.teacher == 2 * 859_520_964 and memory.student == memory.gradients == memory.average == 4 * 579_384_964
    assert memory.optimizer == 2 * memory.student and memory.checkpoint == 16 * 579_384_964
    assert 2**30 < memory.activations < 3 * 2**30
    eight = training_memory(SD1, plan, Train(batch=1, optimizer="adamw-8bit", gradient_checkpointing=True), Stage())
    assert eight.optimizer == 2 * 579_384_964 and eight.average == 0 and eight.activations < memory.activations / 3


def test_shards_and_passes_divide_what_a_process_holds():
    plan, method = plan_removal(SMALL_SD1, "sd-tiny"), Stage(method=Kd(loss=Loss(feature_kd=0.0)))
    whole = training_memory(SMALL_SD1, plan, Train(batch=8), method)
    sharded = training_memory(SMALL_SD1, plan, Train(batch=8, parallel="fsdp2"), method, world_size=2)
    split = training_memory(SMALL_SD1, plan, Train(batch=8, grad_accum=2), method)
    assert sharded.student == whole.student // 2 and sharded.teacher == whole.teacher // 2
    assert sharded.checkpoint == whole.checkpoint and sharded.student_file == whole.student_file
    assert split.student == whole.student and split.activations == sharded.activations < 0.7 * whole.activations


@pytest.fixture(scope="module")
def memory():
    return training_memory(SMALL_SD1, plan_removal(SMALL_SD1, "sd-tiny"), Train(batch=8), Stage())


def test_a_sound_recipe_needs_no_advice(memory):
    for name in ("shapes/sd-small", "shapes/sd-tiny"):
        train = load_recipe(name).train
        assert advice(train, written_train(name), memory, CPU) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch": 4}, "lr 0.002 is for batches of 32; for 4 that would be 0.00071 (square root) to 0.00025 (linear)"),
        ({"lr": 2e-2}, "for 32 that would be 0.002 (square root) to 0.002 (linear), not 0.02"),
        ({"max_steps": 20, "ema": 0.0}, "the warm-up of 20 steps does not end within 20"),
        ({"ema": 0.9999}, "averages over 10,000 steps of only 400"),
    ],
)
def test_what_does_not_fit_is_said_with_numbers(memory, changes, expected):
    written = written_train("shapes/sd-small")
    found = advice(replace(written, **changes), written, memory, CPU)
    assert len(found) == 1 and expected in found[0]


def test_a_device_that_is_too_small_and_settings_nobody_published(memory, monkeypatch):
    monkeypatch.setattr("bkd.training.estimate.device_memory", lambda device: 1)
    large = replace(memory, parameters=579_384_964)
    train = Train(batch=256, lr=0.1)
    small, far = sorted(advice(train, train, large, CPU))
    assert "a step needs about" in small and "train.grad_accum" in small
    assert "lr / batch is 0.0004, far from every published setting" in far


def test_the_dry_run_says_what_it_takes(bkd, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["train.batch=16", "train.grad_accum=4", "train.lr=2e-2"]
    code, printed = bkd("train", "shapes/sd-tiny", f"data.shards={shards[0].parent}", *settings, "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    for part in ("teacher", "student", "gradients", "optimizer", "average", "activations", "together"):
        assert f"│ {part} " in printed
    assert "2,245,380 of 5,523,876 UNet parameters" in printed and "data: 96 samples" in printed
    assert "400 steps of 16 images: 1,600 passes of 4, 6,400 images, 66.67 epochs" in printed
    assert "disk: 3 checkpoints" in printed and "note: the recipe's lr 0.002 is for batches of 32" in printed


def test_a_few_steps_are_measured(bkd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["train.batch=4", "stages.0.method.random_conditioning=true"]
    code, printed = bkd("bench", "train", "shapes/sd-tiny", "--steps", 1, *settings)
    assert code == 0 and not list(tmp_path.iterdir())
    assert "images/s" in printed and "hours for 400 steps" in printed and "peak memory" in printed
    code, printed = bkd("bench", "train", "shapes/full-chain", "--steps", 1, "stages.0.train.max_steps=7")
    assert code == 0 and "hours for the 7 steps of the first of 6 stages" in " ".join(printed.split())
