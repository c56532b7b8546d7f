"""Recipes: every packaged one loads, and every mistake is reported at once, with its remedy."""

import pytest

from bkd.errors import RecipeError
from bkd.recipe.load import (
    dump_recipe,
    find_recipe,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipes_folder,
    result_keys,
)
from bkd.recipe.schema import Recipe
from bkd.surgery.presets import PRESET_NAMES


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_recipe_loads_and_is_short_and_described(name):
    recipe = load_recipe(name, ["data.shards=x"])
    assert all(str(stage.student) in PRESET_NAMES for stage in recipe.stages)
    lines = (recipes_folder() / f"{name}.yaml").read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert len(lines) <= 40 and all(word in header for word in ("Run:", "Hardware:", "Expect:", "arXiv"))


def test_the_published_settings():
    segmind = load_recipe("sd15/sd-tiny", ["data.shards=x"])
    loss = segmind.stages[0].method.loss
    assert (segmind.train.lr, segmind.train.lr_schedule, segmind.train.batch) == (1e-5, "cosine", 32)
    assert (segmind.train.max_steps, loss.task, loss.output_kd, loss.feature_kd) == (125_000, 1, 0.5, 0.5)
    assert load_recipe("sd15/sd-small", ["data.shards=x"]).train.max_steps == 100_000
    bk = load_recipe("sd15/bk-base", ["data.shards=x"])
    assert (bk.train.lr, bk.train.lr_schedule, bk.train.batch, bk.train.max_steps) == (5e-5, "constant", 256, 50_000)
    assert bk.stages[0].method.sites == "bk" and bk.stages[0].method.loss.feature_kd == 1


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return str(path)


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(
        tmp_path,
        """
train: {max_steps: ten, lr: 1e-4, batch: 3.5, ema: 2}
tran: 1
stages:
  - method: {loss: {feat: 1}}
    student: {blocks: sd-smal}
""",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["nonsense", "stages.4.student.blocks=x"])
    assert str(caught.value).splitlines() == [
        f"recipe {path}: 8 problems",
        "  nonsense: an override is key=value, such as train.lr=1e-4",
        "  stages.4.student.blocks: there is no '4' to set a value in; there are 0 to 0 in the recipe",
        "  train.batch: should be a whole number (got 3.5)",
        "  train.max_steps: should be a whole number (got 'ten')",
        "  stages.0.method.loss.feat: unknown key; did you mean 'stages.0.method.loss.feature_kd'? (got 1)",
        "  tran: unknown key; did you mean 'train'? (got 1)",
        "  train.ema: should lie between 0 and 1 (got 2)",
        "  stages.0.student.blocks: unknown preset 'sd-smal'; did you mean 'sd-small'? "
        "(allowed: sd-small, bk-small, sd-tiny, koala-1b, koala-700m, none, bk-base, bk-tiny, "
        "or units of `bkd inspect`)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: -1", r"seed: should lie between 0 and"),
        ("train: {lr: .nan}", r"train\.lr: should lie between 0 and 10 \(got nan\)"),
        ("train: {betas: [0.9, 1.5]}", r"train\.betas\.1: should lie between 0 and 0\.999999 \(got 1\.5\)"),
        ("stages: [{method: {loss: {task: -1}}}]", r"loss\.task: should lie between 0 and 1e\+06 \(got -1\)"),
        (
            "stages: [{method: {loss: {task: 0, output_kd: 0, feature_kd: 0}}}]",
            r"stages\.0\.method\.loss: at least one weight should not be 0",
        ),
        ("train: {betas: [0.9]}", r"train\.betas: too few items \(got \[0\.9\]\)"),
        ("train: {betas: [0.9, 0.9, 0.9]}", r"train\.betas: should have 2 items"),
        ("data: {filters: []}", r"data\.filters: should be a mapping of keys"),
        ("train: {betas: []}", r"1 problem\n  train\.betas: too few items \(got \[\]\)$"),
        ("stages: [{student: {blocks: sd-tiny}, 1: 2}]", r"keys should be words\n  got: 1"),
        ("train.lr: 1e-4", r"train\.lr: unknown key; in a file, keys are nested: train: \{lr: …\} \(got 0\.0001\)"),
        (
            "stages: [{}, {method: {task: 1}}]",
            r"stages\.1\.method\.task: .* did you mean 'stages\.1\.method\.loss\.task'\?",
        ),
        ("train: {batchh: 1}", r"train\.batchh: unknown key; did you mean 'train\.batch'\?"),
        ("max_steps: 3", r"max_steps: unknown key; did you mean 'train\.max_steps'\? \(got 3\)"),
        ("method: {sites: layer}", r"method: unknown key; did you mean 'stages\.0\.method'\?"),
        ("stages: [{zzz: 1}]", r"stages\.0\.zzz: unknown key; known here: student, method, lora, train \(got 1\)"),
        ("train: {ema: 2}", r"train\.ema: should lie between 0 and 1 \(got 2\)"),
        ("train: {max_steps: 0}", r"train\.max_steps: should lie between 1 and"),
        ("train: {batch: 10, grad_accum: 3}", r"train\.batch: 10 images cannot be split into 3 passes"),
        ("train: {lr_schedule: exponential}", r"should be 'constant', 'cosine' or 'linear' \(got 'exponential'\)"),
        ("train: {mixed_precision: fp8}", r"should be 'no', 'fp16' or 'bf16'"),
        ("stages: [{student: {blocks: sd-smal}}]", r"unknown preset 'sd-smal'; did you mean 'sd-small'\?"),
        ('data: {shards: "???"}', r"data\.shards: this recipe needs a value; add data\.shards=… to the command"),
        ("stages: []", r"stages: should have one stage or more"),
        ("stages: [{}, {student: {path: x}}]", r"stages\.1\.student\.path: a later stage goes on with the student of"),
        ("", r"is empty"),
        ("- a list", r"should be a mapping of keys"),
        ("train: {lr: [", r"not readable as YAML"),
        ("teacher: !!python/object/apply:os.system ['true']", r"not readable as YAML"),
    ],
)
def test_each_problem_says_what_is_allowed(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_scientific_notation_is_a_number(tmp_path):
    assert load_recipe(write(tmp_path, "train: {lr: 1e-4}")).train.lr == 1e-4
    assert load_recipe(write(tmp_path, "seed: 0"), ["train.lr=5e-5"]).train.lr == 5e-5


def test_no_is_a_word(tmp_path):
    assert load_recipe(write(tmp_path, "train: {mixed_precision: no}")).train.mixed_precision == "no"


def test_overrides_reach_into_stages(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "stages: [{student: {blocks: sd-small}}]"), ["stages.0.student.blocks=sd-tiny"]
    )
    assert recipe.stages[0].student.blocks == "sd-tiny"


@pytest.mark.parametrize("shards", ["*.tar", "{00000..00003}.tar", "[x", "laion/{00..09}.tar", "no", "2024-01-01"])
def test_overrides_take_shell_patterns_as_they_stand(shards):
    assert load_recipe("shapes/sd-small", [f"data.shards={shards}"]).data.shards == shards


def test_recipes_in_other_encodings_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("# é".encode("latin-1"))
    with pytest.raises(RecipeError, match="not readable as YAML"):
        load_recipe(str(path))


@pytest.mark.parametrize("revision", ["12e4567", "main", "true"])
def test_a_dumped_recipe_loads_equal(tmp_path, revision):
    recipe = load_recipe("shapes/sd-small", ["train.lr=3e-4", f"teacher.revision='{revision}'"])
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown recipe 'shapes/sd-smal'; did you mean 'shapes/sd-small'\?"):
        find_recipe("shapes/sd-smal")
    with pytest.raises(RecipeError, match="no such recipe file"):
        find_recipe("nowhere.yaml")


def test_cadences_do_not_affect_results():
    keys = result_keys(Recipe())
    assert "train.lr" in keys and "seed" in keys and "stages.0.method.loss.task" in keys
    assert not {"train.log_every", "train.grad_accum", "train.checkpoint_every", "data.cache_dir"} & keys.keys()


def test_defaults_are_valid():
    assert parse_recipe({}, source="test") == Recipe()


def test_a_key_that_comes_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("train:\n  lr: 1e-4\ntrain:\n  batch: 8\n")
    with pytest.raises(RecipeError, match=r"(?s)the key 'train' comes twice.*line 3"):
        load_recipe(str(path))
