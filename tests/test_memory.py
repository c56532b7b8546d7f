"""Memory of training: what is counted without weights is what real steps hold, to the byte."""

import gc
from dataclasses import replace

import pytest
import torch

from bkd.bench.memory import _measure, count_memory, for_one_pass, memory_stages
from bkd.recipe.load import load_recipe
from bkd.training.live_bytes import LiveBytes

NAMES = ("full distillation", "LoRA", "LoRA, shared, sd-small")
"""Those that are counted here: all but two."""


def test_live_bytes_are_those_that_are_still_there():
    there = torch.zeros(256)
    with LiveBytes([there]) as live:
        first = torch.zeros(1024)
        view = first[:10]
        assert live.now == 1024 + 4096
        second = first + 1
        del first
        assert live.now == 1024 + 8192  # the view holds on to it
        del view, second
        assert (live.now, live.peak) == (1024, 1024 + 8192)


@pytest.fixture(scope="module")
def recipes():
    """What is compared, in bfloat16, by name."""
    recipe = load_recipe("shapes/guided-lora", ["data.shards=simulated", "train.mixed_precision=bf16"])
    return {name: for_one_pass(recipe, stage, 2) for name, stage in memory_stages(recipe.stages[0]).items()}


@pytest.fixture(scope="module")
def counted(recipes, teacher_folder):
    return {name: count_memory(recipe, teacher_folder) for name, recipe in recipes.items() if name in NAMES}


@pytest.mark.parametrize("name", ["full distillation", "LoRA, shared, sd-small"])
def test_counted_is_measured(recipes, counted, name, cache):
    gc.collect()
    measured = dict(_measure(recipes[name]))
    assert measured.pop("process") > 2**20
    rest, whole = "gradients, activations", counted[name]["peak"]
    assert measured.pop("peak") == pytest.approx(whole, rel=1e-4)
    assert measured.pop(rest) == pytest.approx(counted[name][rest], abs=1e-4 * whole)
    assert measured == {part: size for part, size in counted[name].items() if part in measured}


def test_sharing_costs_the_adapters_alone(counted):
    whole, copied, shared = (counted[name] for name in NAMES)
    assert 2 * whole["teacher"] == whole["student"]  # half the precision
    assert copied["student"] - copied["teacher"] == copied["average"]  # adapters, in float32, and a copy
    assert shared["student"] == shared["average"] and shared["optimizer"] <= 2.01 * shared["student"]
    assert whole["peak"] > copied["peak"] > shared["peak"]


def test_fine_tuning_is_compared_with_adapters_of_the_same_model():
    stage = load_recipe("shapes/lora-finetune").stages[0]
    full, adapted = memory_stages(stage).values()
    assert full == replace(stage, lora=None) and adapted == stage


def test_a_student_that_is_there_already_shares_nothing():
    stage = load_recipe("shapes/guided", ["stages.0.student={path: runs/mine}"]).stages[0]
    assert not memory_stages(stage)["LoRA, runs/mine"].lora.share_base


def test_the_table(bkd, counted, monkeypatch):
    rows = iter([{"skipped": "out of memory"}, counted["LoRA"], *counted.values()])
    monkeypatch.setattr("bkd.bench.memory.count_memory", lambda recipe, teacher: next(rows))
    code, printed = bkd("bench", "memory", "shapes/guided-lora", "--batch", 2, "--count")
    assert code == 0, printed
    assert "MiB, 2 images a pass" in printed and "full fine-tune skipped: out of memory" in printed
    assert f"{counted['LoRA, shared, sd-small']['peak'] / 2**20:,.0f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes/guided-lora", "stages.0.lora.r=64"], "this rank is larger than the module"),
        (["shapes/nothing"], "unknown recipe"),
        (["shapes/guided-lora", "teacher.id=nowhere"], "no model 'nowhere'"),
        (["shapes/guided-lora", "data.resolution=64"], "the recipe's resolution is not the teacher's"),
        (["shapes/guided-lora", "train.optimizer=adamw-8bit"], "8-bit states cannot be counted"),
    ],
)
def test_bad_input(bkd_refuses, arguments, message):
    bkd_refuses(["bench", "memory", *arguments, "--count"], message)


def test_what_cannot_be_compared_with_is_left_out(bkd, counted, monkeypatch, tmp_path):
    """A pruned teacher has no sd-small any more; its own recipe is measured all the same."""
    assert bkd("prune", "shapes", "--blocks", "sd-tiny", "-o", tmp_path / "tiny")[0] == 0
    monkeypatch.setattr("bkd.bench.memory.count_memory", lambda recipe, teacher: counted["LoRA"])
    arguments = ["shapes/guided-lora", f"teacher.id={tmp_path / 'tiny'}", "--batch", 2, "--count"]
    code, printed = bkd("bench", "memory", *arguments)
    assert code == 0 and "LoRA, shared, sd-small skipped:" in printed, printed
