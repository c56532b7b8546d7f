"""--keep: exact choices among what can be expressed, honest scores, and budgets that make sense."""

import itertools
import json
import random
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from bkd.data.indexing import index_shard
from bkd.data.sources import LocalShard
from bkd.errors import DataError, ModelError, SurgeryError
from bkd.models.load import load_pipeline
from bkd.pruning.calibration import calibration_batches
from bkd.pruning.importance import select, write_importance
from bkd.surgery.anatomy import read_anatomy
from bkd.surgery.budget import Amounts, amount_within, cost_map, parse_budget
from bkd.surgery.build import build_student
from bkd.surgery.choose import choose, enumerate_options, scorable_removals
from bkd.surgery.cost import unet_cost
from bkd.surgery.options import complete
from bkd.surgery.probe import unet_inputs
from bkd.surgery.score import OutputChange
from bkd.surgery.unet import plan_layout, plan_removal
from bkd.surgery.units import all_units, removed_units
from tests.conftest import SD1, SDXL, SMALL_SD1, SMALL_SD2, SMALL_SDXL

SMALL_CONFIGS = {"SD1": SMALL_SD1, "SD2": SMALL_SD2, "SDXL": SMALL_SDXL}
NUM_TOKENS = 5


@cache
def amounts_of(model, measure):
    return getattr(cost_map(SMALL_CONFIGS[model], num_tokens=NUM_TOKENS), measure)


def saved(anatomy, amounts, chosen):
    """By all removals together."""
    return amounts.saved(anatomy, [unit for units in chosen for unit in units])


@pytest.mark.parametrize("measure", ["parameters", "macs"])
@pytest.mark.parametrize("model", SMALL_CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_choices_meet_the_budget_and_can_be_expressed_without_partners(model, measure, seed):
    config, rng = SMALL_CONFIGS[model], random.Random(seed)
    anatomy, amounts = read_anatomy(config), amounts_of(model, measure)
    scores = {units: rng.random() ** 4 for units in scorable_removals(anatomy)}
    limit = round(amounts.total * rng.uniform(0.45, 0.98))
    chosen = choose(anatomy, scores, amounts, limit)
    wanted = {unit for units in chosen for unit in units}
    layout = complete(anatomy, wanted)
    assert {*removed_units(anatomy, layout)} <= wanted  # nothing beyond what was chosen
    left = getattr(unet_cost(config, plan_layout(anatomy, layout), num_tokens=NUM_TOKENS), measure)
    assert left <= limit
    assert left == amounts.total - saved(anatomy, amounts, chosen)


@pytest.mark.parametrize("measure", ["parameters", "macs"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_the_choice_is_the_best_of_all(share, measure):
    """Against brute force over every combination of options; transformer layers are made too dear to go."""
    anatomy, amounts = read_anatomy(SMALL_SD1), amounts_of("SD1", measure)
    rng = random.Random(share)
    scores = {units: rng.random() for units in scorable_removals(anatomy)}
    scores |= {units: 1e6 for units in scores if ".t" in units[0]}
    limit = round(amounts.total * share)
    places = {}
    for option in enumerate_options(anatomy):
        (place,) = option.places
        places.setdefault(place, []).append(option)
    best = np.inf
    for is_shallow, here in ((False, amounts.whole), (True, amounts.shallow)):  # the mid block costs more in the second
        options = [
            [o for o in group if not (place == "level.3" and ("level.3" in o.units) != is_shallow)]
            for place, group in places.items()
        ]
        costs = [[scores[o.units] if o.units else 0.0 for o in group] for group in options]
        gone = [[amount_within(anatomy, o.units, here) for o in group] for group in options]
        total_cost = np.array([sum(picked) for picked in itertools.product(*costs)])
        total_gone = np.array([sum(picked) for picked in itertools.product(*gone)])
        best = min(best, total_cost[total_gone >= sum(here.values()) - limit].min(initial=np.inf))
    chosen = choose(anatomy, scores, amounts, limit)
    assert sum(scores[units] for units in chosen) == pytest.approx(best)
    assert saved(anatomy, amounts, chosen) >= amounts.total - limit


@pytest.mark.parametrize("model", SMALL_CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_what_removals_save_is_what_the_student_costs_less(model, seed):
    config, rng = SMALL_CONFIGS[model], random.Random(seed)
    anatomy = read_anatomy(config)
    innermost = [f"level.{anatomy.num_levels - 1}"] * (seed % 2)
    while True:
        try:
            plan = plan_removal(config, ",".join({*rng.sample(all_units(anatomy), 3), *innermost}))
            break
        except SurgeryError:
            continue
    cost = unet_cost(config, plan, num_tokens=NUM_TOKENS)
    assert cost_map(config, num_tokens=NUM_TOKENS).without(anatomy, plan.removed) == cost


def test_without_its_innermost_level_the_mid_block_costs_more():
    """It then works at the next higher resolution: on SD 1.x that eats up all that the level saves."""
    anatomy, amounts = read_anatomy(SD1), cost_map(SD1).macs
    assert amounts.saved(anatomy, ["level.3"]) < 0 < amounts.saved(anatomy, ["level.3", "mid"])


@pytest.mark.parametrize("model", SMALL_CONFIGS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-9])
def test_the_choice_does_not_depend_on_the_scale_of_scores(model, scale):
    """Real scores span ten decades, and a solver's tolerances are absolute."""
    anatomy, amounts = read_anatomy(SMALL_CONFIGS[model]), amounts_of(model, "parameters")
    for seed in range(3):
        rng = random.Random(seed)
        scores = {units: 10 ** rng.uniform(-8, 0) for units in scorable_removals(anatomy)}
        limit = round(amounts.total * rng.uniform(0.5, 0.95))
        small = {units: score * scale for units, score in scores.items()}
        plain = choose(anatomy, scores, amounts, limit)
        scaled = choose(anatomy, small, amounts, limit)
        assert sum(scores[u] for u in scaled) == pytest.approx(sum(scores[u] for u in plain), rel=1e-9)


def test_a_budget_is_kept_to_the_last_parameter():
    """At SDXL's size a solver's tolerance is thousands of parameters."""
    anatomy, amounts = read_anatomy(SDXL), cost_map(SDXL).parameters
    rng = random.Random(0)
    scores = {units: rng.random() for units in scorable_removals(anatomy)}
    limit = amounts.total // 2
    for _ in range(4):
        chosen = choose(anatomy, scores, amounts, limit)
        left = amounts.total - saved(anatomy, amounts, chosen)
        assert left <= limit
        limit = left - 1


def test_the_innermost_level_of_sdxl_is_an_option_with_its_partners():
    anatomy, amounts = read_anatomy(SMALL_SDXL), amounts_of("SDXL", "parameters")
    level = next(option for option in enumerate_options(anatomy) if "level.2" in option.units)
    assert {*level.units} == {"level.2", "mid", "down.1.1", "up.1.0"}
    assert {*level.places} == {"level.2", "level.1", "mid"}
    scores = {units: 0.0 if units == level.units else 1.0 for units in scorable_removals(anatomy)}
    chosen = choose(anatomy, scores, amounts, amounts.total // 2)
    assert chosen == (level.units,)


def test_mid_and_first_innermost_stack_stay_equally_deep():
    """SDXL's mid block takes its depth from another attention: cheap layers of one alone cannot be had."""
    anatomy, amounts = read_anatomy(SMALL_SDXL), amounts_of("SDXL", "parameters")
    scores = dict.fromkeys(scorable_removals(anatomy), 1000.0)
    scores |= {(f"mid.t{number}",): 0.0 for number in range(4)}
    scores |= {(f"down.2.0.t{number}",): 1.0 for number in range(4)}
    one_layer = amounts.saved(anatomy, ["mid.t0"])
    chosen = choose(anatomy, scores, amounts, amounts.total - 3 * one_layer)
    kinds = [units[0].split(".t")[0] for units in chosen]
    assert kinds.count("mid") == kinds.count("down.2.0") == 2


def test_a_budget_that_nothing_can_meet_says_what_can():
    anatomy, amounts = read_anatomy(SMALL_SD1), amounts_of("SD1", "parameters")
    scores = dict.fromkeys(scorable_removals(anatomy), 1.0)
    with pytest.raises(SurgeryError, match=r"no student is that small\n.*a budget of 9 parameters\n") as caught:
        choose(anatomy, scores, amounts, 9)
    smallest = int(str(caught.value.allowed).split()[0].replace(",", ""))
    chosen = choose(anatomy, scores, amounts, smallest)
    assert amounts.total - saved(anatomy, amounts, chosen) == smallest


@pytest.mark.parametrize(
    ("keep", "parameters"),
    [("0.65", 650), ("65%", 650), ("0.5K", 500), ("480", 480), (" .25 ", 250), ("0.0000005G", 500)],
)
def test_budgets(keep, parameters):
    assert parse_budget(keep, Amounts("parameters", {"all": 1000}, {"all": 1000})) == parameters


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("much", r"--keep: not a size\n.*much\n.*0\.65"),
        ("-1", "not a size"),
        ("65", r"two things\n.*65\n.*65% or 65M"),
        ("1.5", "two things"),
        ("1", "nothing would be removed"),
        ("2K", r"nothing would be removed\n.*2,000 parameters\n.*fewer than the teacher's 1,000"),
        ("0", "everything would be removed"),
    ],
)
def test_budgets_that_make_no_sense(keep, message):
    with pytest.raises(SurgeryError, match=message):
        parse_budget(keep, Amounts("parameters", {"all": 1000}, {"all": 1000}))


@pytest.fixture(scope="module")
def random_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config({**SMALL_SD1, "transformer_layers_per_block": [2, 1, 1, 1]}).eval()


def test_scores_are_relative_squared_changes(random_unet):
    batches = [unet_inputs(random_unet.config, side=8, num_tokens=5, seed=seed) for seed in range(2)]
    change = OutputChange(random_unet, batches)
    assert change.num_samples == 2
    assert change.of_plan(plan_removal(random_unet.config, "none")) == 0
    plan = plan_removal(random_unet.config, "mid")
    student = build_student(random_unet, plan)
    with torch.no_grad():
        pairs = [(student(**batch).sample, random_unet(**batch).sample) for batch in batches]
    expected = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    assert change.of_plan(plan) == pytest.approx(float(expected), rel=1e-5)
    before = {name: tensor.clone() for name, tensor in random_unet.state_dict().items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in random_unet.state_dict().items())


def test_skipping_a_transformer_layer_is_removing_it(random_unet):
    change = OutputChange(random_unet, [unet_inputs(random_unet.config, side=8, num_tokens=5)])
    skipped = change.of_skipping("down_blocks.0.attentions.1.transformer_blocks.0")
    assert skipped == pytest.approx(change.of_plan(plan_removal(random_unet.config, "down.0.1.t0")), rel=1e-5)
    assert skipped > 0 and not random_unet.down_blocks[0].attentions[1].transformer_blocks[0]._forward_hooks


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_selection_is_measured_and_drawn(family, family_folders, shards, tmp_path):
    progress = []
    found = select(
        family_folders[family],
        "0.7",
        str(shards[0]),
        num_samples=6,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert found.num_samples == 6 and found.measured > 0
    scored = {score.units: score.change for score in found.scores}
    assert found.predicted == pytest.approx(sum(scored[units] for units in found.chosen))
    assert progress[-1] == (len(scored), len(scored)) and all(change >= 0 for change in scored.values())
    write_importance(tmp_path, family_folders[family], found)
    written = json.loads((tmp_path / "bkd_importance.json").read_text())
    assert written["plan"]["removed"] == list(found.plan.removed)
    picture = (tmp_path / "bkd_importance.svg").read_text()
    assert picture.startswith("<svg") and "down.0.0" in picture and f"{found.predicted:.2g} predicted" in picture


def test_calibration_inputs_are_spread_and_repeatable(family_folders, shards):
    folder = family_folders["sd1"]
    pipe = load_pipeline(folder)
    first, again = (calibration_batches(folder, pipe, [LocalShard(path) for path in shards], 40) for _ in range(2))
    assert [len(batch["sample"]) for batch in first] == [32, 8]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    timesteps = torch.cat([batch["timestep"] for batch in first])
    assert timesteps.min() < 25 and timesteps.max() > 975 and len(set(timesteps.tolist())) == 40


def test_unusable_calibration_is_refused(family_folders, shards, tmp_path):
    from bkd.data.shards import NewSample, write_shards

    bad = write_shards([NewSample(image=b"no image", extension="png", caption="a")] * 3, tmp_path / "bad")
    assert len(index_shard(bad[0])) == 3
    with pytest.raises(DataError, match=r"no sample of the calibration shards can be used(.|\n)*--calibration"):
        select(family_folders["sd1"], "0.7", str(bad[0]), num_samples=4)
    with pytest.raises(DataError, match="no shards found"):
        select(family_folders["sd1"], "0.7", str(tmp_path / "*.tar"), num_samples=4)
    with pytest.raises(ModelError, match=r"cannot measure inpainting UNets(.|\n)*--blocks"):
        select(family_folders["inpaint"], "0.7", str(shards[0]), num_samples=4)
