"""The experiment of `make results`: which runs it has, and what its page says of them."""

import csv
import io
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # its scripts import each other by name

import results_page as page
import results_runs as runs

from bkd.recipe.load import load_recipe
from bkd.surgery.presets import PRESETS

WEIGHTS = dict.fromkeys(runs.FEATURES, 1.0)


def test_every_student_is_trained_in_every_way_with_every_seed():
    planned = list(runs.comparisons(Path("out"), WEIGHTS, 3))
    ways, students = len(runs.arms(WEIGHTS)), len(runs.STUDENTS)
    assert len(planned) == students + 3 * ways * students == 75
    files = [run.drawn(step) for run in planned for step in run.points]
    assert len(set(files)) == len(files) and set(runs.STUDENTS) <= set(PRESETS)
    assert planned[students].seed == 0 and planned[-1].seed == 2  # a whole comparison before the next seed


def test_ways_to_train_differ_in_what_their_names_say():
    arms = runs.arms(WEIGHTS)
    methods = {name: load_recipe("shapes/sd-small", arm.overrides()).stages[0].method for name, arm in arms.items()}
    weights = {name: (m.loss.task, m.loss.output_kd, m.loss.feature_kd) for name, m in methods.items()}
    assert weights["task loss"] == (1, 0, 0) and weights["+ output KD"] == (1, 1, 0)
    assert {weights[name] for name in arms if "feature" in name or "random" in name} == {(1, 1, 1)}
    assert methods["+ feature KD (self-attn, balanced)"].loss.balancing == "teacher-power"
    assert methods["+ random conditioning"].random_conditioning and arms["random initialisation"].random_init
    assert [name for name, m in methods.items() if m.sites == "self-attn"] == [
        "+ feature KD (self-attn)",
        "+ feature KD (self-attn, balanced)",
    ]


def test_weights_are_chosen_by_prompts_and_seeds_of_their_own():
    trials = list(runs.trials(Path("out")))
    assert len(trials) == len(runs.FEATURES) * len(runs.FEATURE_WEIGHTS)
    assert {run.seed for run in trials} == {runs.TRIAL_SEED}
    assert not set(runs.TRIAL_PROMPTS) & set(runs.NUM_PROMPTS)
    assert not set(runs.prompts(runs.TRIAL_PROMPTS)) & set(runs.prompts())


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    runs.require_same_settings(tmp_path, "settings", {"steps": 8})
    runs.require_same_settings(tmp_path, "settings", {"steps": 8})
    with pytest.raises(SystemExit, match="made otherwise"):
        runs.require_same_settings(tmp_path, "settings", {"steps": 20})


def test_every_way_to_train_has_a_line_in_the_chart():
    assert list(page.STYLES) == list(runs.arms(WEIGHTS))
    assert {name for pair in page.PAIRS.values() for name in pair} <= set(page.STYLES)


def test_intervals_know_of_seeds_and_of_prompts():
    rng = np.random.default_rng(0)
    same, other = np.full((3, 400), 1), (rng.random((3, 400)) < 0.5).astype(np.int64)
    assert page.mean(same) == (100.0, 100.0, 100.0)
    prompts_only = page.mean(other)
    assert 4 < prompts_only.high - prompts_only.low < 9  # of 1,200 coins, 5.7 points
    unequal = np.repeat([[0], [0], [1]], 400, axis=1)
    assert page.mean(unequal).low == 0 and page.mean(unequal).high > 90


def test_a_difference_is_paired():
    before = {0: page.Drawn(np.arange(400) % 2 == 0, 1.0)}
    after = {0: page.Drawn(np.arange(400) % 2 == 0, 1.0), 1: page.Drawn(np.ones(400, bool), 1.0)}
    assert page.difference(before, after) == "+0.0"
    better = {0: page.Drawn(np.arange(400) % 4 != 3, 1.0)}
    assert page.difference(before, better).startswith("**+25.0 [")
    assert page.difference(before, {}) == ""


def test_a_page_without_its_place_is_left_alone(tmp_path):
    (tmp_path / "results.md").write_text("# Results\n")
    with pytest.raises(SystemExit, match="needs the lines"):
        page.read_page(tmp_path / "results.md")
    (tmp_path / "results.md").write_text("before\n<!-- experiment -->\nold\n<!-- /experiment -->\nafter\n")
    assert page.read_page(tmp_path / "results.md") == ("before\n", "\nafter\n")


def test_figures_of_every_seed_can_be_read_by_others():
    right = np.zeros(sum(runs.NUM_PROMPTS.values()), bool)
    right[: runs.NUM_PROMPTS["test"]] = True
    cells = {("sd-tiny", "task loss", 25): {0: page.Drawn(right, 1.5), 2: page.Drawn(~right, 2.0)}}
    first, second = csv.DictReader(io.StringIO(page.figures(cells)))
    assert first["held out (%)"] == "0.00" and second["held out (%)"] == "100.00" and second["seed"] == "2"
    assert first["all prompts (%)"] == "62.50" and (first["steps"], first["shapes-FID"]) == ("25", "1.5000")
