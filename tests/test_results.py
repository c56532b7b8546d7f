"""The experiments of `make results`: which trainings they have, and what their pages say of them."""

import csv
import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # its scripts import each other by name

import experiment
import measures
import results_guided_page as guided_page
import results_guided_runs as guided
import results_page as page
import results_runs as runs
import results_steps_measures as steps_measures
import results_steps_page as steps_page
import results_steps_runs as steps

from bkd.data.shapes import scene
from bkd.data.shapes_checker import rendered
from bkd.models.facts import model_facts
from bkd.models.folder import unet_config
from bkd.models.locate import locate
from bkd.recipe.load import load_recipe
from bkd.runs.folder import RunFolder
from bkd.runs.stage_plan import plan_stage
from bkd.surgery.plan import PLAN_FILE
from bkd.surgery.presets import PRESETS
from bkd.surgery.unet import plan_removal

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
    experiment.require_same_settings(tmp_path, "settings", {"steps": 8})
    experiment.require_same_settings(tmp_path, "settings", {"steps": 8})
    with pytest.raises(SystemExit, match="made otherwise"):
        experiment.require_same_settings(tmp_path, "settings", {"steps": 20})


def test_every_way_to_train_has_a_line_in_the_chart():
    assert list(page.STYLES) == list(runs.arms(WEIGHTS))
    assert {name for pair in page.PAIRS.values() for name in pair} <= set(page.STYLES)


def test_intervals_know_of_seeds_and_of_prompts():
    rng = np.random.default_rng(0)
    same, other = np.full((3, 400), 1), (rng.random((3, 400)) < 0.5).astype(np.int64)
    assert measures.mean(same) == (100.0, 100.0, 100.0)
    prompts_only = measures.mean(other)
    assert 4 < prompts_only.high - prompts_only.low < 9  # of 1,200 coins, 5.7 points
    unequal = np.repeat([[0], [0], [1]], 400, axis=1)
    assert measures.mean(unequal).low == 0 and measures.mean(unequal).high > 90


def test_a_difference_is_paired():
    before = {0: np.arange(400) % 2 == 0}
    after = {0: np.arange(400) % 2 == 0, 1: np.ones(400, bool)}
    assert measures.difference(before, after) == "+0.0"
    better = {0: np.arange(400) % 4 != 3}
    assert measures.difference(before, better).startswith("**+25.0 [")
    assert measures.difference(before, {}) == ""


def test_a_page_without_its_place_is_left_alone(tmp_path):
    written = tmp_path / "results.md"
    written.write_text("# Results\n")
    with pytest.raises(SystemExit, match="needs the lines"):
        measures.Section(written, "experiment")
    written.write_text("before\n<!-- experiment -->\nold\n<!-- /experiment -->\nafter\n")
    measures.Section(written, "experiment").write(["## New", "word " * 30])
    lines = written.read_text().splitlines()
    assert lines[:4] == ["before", "<!-- experiment -->", "", "## New"] and lines[-2:] == [
        "<!-- /experiment -->",
        "after",
    ]
    assert "old" not in lines and max(map(len, lines)) <= 120


def test_figures_of_every_seed_can_be_read_by_others():
    right = np.zeros(sum(runs.NUM_PROMPTS.values()), bool)
    right[: runs.NUM_PROMPTS["test"]] = True
    cells = {("sd-tiny", "task loss", 25): {0: page.Drawn(right, 1.5), 2: page.Drawn(~right, 2.0)}}
    first, second = csv.DictReader(io.StringIO(page.figures(cells)))
    assert first["held out (%)"] == "0.00" and second["held out (%)"] == "100.00" and second["seed"] == "2"
    assert first["all prompts (%)"] == "62.50" and (first["steps"], first["shapes-FID"]) == ("25", "1.5000")


def test_each_way_through_adapters_is_there_with_every_seed_and_fits():
    rates = {way.tried: 1e-3 for way in guided.WAYS}
    planned = guided.comparisons(Path("out"), rates, 3)
    assert len(planned) == 3 * len(guided.WAYS) == 45
    files = [t.drawn(step, scale) for t in planned.values() for step in t.points for scale in t.scales(step)]
    assert len(set(files)) == len(files)
    for way in guided.WAYS:
        stage = load_recipe(way.recipe, list(way.overrides(1e-3))).stages[0]
        plan_stage(model_facts(locate("shapes")), stage)
        assert (stage.lora is None) is (way.rank is None) and (stage.lora is None or stage.lora.r == way.rank)
        assert stage.method.name == ("guided" if way.student == guided.WHOLE else "kd")
        assert getattr(stage.method, "takes_scale", False) is way.told


def test_learning_rates_are_chosen_by_prompts_and_seeds_of_their_own(tmp_path, monkeypatch):
    trials = guided.trials(tmp_path)
    assert {training.seed for training in trials.values()} == {experiment.TRIAL_SEED}
    assert {way.tried for way in guided.WAYS} == {way for way, _ in trials}
    scores = {3e-4: 1.0, 1e-3: 3.0, 2e-3: 3.0, 3e-3: 3.0, 4e-3: 5.0, 8e-3: 3.0, 16e-3: 5.0}
    monkeypatch.setattr(guided, "trial_score", lambda training, way: scores[float(training.folder.name)])
    best = guided.best_rates(tmp_path)  # the smallest of equals
    assert {best[way] for way in best} == {1e-3, 4e-3}
    assert {way.student for way in best if best[way] == 1e-3} == {guided.WHOLE}


def test_closeness_is_a_peak_signal_to_noise_ratio():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    others = images.copy()
    others[0] += 51  # a fifth of the range
    errors = guided.squared_errors(*map(torch.from_numpy, (images, others)))
    assert errors.tolist() == pytest.approx([0.04, 0.0])
    assert guided_page.Drawn(np.ones(2, bool), errors).closeness == pytest.approx(-10 * np.log10(0.02))


def test_what_is_missing_of_guidance_is_a_share_of_the_last_steps(tmp_path):
    training = guided.Way(guided.WHOLE).trial(tmp_path, 1e-3)
    losses = np.concatenate([np.full(60, 9.0), np.full(guided.WINDOW, 1.0)])
    np.savez(training.drawn(guided.TRIAL_STEPS), output_kd_loss=losses, unguided_loss=np.full(len(losses), 4.0))
    assert guided.guidance_missing(training) == 25.0
    assert guided.trial_score(training, guided.Way(guided.WHOLE)) == -25.0


@pytest.fixture
def halved(tmp_path, teacher_folder):
    """Run folders that say they are finished, with students that say what they were halved to."""
    plan = json.loads(plan_removal(unet_config(teacher_folder), "none").to_json())
    for made in (steps.trainings, steps.later_trainings):
        for training in made(tmp_path, 0).values():
            recipe = load_recipe(training.recipe, list(training.overrides))
            for stage, folder in zip(recipe.stages, RunFolder(training.folder).students(recipe), strict=True):
                folder.mkdir(parents=True)
                few = stage.method.name == "halving" and {"num_inference_steps": stage.method.num_inference_steps[1]}
                (folder / PLAN_FILE).write_text(json.dumps({**plan, "few_steps": few or None}))
    return tmp_path


def test_students_of_few_steps_are_found_in_their_runs(halved):
    made = steps.trainings(halved, 0)
    assert set(made) == {steps.TOLD, steps.FIXED, steps.PRUNED, steps.JOINT}
    for name, training in made.items():
        assert [training.student(n).parent.name[-2:].lstrip("-") for n in (16, 8, 4, 2)] == ["16", "8", "4", "2"]
        assert training.student(1) == training.folder / "student"
        if name != steps.JOINT:
            assert training.student(None).parent.name.endswith("-guided")
    for training in steps.later_trainings(halved, 0).values():
        load_recipe(training.recipe, list(training.overrides))


def test_everything_that_is_drawn_of_few_steps_has_a_place_of_its_own_on_the_page(halved, monkeypatch):
    drawn = [*steps.teacher_shots(halved), *steps.teacher_edits(halved)]
    drawn += [*steps.student_shots(halved, 0), *steps.student_edits(halved, 0)]
    files = [one.path for one in drawn]
    assert len(set(files)) == len(files)
    asked = {path for line in steps_page.lines(halved, 1) for paths in line.files.values() for path in paths}
    assert asked <= set(files) and {line.name for line in steps_page.lines(halved, 1)} == set(steps_page.STYLES)
    monkeypatch.setattr(steps_page, "accuracy", lambda paths: asked.update(paths) or measures.Interval(0, 0, 0))
    monkeypatch.setattr(steps_page, "diversity", lambda paths: asked.update(paths) or measures.Interval(0, 0, 0))
    unedited = steps_measures.Edited(*5 * [np.zeros(1, np.int64)])
    monkeypatch.setattr(steps_page, "edited", lambda path, kind="color": asked.add(path) or unedited)
    monkeypatch.setattr(steps_page, "fid", lambda paths: asked.update(paths) or measures.Interval(0, 0, 0))
    steps_page.calls_text(halved, steps_page.lines(halved, 1))
    steps_page.scales_text(halved, 1)
    steps_page.edits_text(halved, 1)
    assert asked == set(files)


def test_a_job_that_fails_ends_those_that_wait():
    def fails():
        raise SystemExit("no space left")

    ran = []
    waiting = {f"job {number}": lambda: ran.append(time.sleep(0.05)) for number in range(100)}
    with pytest.raises(SystemExit, match="no space left"):
        experiment.perform_jobs({"fails": fails, **waiting}, ThreadPoolExecutor(1))
    assert len(ran) < len(waiting)


def test_edits_change_one_thing_and_are_judged_by_it(tmp_path):
    before, after = steps.edits("color")
    for one, other in zip(before, after, strict=True):
        first, second = one.objects[0], other.objects[0]
        assert first.color != second.color and replace(first, color=second.color) == second
        assert one.objects[1:] == other.objects[1:] and one.background == other.background
    assert {one.objects[0].shape for one in steps.edits("theme")[1]} == {"diamond"}
    images = rendered(after)
    moved = [replace(one, objects=tuple(replace(o, dx=-o.dx or 2) for o in one.objects)) for one in after]
    images[1], images[2] = rendered([moved[1]])[0], rendered([before[2]])[0]
    path = tmp_path / "edit.npz"
    steps.save(path, images=images.numpy(), again=rendered(before).numpy())
    found = steps_measures.edited(path)
    assert found.whole.tolist() == found.changed.tolist() == [1, 1, 0] + [1] * (len(after) - 3)
    assert found.still.tolist() == [1, 0, 1] + [1] * (len(after) - 3)
    assert found.kept.all() and found.again.all()


def test_diversity_is_a_share_of_that_of_renders(tmp_path):
    path = tmp_path / "same.npz"
    one = rendered([scene("test", 0)])
    steps.save(path, images=one.expand(steps.NUM_SCENES * steps.NUM_NOISES, -1, -1, -1).numpy())
    assert steps_measures.diversity([path]) == (0, 0, 0) and steps_measures.diversity_of_renders() > 1
    assert len(steps.diverse()) == steps.NUM_SCENES * steps.NUM_NOISES
