"""inspect, prune and remap as a user meets them."""

import json
import re
import shutil

import pytest
import torch

from bkd.surgery.plan import PLAN_FILE


def test_inspect_shows_the_tree_and_why_units_stay(bkd):
    code, printed = bkd("inspect", "shapes")
    assert code == 0 and "sd-tiny = bk-tiny" in printed
    assert "takes up.2.1 along" in printed and "alone turns 32 channels into 64" in printed
    assert "level.2 can only go together with the levels inside it" in printed


def test_inspect_gives_programs_everything(bkd):
    found = json.loads(bkd("inspect", "shapes", "--json")[1])
    assert found["parameters"] == 5_523_876 and found["student_of"] is None
    assert {p["name"]: p["parameters"] for p in found["presets"]}["sd-tiny"] == 2_245_380
    units = {unit["id"]: unit for unit in found["units"]}
    assert units["down.1.1"]["partners"] == ["up.2.1"] and units["down.1.1"]["reason"] is None
    assert units["down.1.0"]["reason"] and units["mid"]["modules"] == ["mid_block"]
    assert units["level.3"]["parameters"] == 1_365_312 and units["down.1.0"]["saved"] is None
    saved = units["down.1.1"]["saved"]  # with its partner
    assert saved["parameters"] == units["down.1.1"]["parameters"] + units["up.2.1"]["parameters"]
    assert saved["macs"] / found["macs"] == pytest.approx(
        units["down.1.1"]["share_of_macs"] + units["up.2.1"]["share_of_macs"]
    )
    layers = [unit for name, unit in units.items() if name.count(".") == 2 and name[-1].isdigit() and ".t" not in name]
    assert 0.75 < sum(unit["share_of_macs"] for unit in layers) < 1


def test_inspect_takes_seconds_for_sdxl_and_needs_no_weights(bkd, family_folders, tmp_path):
    folder = shutil.copytree(family_folders["sdxl"], tmp_path / "xl")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    code, printed = bkd("inspect", folder)
    layer, stack = (line for line in printed.splitlines() if line.lstrip("│ ").startswith("down.2.0"))
    assert code == 0 and "each" not in layer and "│     down.2.0.t0 … t3" in stack and "each" in stack
    code, printed = bkd("prune", folder, "--blocks", "sd-small,*.t3", "--dry-run")
    assert code == 0 and "nothing written" in printed


def test_neighbours_share_a_word_and_gaps_do_not():
    from bkd.cli.anatomy_view import _compact

    stack = [f"down.2.0.t{number}" for number in (0, 5, 6, 7, 9, 10)]
    assert [*_compact(["mid", *stack])] == ["mid", "down.2.0.t0", "down.2.0.t5 … t7", "down.2.0.t9", "down.2.0.t10"]


def test_a_dry_run_shows_partners_and_cost(bkd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed = bkd("prune", "shapes", "--blocks", "down.1.1,mid.attn", "-o", "out", "--dry-run")
    assert code == 0 and "removed: down.1.1, mid.attn" in printed
    assert "a stock configuration lacks both or neither: up.2.1" in printed
    assert "5,523,876" in printed and "4,753,508" in printed and "ControlNets do not fit" in printed
    code, printed = bkd("prune", "shapes", "--blocks", "down.1.1", "--strict", "--dry-run")
    assert code == 1 and "partners needed: up.2.1" in printed
    assert bkd("prune", "shapes", "--blocks", "down.1.1,up.2.1", "--strict", "--dry-run")[0] == 0
    assert not list(tmp_path.iterdir())


def test_a_pruned_folder_says_what_it_is_and_can_be_pruned_again(bkd, tmp_path):
    code, printed = bkd("prune", "shapes", "--blocks", "sd-small", "-o", tmp_path / "small")
    assert code == 0 and "tensors equal the teacher's" in printed and "loads it with stock diffusers" in printed
    assert "teacher shapes, sha256 " in " ".join(printed.split()) and "feature sites: 9 block, 8 bk" in printed
    plan = json.loads((tmp_path / "small" / PLAN_FILE).read_text())
    assert plan["name"] == "sd-small" and plan["partners"] == [] and plan["teacher"] == "shapes"
    assert plan["cost_after"] == {"parameters": 3_707_652, "macs": 32_400_064, "macs_without_attention": 31_003_648}
    code, printed = bkd("inspect", tmp_path / "small")
    assert code == 0 and "a student by plan 'sd-small'" in printed
    (tmp_path / "small" / PLAN_FILE).unlink()
    code, printed = bkd("inspect", tmp_path / "small", "--teacher", "shapes")
    assert code == 0 and "taken to be 'sd-small', which lacks down.0.1, up.3.1" in printed
    code, printed = bkd("prune", tmp_path / "small", "--blocks", "mid", "-o", tmp_path / "again")
    assert code == 0 and "removed: mid" in printed


def test_keep_scores_chooses_and_draws(bkd, tmp_path, shards):
    keep = ("--keep", "0.7", "--calibration", shards[0].parent, "--calibration-samples", 4)
    code, printed = bkd("prune", "shapes", *keep, "-o", tmp_path / "out")
    assert code == 0 and "predicted change" in printed and "measured" in printed
    assert "compare with a preset" in printed
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"bkd_plan.json", "bkd_importance.json", "bkd_importance.svg", "unet"} <= written
    plan = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    assert plan["cost_after"]["parameters"] <= 0.7 * plan["cost_before"]["parameters"]


def test_keep_counts_macs_on_demand(bkd, shards):
    calibration = ("--calibration", shards[0].parent, "--calibration-samples", 4)
    code, printed = bkd("prune", "shapes", "--keep", "70%", "--macs", *calibration, "--dry-run")
    assert code == 0 and "chosen for at most " in printed and " MACs: predicted change" in printed
    left = next(line for line in printed.splitlines() if " left " in line)
    assert float(left.split("│")[3].strip().removesuffix("%")) <= 70
    code, printed = bkd("prune", "shapes", "--keep", "1%", "--macs", *calibration, "--dry-run")
    assert code == 1 and re.search(r"a budget of [\d,]+ MACs\n", printed)


def test_remap_lists_what_is_lost(bkd, tmp_path):
    from safetensors.torch import load_file, save_file

    bkd("prune", "shapes", "--blocks", "mid,down.1.1", "-o", tmp_path / "student")
    names = ["down_blocks.1.attentions.0.proj_in", "up_blocks.2.attentions.2.proj_in", "mid_block.attentions.0.proj_in"]
    tensors = {}
    for name, width in zip(names, (64, 64, 96), strict=True):
        tensors |= {f"unet.{name}.lora_A.weight": torch.ones(2, width, 1, 1)}
        tensors |= {f"unet.{name}.lora_B.weight": torch.ones(width, 2, 1, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    arguments = (
        "remap",
        tmp_path / "lora.safetensors",
        "--student",
        tmp_path / "student",
        "-o",
        tmp_path / "new.safetensors",
    )
    code, printed = bkd(*arguments)
    assert code == 0 and "holds 4 tensors, 2 lost" in printed
    assert "left out, its module was removed: unet.mid_block.attentions.0.proj_in" in printed
    carried = load_file(tmp_path / "new.safetensors")
    assert "unet.up_blocks.2.attentions.1.proj_in.lora_A.weight" in carried
    code, printed = bkd(*arguments)
    assert code == 1 and "the output file exists" in printed
    (tmp_path / "student" / PLAN_FILE).unlink()
    code, printed = bkd(*arguments, "--overwrite")
    assert code == 1 and "--teacher MODEL" in printed
    assert bkd(*arguments, "--overwrite", "--teacher", "shapes")[0] == 0


OUT = ("-o", "out")
KEEP = ("--calibration", "shapes", *OUT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "shapes", "--blocks", "sd-smal", *OUT], "did you mean 'sd-small'?"),
        (["prune", "shapes", "--blocks", "down.1.7", *OUT], "unknown unit 'down.1.7'; did you mean 'down.1."),
        (["prune", "shapes", "--blocks", "down.1.0", *OUT], "the nearest that can go: down.1.1, up.2.1"),
        (["prune", "shapes", "--blocks", "koala-1b", *OUT], "deeper transformer stacks (SDXL)"),
        (["prune", "shapes", "--blocks", "none", *OUT], "nothing would be removed"),
        (["prune", "shapes", "--blocks", "", *OUT], "nothing would be removed"),
        (["prune", "shapes", "--blocks", "*", *OUT], "nothing would be left"),
        (["prune", "shapes", "--keep", "0.01", *KEEP], "no student is that small"),
        (["prune", "shapes", "--keep", "6M", *KEEP], "nothing would be removed"),
        (["prune", "shapes", "--keep", "0", *KEEP], "everything would be removed"),
        (["prune", "shapes", "--keep", "half", *KEEP], "not a size"),
        (["prune", "shapes", "--keep", "0.7", "--calibration", "nothing/*.tar", *OUT], "no shards found"),
        (["prune", "nobody/nothing", "--blocks", "sd-small", *OUT], "cannot get 'nobody/nothing'"),
        (["prune", "model.ckpt", "--blocks", "sd-small", *OUT], "no such file"),
        (["inspect", "nowhere"], "no model 'nowhere'"),
        (["inspect", "shapes", "--teacher", "nowhere"], "no model 'nowhere'"),
        (["remap", "lora.safetensors", "--student", "shapes", "-o", "x.safetensors"], "does not say how it was pruned"),
    ],
)
def test_bad_input_is_an_error_and_writes_nothing(bkd_refuses, arguments, message):
    bkd_refuses(arguments, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "mid"], "needed unless --dry-run"),
        ([*OUT], "--blocks LIST or --keep SIZE"),
        (["--blocks", "mid", "--keep", "0.5", *OUT], "--blocks LIST or --keep SIZE"),
        (["--keep", "0.5", *OUT], "captioned images"),
        (["--keep", "0.5", "--strict", *OUT], "names no units"),
        (["--blocks", "mid", "--calibration", "shapes", *OUT], "goes with --keep"),
        (["--blocks", "mid", "--macs", *OUT], "goes with --keep"),
    ],
)
def test_prune_says_which_options_it_needs(bkd, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, printed = bkd("prune", "shapes", *arguments)
    assert code == 2 and message in " ".join(printed.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_an_output_in_use_is_found_before_any_work(bkd, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr("bkd.pruning.importance.load_pipeline", lambda *args, **kwargs: pytest.fail("work was done"))
    code, printed = bkd("prune", "shapes", "--keep", "0.5", "--calibration", "shapes", "-o", tmp_path)
    assert code == 1 and "holds something else" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
