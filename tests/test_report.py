"""The page of `bkd report`: what it shows, what it says of what is missing, and that nothing it shows can run."""

import base64
import hashlib
import html
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bkd.errors import BkdError, DataError, OutputError
from bkd.eval.sheet import TEXT_KEY, Sheet, read_picture, read_sheet
from bkd.eval.shown import NONE
from bkd.eval.tables import half_width, interval
from bkd.report.curves import MAX_DRAWN, Series, asked, chart, chart_svg
from bkd.report.embedded import BUDGET, Embedded
from bkd.report.gallery import sample_shots
from bkd.report.page import write_report
from bkd.report.scale import Scale
from bkd.surgery.diagram import CLASSES
from bkd.surgery.plan import PLAN_FILE
from tests.report_runs import HOSTILE, PROMPTS, add_evaluation, add_picture, add_speed, make_run, pattern


class Parsed(HTMLParser):
    """Elements, and the text of those that run or hold data."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.blocks, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = (tag, dict(attributes)) if tag in ("script", "style") else None

    def handle_data(self, text):
        if self._inside:
            self.blocks.append((*self._inside, text))
            self._inside = None

    def block(self, tag, kind=None):
        return [text for name, attributes, text in self.blocks if name == tag and attributes.get("type") == kind]


def page_of(*runs):
    return write_report([run.path for run in runs], runs[0].path.parent / "page.html").read_text()


def words(page):
    """What a reader sees, in one line."""
    return " ".join(html.unescape(re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", " ", page, flags=re.S)).split())


@pytest.fixture
def full(tmp_path):
    """A run with everything that a page can show."""
    run = make_run(tmp_path / "full", stage_00_seconds=12.0)
    for step in (20, 40):
        add_picture(run.samples / f"00-step-{step:08d}.png", seed=step)
    add_picture(run.eval / "shapes.png", models=("teacher", "full untrained", "full"), seed=7)
    add_evaluation(run, ("teacher", "full untrained", "full"))
    add_speed(run, ("teacher", "full"), few="full")
    return run


@pytest.fixture
def hostile(tmp_path):
    """A run whose every word is an attempt to run something."""
    run = make_run(
        tmp_path / HOSTILE.replace("/", ""),
        prompts=(HOSTILE, "\N{LINE SEPARATOR}</style>"),
        teacher=HOSTILE,
        device=HOSTILE,
        command=HOSTILE,
        num_samples=3,
        versions={"torch": HOSTILE, "diffusers": HOSTILE, HOSTILE: HOSTILE},
    )
    for step in (20, 40):
        add_picture(run.samples / f"00-step-{step:08d}.png", (HOSTILE, "b"), (HOSTILE, "student"), seed=step)
    add_picture(run.eval / "shapes.png", (HOSTILE, "b"), tuple(f"{number}{HOSTILE}" for number in range(4)))
    add_evaluation(run, (HOSTILE, "student"), device=HOSTILE)
    add_speed(run, (HOSTILE, "student"))
    lines = run.metrics.read_text().replace("down_blocks.0", HOSTILE.replace('"', '\\"')).replace("task_", HOSTILE[:17])
    run.metrics.write_text(lines)
    return run


def require_harmless(page):
    """Only the page's own two blocks can run or style; nothing is fetched, and no attribute is a handler."""
    found = Parsed(page)
    own = [found.block("style"), found.block("script")]
    assert [len(blocks) for blocks in own] == [1, 1]
    policies = [a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    for (block,), directive in zip(own, ("style-src", "script-src"), strict=True):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policies[0]
    assert policies[0].startswith("default-src 'none'; img-src data:;") and "unsafe" not in policies[0]
    for tag, attributes in found.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert attributes.get("src", "data:").startswith("data:image/webp;base64,") or "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    assert "http://" not in page and "https://" not in page
    for text in found.block("script", "application/json"):
        assert not set("<>&") & set(text)
        json.loads(text)


def test_nothing_that_a_run_says_can_run(hostile, full):
    for page in (page_of(hostile), page_of(hostile, full)):
        require_harmless(page)
        assert "<script>window" not in page and "<img src=x" not in page
        assert words(page).count(HOSTILE) > 10


def test_a_run_is_shown_with_all_its_parts(full):
    page = page_of(full)
    seen, found = words(page), Parsed(page)
    require_harmless(page)
    for said in (
        "UNet parameters \N{MINUS SIGN}59.4% 5.52 M → 2.25 M",
        "UNet calls an image 40 20 \N{MULTIPLICATION SIGN} 2; teacher: 40 (20 \N{MULTIPLICATION SIGN} 2)",
        "Correct, unseen captions 95.0% teacher: 100.0%",
        "full untrained",
        "90.0% to 100.0%",
        "Skipped: shapes-FID: 40 images are too few.",
        "removed: down.0.1, up.3.1",
        "Feature loss at each of 2 sites",
        "Seconds: unet, batch 1",
        "0.1 s (2.00 \N{MULTIPLICATION SIGN})",
        "Peak memory: unet, batch 1",
        "0.75 GiB",
        "bkd train RECIPE",
        "b" * 64,
        "f" * 64,
        "torch 2.15.0",
        "2 rounds in turns; pipeline: 20 steps, guidance 3; full: 4 steps, guidance 3; "
        "peak memory: of the process, libraries included",
        *PROMPTS,
    ):
        assert said in seen, said
    assert "missing" not in {attributes.get("class") for _, attributes in found.elements}
    ranges = [attributes for tag, attributes in found.elements if tag == "input"]
    assert [(a["type"], a["max"]) for a in ranges] == [("range", "1")] and "training steps" in ranges[0]["aria-label"]
    assert all(attributes["alt"] for tag, attributes in found.elements if tag == "img")
    titles = re.findall(r'<figure class="chart">\s*<figcaption><strong>(.*?)<', page)
    assert titles == ["total", "task_loss", "grad_norm", "lr", "down_blocks.0", "up_blocks.1"]


def test_identical_pictures_are_in_the_page_once(full):
    page = page_of(full)
    sources = re.findall(r"data:image/webp;base64,[\w+/=]+", page)
    assert len(sources) == len(set(sources))
    # Two prompts: the teacher's of both suites are the same; two students of samples, and two models of the evaluation.
    assert len(sources) == 2 * (1 + 2 + 2)


def test_a_missing_part_says_what_makes_it(tmp_path):
    run = make_run(tmp_path / "my run", status="interrupted")
    run.metrics.unlink()
    seen = words(page_of(run))
    for said in (
        "not finished",
        "samples.prompts",
        f"bkd eval '{run.path}'",
        f"bkd bench speed '{run.path}' -o '{run.speed_file.parent}'",
        "No step logged yet. To go on: bkd train RECIPE",
        "No student yet: this is what the recipe plans.",
        "UNet parameters \N{MINUS SIGN}59.4%",
    ):
        assert said in seen, said


def test_a_student_is_shown_where_its_teacher_is_gone(tmp_path):
    run = make_run(tmp_path / "run")
    run.recipe_file.write_text(run.recipe_file.read_text().replace("id: shapes", "id: runs/gone/student"))
    seen = words(page_of(run))
    assert "its configuration is not at hand" in seen and "runs/gone/student" in seen
    assert "UNet parameters 2.25 M teacher unknown" in seen


def test_runs_are_compared(full, tmp_path):
    other = make_run(tmp_path / "other")
    add_picture(other.samples / "00-final.png", seed=3)
    add_picture(other.eval / "shapes.png", models=("teacher", "other"), seed=9)
    add_evaluation(other, ("teacher", "other"), correct=(40, 20))
    add_speed(other, ("teacher", "other"))
    page = page_of(full, other)
    seen = words(page)
    require_harmless(page)
    head = page[: page.index('<details class="run">')]
    assert head.count("<article") == 1 and words(head).count("Seconds: unet, batch 1") == 1
    rows = re.findall(r'<th scope="row">(.*?)</th>', head)
    assert rows[:3] == ["teacher", "full", "other"]
    assert rows[3:7] == ["teacher", "full untrained", "full", "other"]  # one table, the teacher once
    strip = head[head.index("Last model of each run") : head.index('id="metrics"')]
    assert re.findall(r'class="model">(.*?)<', strip) == ["teacher", "full", "other"] * 2
    assert head.count("</i>full</span>") == head.count("</i>other</span>") == 4
    assert page.count('<details class="run">') == 2 and "2 runs compared" in seen


def test_runs_that_share_nothing_are_shown_all_the_same(full, tmp_path):
    other = make_run(tmp_path / "other", prompts=("another",))
    add_picture(other.eval / "shapes.png", ("another",), seed=9)
    seen = words(page_of(full, other))
    assert "No prompts that all runs share" in seen and "other: not measured. To measure: bkd eval" in seen
    assert "None" not in seen


def test_another_place_in_the_list_is_another_noise(tmp_path):
    runs = []
    for name, prompts in (("a", ("one", "two")), ("b", ("other", "two", "one"))):
        run = make_run(tmp_path / name, prompts=prompts)
        add_picture(run.samples / "00-final.png", prompts)
        runs.append(run)
    page = page_of(*runs)
    strip = page[page.index("Last model of each run") : page.index('id="metrics"')]
    assert re.findall(r"</div>\s*<figcaption>(.*?)<", strip) == ["two"]


def test_figures_against_another_teacher_are_a_table_of_their_own(full, tmp_path):
    other = make_run(tmp_path / "other")
    add_evaluation(other, ("teacher", "other"), digests=("another", "other"))
    page = page_of(full, other)
    assert page[: page.index('<details class="run">')].count("<article") == 2


def test_students_of_one_name_are_told_apart(full, tmp_path):
    other = make_run(tmp_path / "other")
    add_evaluation(other, ("teacher", "full"), digests=("teacher", "other weights"), correct=(40, 20))
    add_speed(other, ("teacher", "full"), digests=("teacher", "other weights"))
    head = page_of(full, other)
    head = head[: head.index('<details class="run">')]
    rows = re.findall(r'<th scope="row">(.*?)</th>', head)
    assert rows[3:7] == ["teacher", "full untrained", "full", "full of other"]
    assert "full of other 0.1 s" in words(head)


@pytest.mark.parametrize("other", [{"device": "NVIDIA H200"}, {"dtype": "float16"}])
def test_figures_of_other_devices_or_dtypes_are_tables_of_their_own(full, tmp_path, other):
    run = make_run(tmp_path / "other")
    add_evaluation(run, ("teacher", "other"), **other)
    page = page_of(full, run)
    head = page[: page.index('<details class="run">')]
    assert head.count("<article") == 2 and words(head).count(next(iter(other.values()))) == 1
    assert "40 prompts, 20 steps, guidance 3, the same noise" in words(head)


def test_every_teacher_has_its_costs_shown(full, tmp_path):
    runs = [make_run(tmp_path / name, teacher_digest=digest) for name, digest in (("b", "c" * 64), ("c", "c" * 64))]
    page = page_of(full, *runs)
    rows = re.findall(r'<th scope="row">(.*?)</th>', page[: page.index('id="pictures"')])
    assert rows == ["teacher of full", "teacher of b, c", "full", "b", "c"]


def test_several_runs_need_a_page_of_their_own(bkd, full, tmp_path):
    other = make_run(tmp_path / "other")
    code, printed = bkd("report", full.path, other.path)
    assert code == 1 and "-o comparison.html" in printed and "Traceback" not in printed
    assert not list(tmp_path.glob("*/report.html"))
    assert bkd("report", full.path, other.path, "-o", tmp_path / "both.html")[0] == 0
    assert bkd("report", full.path)[0] == 0 and (full.path / "report.html").is_file()


def test_the_page_gives_the_diagram_its_own_colours(full):
    page = page_of(full)
    (style,) = Parsed(page).block("style")
    for name in ("paper", *CLASSES.values()):
        assert f".diagram .{name} {{ fill: " in style and f'class="{name}"' in page
    assert not [colour for colour in CLASSES if colour in style]


def test_a_figure_is_written_with_its_interval():
    found = {"value": 12.345, "low": 11.9, "high": 12.7}
    assert (interval(found), half_width(found)) == ("12.35 (11.9 to 12.7)", "12.35 ± 0.4")
    for write in (interval, half_width):
        assert write({"value": 1.0, "low": None, "high": None}) == "1"
        assert write({"skipped": "no images"}) == NONE


def test_long_logs_are_drawn_in_moments(tmp_path):
    run = make_run(tmp_path / "run")
    line = {"stage": 0, **{f"feature_kd_loss/{site}": 0.5 for site in range(20)}, "total": 0.1, "lr": 1e-4}
    run.metrics.write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in range(1, 8001)))
    page = page_of(run)
    assert len(page) < 1_000_000 and "8,000" in words(page)


def test_a_student_that_encodes_is_not_to_be_measured_by_drawing(tmp_path):
    run = make_run(tmp_path / "encoder", "shapes/encoder", prompts=())
    path = run.student / PLAN_FILE
    few = {"num_inference_steps": 4, "sampler": "deterministic", "direction": "inversion"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "few_steps": few}))
    seen = words(page_of(run))
    assert seen.count("the student encodes images and draws none") == 2 and "bkd eval" not in seen
    assert "None" not in seen


def test_stages_are_one_curve_with_marks(tmp_path):
    run = make_run(tmp_path / "chain", "shapes/halving")
    for stage in range(5):
        add_picture(run.samples / f"{stage:02d}-final.png", seed=stage + 1)
    page = page_of(run)
    assert "Stage 2 of 5: halving 16 to 8 steps" in words(page) and "Nothing was removed." in words(page)
    assert page.count('class="stage"') == 4 * 6  # charts
    (frames,) = (json.loads(text) for text in Parsed(page).block("script", "application/json") if '"tiles"' in text)
    assert [frame["label"].split(", ")[0] for frame in frames] == [f"stage {number} of 5" for number in range(1, 6)]


def test_the_newest_pictures_of_a_stage_are_shown(tmp_path):
    """Of a stage that is trained anew, the last picture of the earlier training is older."""
    run = make_run(tmp_path / "run")
    for age, name in enumerate(["00-step-000200.png", "00-step-000100.png", "00-final.png", "01-final.png", "x.png"]):
        add_picture(run.samples / name)
        os.utime(run.samples / name, (1000 - age, 1000 - age))
    assert [shot.label for shot in sample_shots(run, ["kd"])] == ["step 100", "step 200"]
    os.utime(run.samples / "00-final.png", (1000, 1000))
    assert [shot.label for shot in sample_shots(run, ["kd"])] == ["step 100", "step 200", "the end"]
    assert [shot.label for shot in sample_shots(run, ["kd"], limit=2)] == ["step 100", "the end"]


def test_two_hundred_large_pictures_stay_within_the_budget(many_page):
    assert many_page.stat().st_size < 15_000_000
    assert "200 pictures. 200 of them are WebP files with losses" in words(many_page.read_text())


def test_noise_stays_within_the_budget_too():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
    for count in (20, 400):
        embedded = Embedded(count)
        embedded.add(noise)
        assert len(base64.b64decode(embedded.hidden().popitem()[1].split(",")[1])) <= BUDGET / count
        assert embedded.reduced == 1


@pytest.mark.parametrize("noise", [False, True])
def test_drawings_are_kept_exactly_whatever_their_size(noise):
    sheet = Image.new("RGB", (900, 600), "#eeeeee")
    sheet.paste("#3b6ea5", (100, 100, 400, 300))
    if noise:
        sheet.paste(Image.fromarray(pattern(256, 0, 0).permute(1, 2, 0).numpy()), (500, 300))
    embedded = Embedded(1)
    embedded.add(sheet)
    assert embedded.reduced == noise


def test_small_pictures_are_kept_exactly(tmp_path):
    add_picture(tmp_path / "a.png", seed=5)
    sheet = read_sheet(tmp_path / "a.png")
    assert (sheet.models, sheet.prompts, sheet.side) == (("teacher", "student"), PROMPTS, 32)
    tile = sheet.take(read_picture(tmp_path / "a.png"), 1, 1)
    assert (np.asarray(tile) == pattern(32, 6, 1).permute(1, 2, 0).numpy()).all()
    embedded = Embedded(1)
    (tmp_path / "b.webp").write_bytes(base64.b64decode(embedded.source(embedded.add(tile)).split(",")[1]))
    assert (np.asarray(Image.open(tmp_path / "b.webp")) == np.asarray(tile)).all() and embedded.reduced == 0


@pytest.mark.parametrize("text", ["", "{", '{"side": 32}', "huge", "negative", "bomb"])
def test_a_picture_that_does_not_say_where_its_tiles_lie_is_shown_whole(tmp_path, text):
    numbers = {"huge": (32, 10**6, 59), "negative": (32, 32, -5), "bomb": (10**6, 32, 59)}
    if text in numbers:
        text = json.dumps(vars(Sheet(("a", "b"), ("p",), *numbers[text])))
    info = PngInfo()
    info.add_itxt(TEXT_KEY, text)
    run = make_run(tmp_path / "run")
    run.samples.mkdir()
    Image.new("RGB", (200, 100), "red").save(run.samples / "00-final.png", pnginfo=info)
    assert read_sheet(run.samples / "00-final.png") is None
    assert 'width="200" height="100"' in page_of(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", "run.json cannot be read"),
        ("run.json", "[1]", "run.json cannot be read"),
        ("recipe.yaml", "stages: 3", "recipe.yaml"),
        ("metrics.jsonl", '{"stage": 0}\n', "the log of training steps is damaged"),
        ("metrics.jsonl", '{"stage": 0, "step": 1, "total": "x"}\n', "the log of training steps is damaged"),
        ("metrics.jsonl", 'x\n{"stage": 0, "step": 1}\n{"stage": 0, "step": 2}\n', "is damaged"),
        ("metrics.jsonl", b"\xff\xfe\x00", "the log of training steps is damaged"),
        ("eval/shapes.json", '{"settings": 3}', "this measurement is of another version"),
        ("eval/shapes.json", '{"settings": {', r"of another version(.|\n)*try: .*bkd eval .* --overwrite"),
        ("eval/speed/speed.json", '{"models": []}', "this is no measurement of speed"),
        ("samples/00-final.png", b"\x89PNG", "this picture cannot be read"),
        ("student/bkd_plan.json", "{", "this plan file cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_no_page_written(full, tmp_path, name, content, message):
    path = full.path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BkdError, match=message):
        write_report([full.path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_whole_picture_cut_short_is_named(full, tmp_path):
    picture = full.samples / "00-step-00000040.png"
    picture.write_bytes(picture.read_bytes()[:-900])
    with pytest.raises(DataError, match=picture.name):
        write_report([full.path], tmp_path / "page.html")


def test_a_page_is_not_written_where_it_cannot_be(full, tmp_path):
    with pytest.raises(OutputError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(OutputError, match="named twice"):
        write_report([full.path, full.path / "."], tmp_path / "page.html")
    with pytest.raises(OutputError, match=r"the page is an \.html file"):
        write_report([full.path], full.facts_file)
    with pytest.raises(OutputError, match="the output folder is a file"):
        write_report([full.path], full.facts_file / "page.html")
    assert write_report([full.path], tmp_path) == tmp_path / "report.html"


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / folder / "same") for folder in "ab"]
    seen = words(page_of(*runs))
    assert all(str(run.path) in seen for run in runs)


def test_peaks_survive_and_means_do_not_lag():
    values = [1.0] * 5000
    values[1234] = 100.0
    found = chart("total", [Series("a", 1, tuple(enumerate(values)))], logarithmic=True, end=5000)
    svg = chart_svg(found)
    raw, mean = (re.search(rf'points="([^"]*)" class="{kind}', svg)[1].split() for kind in ("raw", "mean"))
    assert len(raw) <= MAX_DRAWN and min(float(place.split(",")[1]) for place in raw) == 12.0
    assert len(mean) <= MAX_DRAWN
    (curve,) = asked(found)
    assert curve["points"][0][1:] == [0, "1", "1"] and curve["points"][-1][1] == 4999


def test_what_cannot_be_drawn_is_left_out():
    nan = Series("a", 1, ((1, float("nan")), (2, 0.0), (3, -1.0)), noisy=False)
    assert chart("total", [nan], logarithmic=True, end=3) is None
    assert chart("lr", [nan], logarithmic=False, end=3).last == "-1"


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"),
    [(0, 1, False), (3e-7, 2e-6, False), (0.5, 0.9, True), (1e-4, 30, True), (7, 7, True)],
)
def test_axes_have_a_handful_of_round_ticks(low, high, logarithmic):
    scale = Scale.around([low, high], logarithmic=logarithmic)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 8 and all(0 <= scale.place(tick) <= 1 for tick in ticks)
    assert all(len(f"{tick:.3g}") <= 7 and float(f"{tick:.3g}") == pytest.approx(tick) for tick in ticks)
