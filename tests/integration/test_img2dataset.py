"""From a list of addresses to a student: img2dataset downloads from a bad server, and bkd reads what it left.

Needs PyPI once, for img2dataset's own environment; `BKD_TEST_VENV` names a folder that keeps it. All other traffic
stays on this machine.
"""

import io
import json
import math
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bkd.data.images import open_image
from bkd.data.metadata import ALIASES, LANGUAGE_NAMES
from bkd.data.shapes import scene
from tests.integration.bad_web import ARRIVING, KINDS, NAMES, TIMEOUT, closed_port, half, serving
from tools.download_laion import KNOWN_COLUMNS, Environment, ready_environment

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
PER_SHARD = 100
WRITE_LIST = """
import json, sys, pyarrow, pyarrow.parquet
columns, types = json.load(sys.stdin)
schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in types.items()])
pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), sys.argv[1])
"""
TYPES = {
    "URL": "string",
    "TEXT": "string",
    "WIDTH": "int32",
    "HEIGHT": "int32",
    "similarity": "float64",
    "hash": "int64",
    "punsafe": "float32",
    "pwatermark": "float32",
    "AESTHETIC_SCORE": "float32",
    "LANGUAGE": "string",
}
"""Columns of the list, as LAION's have them."""


# The list.


def address(row, server, nobody):
    name = NAMES[row]
    port = nobody if name == "refused" else server.server_port
    if name == "null":
        return None
    return f"http://127.0.0.1:{port}/{row}{' ' if name == 'spaced' else '-'}{name}"


def caption(row):
    """Mostly words; some empty, null or blank, some beyond ASCII."""
    for every, text in ((29, ""), (31, None), (37, " \n"), (10, f"Größe {row}: ein rotes Quadrat, 赤い四角 🟥")):
        if row % every == every // 4:
            return text
    return scene("train", row).caption


def number(row, column):
    """A score: with nulls, NaN, zeros, and values exactly at what filters ask for."""
    if row % 13 == len(column) % 13:
        return None
    if row % 17 == len(column) % 17:
        return math.nan
    draw = random.Random(f"{column} {row}")
    return draw.randrange(45, 71) / 10 if column == "AESTHETIC_SCORE" else draw.randrange(0, 11) / 10


def laion_row(row, url):
    scores = {name: number(row, name) for name in ("similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")}
    language = (None, "en", "de", "fr")[row % 4]
    return {
        **{"URL": url, "TEXT": caption(row), "WIDTH": 512, "HEIGHT": 512, "hash": -(2**62) + row},
        **{"LANGUAGE": language, **scores},
    }


def write_list(environment, path, rows, types=TYPES):
    columns = {name: [row[name] for row in rows] for name in types}
    command = [environment.python, "-c", WRITE_LIST, str(path)]
    subprocess.run(command, input=json.dumps([columns, types]), text=True, check=True)


# The download.


@dataclass(frozen=True)
class Download:
    """What img2dataset has made.

    Attributes:
        environment: Of img2dataset.
        shards: Folder.
        listed: The list.
        rows: Of the list.
        printed: By the tool.
    """

    environment: Environment
    shards: Path
    listed: Path
    rows: list[dict]
    printed: str


def download(environment, listed, folder, *more):
    """Run the tool in a process of its own."""
    quick = f"--image-size 64 --min-image-size 32 --number-sample-per-shard {PER_SHARD} --timeout {TIMEOUT}".split()
    command = [sys.executable, str(ROOT / "tools/download_laion.py"), "--url-list", str(listed), "-o", str(folder)]
    command += [*quick, "--processes-count", "2", "--venv", str(environment.folder), *more]
    return subprocess.run(command, env=without_proxy(), capture_output=True, text=True, check=False)


def without_proxy():
    """This environment, with nothing between a client and this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, "NO_ALBUMENTATIONS_UPDATE": "1"}


@pytest.fixture(scope="module")
def environment(request, tmp_path_factory):
    """img2dataset's environment: kept in `BKD_TEST_VENV`, or in pytest's cache."""
    if folder := os.environ.get("BKD_TEST_VENV"):
        return ready_environment(Path(folder), sys.executable)
    kept = getattr(request.config, "cache", None)
    root = kept.mkdir("img2dataset") if kept else tmp_path_factory.mktemp("img2dataset")
    return ready_environment(root / "venv", sys.executable)


@pytest.fixture(scope="module")
def downloaded(environment, tmp_path_factory):
    """300 addresses of all kinds, downloaded into three shards; the server stays until the module ends."""
    folder = tmp_path_factory.mktemp("laion")
    replies = {f"/{row}-{name}": KINDS[name].reply(row) for row, name in enumerate(NAMES)}
    with serving({**replies, "/twin.jpg": KINDS["twin"].reply(0)}) as server:
        nobody = closed_port()
        rows = [laion_row(row, address(row, server, nobody)) for row in range(len(NAMES))]
        write_list(environment, folder / "list.parquet", rows)
        done = download(environment, folder / "list.parquet", folder / "shards")
        assert done.returncode == 0, done.stdout + done.stderr
        yield Download(environment, folder / "shards", folder / "list.parquet", rows, done.stdout)


# What the shards hold, read without bkd.


def members(folder):
    """Row of the list -> extension -> bytes, of all shards of a folder."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(int(key), {})[extension] = tar.extractfile(member).read()
    return found


def stats_of(folder, name):
    return [json.loads(path.read_text())[name] for path in sorted(folder.glob("*_stats.json"))]


def captioned(found):
    """Rows whose caption has words."""
    return {row for row, sample in found.items() if sample["txt"].decode().strip()}


def is_missing(value):
    return value is None or (isinstance(value, float) and math.isnan(value))


def at_least(limit):
    return lambda value: np.float32(value) >= np.float32(limit)


def below(limit):
    return lambda value: np.float32(value) < np.float32(limit)


WISHES = (
    ("aesthetic >= 5.5, missing drop", "AESTHETIC_SCORE", at_least(5.5), False),
    ("pwatermark < 0.8, missing keep", "pwatermark", below(0.8), True),
    ("punsafe < 0.9, missing keep", "punsafe", below(0.9), True),
    ("similarity >= 0.1, missing drop", "similarity", at_least(0.1), False),
    ("language = en|de, missing keep", "LANGUAGE", lambda value: value in ("en", "de"), True),
    ("original_size >= 500", "original_size", at_least(500), False),
)
"""A filter, the column it asks for, what must hold, and whether samples without a value are kept."""
WHERE = [argument for wish in WISHES for argument in ("--where", wish[0])]


def wanted(rows, found):
    """Rows that pass all filters: by the list, but for the sizes, which only the download knows."""
    kept = captioned(found)
    for _, column, holds, keep_missing in WISHES:
        values = {row: rows[row].get(column) for row in kept}
        if column == "original_size":
            facts = {row: json.loads(found[row]["json"]) for row in kept}
            values = {row: min(facts[row]["original_width"], facts[row]["original_height"]) for row in kept}
        kept = {row for row, value in values.items() if (keep_missing if is_missing(value) else holds(value))}
    return kept


# What arrives.


def test_exactly_the_good_addresses_arrive(downloaded):
    found = members(downloaded.shards)
    assert found.keys() == ARRIVING
    assert all(sample.keys() == {"jpg", "json", "txt"} for sample in found.values())
    assert stats_of(downloaded.shards, "count") == [PER_SHARD] * 3
    by_shard = Counter(row // PER_SHARD for row in ARRIVING)
    assert stats_of(downloaded.shards, "successes") == [by_shard[shard] for shard in range(3)]
    for status in ("failed_to_download", "failed_to_resize"):
        expected = sum(kind.count for kind in KINDS.values() if kind.status == status)
        assert sum(stats_of(downloaded.shards, status)) == expected


def test_every_failure_has_its_reason(downloaded):
    reasons = sum(map(Counter, stats_of(downloaded.shards, "status_dict")), Counter())
    for name, kind in KINDS.items():
        if kind.reason:
            same = sum(other.count for other in KINDS.values() if other.reason == kind.reason)
            assert sum(n for text, n in reasons.items() if kind.reason in text) == same, (name, reasons)


def test_the_tool_says_what_came_of_it_and_what_to_do_next(downloaded):
    assert f"{len(ARRIVING)} images of {len(NAMES)} addresses; finished shards: 3" in downloaded.printed
    assert "12 HTTP Error 404" in downloaded.printed
    assert f"bkd data check {downloaded.shards}" in downloaded.printed
    assert "--where 'aesthetic >= 6.5, missing drop'" in downloaded.printed


def test_pictures_arrive_as_they_look(downloaded):
    for row, sample in members(downloaded.shards).items():
        kind = KINDS[NAMES[row]]
        image = open_image(sample["jpg"])
        assert min(image.size) == 64 and json.loads(sample["json"])["width"] == image.width
        if kind.expected is not None:
            expected = kind.expected(row).convert("RGB").resize(image.size, Image.Resampling.BOX)
            difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).mean()
            assert difference < 6, (row, NAMES[row], difference)


def test_metadata_is_that_of_the_list(downloaded):
    for row, sample in members(downloaded.shards).items():
        facts = json.loads(sample["json"])
        for column in (name for name in TYPES if name not in ("URL", "TEXT")):
            value = downloaded.rows[row][column]
            if is_missing(value):
                assert is_missing(facts[column])
            else:
                assert facts[column] == (np.float32(value) if TYPES[column] == "float32" else value)
        assert facts["caption"] == downloaded.rows[row]["TEXT"] and facts["url"] == downloaded.rows[row]["URL"]
        assert sample["txt"].decode() == (facts["caption"] or "")
        if NAMES[row] == "turned":
            assert "Image Orientation" in json.loads(facts["exif"])


def test_the_tool_keeps_every_column_that_filters_know():
    written = {"width", "height", "original_width", "original_height"}  # by img2dataset itself
    names = {name for names in (*ALIASES.values(), LANGUAGE_NAMES) for name in names}
    assert names - written <= set(KNOWN_COLUMNS)


# What bkd makes of it.


def check(bkd, *arguments):
    code, printed = bkd("data", "check", *arguments, "--json")
    assert code == 0, printed
    return json.loads(printed)


def test_check_counts_what_is_there(bkd, downloaded):
    found = members(downloaded.shards)
    report = check(bkd, downloaded.shards)
    assert report["num_shards"] == 3 and report["num_samples"] == len(ARRIVING)
    assert report["members"] == {name: len(ARRIVING) for name in ("jpg", "json", "txt")} and not report["foreign"]
    assert report["kept"] == len(captioned(found))
    assert report["reasons"] == {"caption empty or not UTF-8": len(found) - len(captioned(found))}
    assert report["num_duplicates"] == len(found) - len({sample["jpg"] for sample in found.values()}) >= 7
    assert report["num_repeated_keys"] == 0 and not report["problems"]
    assert report["decoded"] == {"looked at": 200}
    for name, column in {"aesthetic": "AESTHETIC_SCORE", "pwatermark": "pwatermark"}.items():
        there = [value for row in found if not is_missing(value := downloaded.rows[row][column])]
        assert report["coverage"][name] == len(there)
        lowest, *_, highest = report["quantiles"][name]
        assert (lowest, highest) == pytest.approx((min(there), max(there)))


def test_check_names_the_fields_of_the_list(bkd, downloaded):
    code, printed = bkd("data", "check", downloaded.shards)
    assert code == 0 and "3 shards, " in printed and f" {len(ARRIVING)} samples" in printed
    fields = printed.partition("fields of KEY.json:")[2]
    assert all(name in fields for name in ("AESTHETIC_SCORE", "LANGUAGE", "original_width", "sha256"))


def test_check_says_what_a_recipes_filters_would_keep(bkd, downloaded, tmp_path):
    filters = {text.split()[0]: text.partition(" ")[2] for text, *_ in WISHES}
    recipe = tmp_path / "filtered.yaml"
    shipped = (ROOT / "recipes/shapes/sd-small.yaml").read_text()
    data = f'data:    {{shards: "???", resolution: 32, filters: {json.dumps(filters)}}}'
    recipe.write_text(shipped.replace("data:    {shards: shapes, resolution: 32}", data))
    kept = len(wanted(downloaded.rows, members(downloaded.shards)))
    report = check(bkd, downloaded.shards, "--recipe", recipe)
    assert report["kept"] == kept and report["kept"] + sum(report["reasons"].values()) == len(ARRIVING)
    code, printed = bkd("data", "check", downloaded.shards, "--recipe", recipe)
    assert code == 0 and row_of(printed, "training would use") == kept


def test_check_notices_the_white_borders_of_img2datasets_default(bkd, downloaded, tmp_path):
    arguments = {"url_list": downloaded.listed, "input_format": "parquet", "output_format": "webdataset"}
    arguments |= {"url_col": "URL", "caption_col": "TEXT", "image_size": 64, "output_folder": tmp_path / "bordered"}
    arguments |= {"timeout": TIMEOUT, "thread_count": 64}
    command = [downloaded.environment.img2dataset, *(f"--{name}={value}" for name, value in arguments.items())]
    subprocess.run(command, env=without_proxy(), capture_output=True, check=True)
    assert any("have white borders" in note for note in check(bkd, tmp_path / "bordered")["notes"])
    assert not any("have white borders" in note for note in check(bkd, downloaded.shards)["notes"])


def row_of(printed, name):
    """The number in a row of a printed table."""
    line = next(line for line in printed.splitlines() if name in line)
    return int(line.partition(name)[2].strip(" │┃").split()[0].replace(",", ""))


def test_check_compares_shards_with_their_stats(bkd, downloaded, tmp_path):
    lost = without_samples(downloaded.shards, tmp_path, 3)
    report = check(bkd, tmp_path)
    there = stats_of(downloaded.shards, "successes")[0]
    assert f"00000.tar: {there - lost} samples, though 00000_stats.json says {there}" in " ".join(report["notes"])


def without_samples(shards, folder, count):
    """The first shard without its last samples, beside the stats of the whole one."""
    found = {row: sample for row, sample in members(shards).items() if row < PER_SHARD}
    write_tar(folder / "00000.tar", dict(list(found.items())[:-count]))
    (folder / "00000_stats.json").write_bytes((shards / "00000_stats.json").read_bytes())
    return count


def write_tar(path, samples):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, sample in samples.items():
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{row:07d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def filtered(downloaded, tmp_path_factory):
    """Shards with the samples that pass; and what was printed."""
    folder = tmp_path_factory.mktemp("filtered") / "shards"
    done = bkd_process("data", "filter", downloaded.shards, "-o", folder, *WHERE)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def bkd_process(*arguments):
    """A command in a process of its own, in the cache folder that the tests share."""
    command = [sys.executable, "-m", "bkd", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module", autouse=True)
def shared_cache(cache):
    """Set before any command runs."""
    return cache


def test_filters_keep_what_the_list_says(downloaded, filtered):
    folder, printed = filtered
    before, after = members(downloaded.shards), members(folder)
    kept = wanted(downloaded.rows, before)
    assert 20 < len(kept) < 120
    assert after == {row: before[row] for row in kept}
    assert row_of(printed, "kept") == sum(stats_of(folder, "successes")) == len(kept)
    left_out = sum(map(Counter, stats_of(folder, "left_out")), Counter())
    assert left_out.total() == len(before) - len(kept)
    empty = len(before) - len(captioned(before))
    unscored = sum(is_missing(downloaded.rows[row]["AESTHETIC_SCORE"]) for row in captioned(before))
    assert left_out["caption empty or not UTF-8"] == empty and left_out["aesthetic missing"] == unscored
    assert row_of(printed, "aesthetic missing") == unscored


def test_a_filter_that_meets_missing_values_names_the_fields(bkd, downloaded, tmp_path):
    code, printed = bkd("data", "filter", downloaded.shards, "-o", tmp_path / "o", "--where", "aesthetic >= 5.5")
    assert code == 1 and "AESTHETIC_SCORE" in printed and "missing drop" in printed and not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def cached(filtered, tmp_path_factory):
    """The filtered samples, encoded."""
    folder = tmp_path_factory.mktemp("cached") / "latents"
    done = bkd_process("data", "cache", filtered[0], "-o", folder, "--teacher", "shapes", "--resolution", "32")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_every_filtered_sample_is_cached(filtered, cached):
    count = sum(stats_of(filtered[0], "successes"))
    assert sum(stats_of(cached[0], "successes")) == count
    assert f"cached latents: {count} samples in 3 shards, 32 px" in cached[1]


def test_caching_again_does_nothing(bkd, filtered, cached):
    before = {path.name: path.stat().st_mtime_ns for path in cached[0].glob("*.tar")}
    code, printed = bkd("data", "cache", filtered[0], "-o", cached[0], "--teacher", "shapes", "--resolution", "32")
    assert code == 0, printed
    assert {path.name: path.stat().st_mtime_ns for path in cached[0].glob("*.tar")} == before


def test_images_that_break_later_are_counted_and_left_out(bkd, downloaded, tmp_path):
    found = members(downloaded.shards)
    whole = {row: found[row] for row in sorted(captioned(found)) if row < PER_SHARD}
    broken = {row: {**sample, "jpg": half(sample["jpg"])} for row, sample in list(whole.items())[:3]}
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/00000.tar", {**whole, **broken})
    code, printed = bkd(
        "data", "cache", tmp_path / "shards", "-o", tmp_path / "o", "--teacher", "shapes", "--resolution", "32"
    )
    assert code == 0 and row_of(printed, "image cannot be decoded") == 3
    assert stats_of(tmp_path / "o", "successes") == [len(whole) - 3]


def test_a_student_is_trained_from_the_cached_samples(cached, tmp_path):
    few = ["train.max_steps=3", "train.batch=8", "train.warmup_steps=0", "samples.prompts=[]"]
    done = bkd_process("train", "shapes/sd-small", f"data.shards={cached[0]}", *few, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/student/model_index.json").is_file()
    losses = [json.loads(line)["total"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses and all(map(math.isfinite, losses))


# When the download is run again.


def test_a_finished_download_is_left_alone(bkd, downloaded):
    check(bkd, downloaded.shards)  # leaves indexes beside the shards
    before = {path.name: path.stat().st_mtime_ns for path in downloaded.shards.iterdir()}
    done = download(downloaded.environment, downloaded.listed, downloaded.shards)
    assert done.returncode == 0 and "all shards are there" in done.stdout
    assert {path.name: path.stat().st_mtime_ns for path in downloaded.shards.iterdir()} == before


def test_an_interrupted_download_continues(bkd, downloaded):
    """As a killed img2dataset leaves it: a part of a tar, and no stats."""
    before = members(downloaded.shards)
    shard = downloaded.shards / "00001.tar"
    shard.write_bytes(half(shard.read_bytes()))
    (downloaded.shards / "00001_stats.json").unlink()
    code, printed = bkd("data", "check", downloaded.shards)
    assert code == 1 and "00001.tar" in printed and "Traceback" not in printed
    untouched = (downloaded.shards / "00000.tar").stat().st_mtime_ns
    done = download(downloaded.environment, downloaded.listed, downloaded.shards)
    assert done.returncode == 0, done.stdout + done.stderr
    assert members(downloaded.shards) == before
    assert (downloaded.shards / "00000.tar").stat().st_mtime_ns == untouched
    assert check(bkd, downloaded.shards)["num_samples"] == len(ARRIVING)


def test_a_removed_shard_is_downloaded_again(downloaded):
    before = members(downloaded.shards)
    (downloaded.shards / "00002.tar").unlink()
    done = download(downloaded.environment, downloaded.listed, downloaded.shards)
    assert done.returncode == 0, done.stdout + done.stderr
    assert members(downloaded.shards) == before


def test_other_options_are_no_continuation(downloaded):
    done = download(downloaded.environment, downloaded.listed, downloaded.shards, "--encode-quality", "80")
    assert done.returncode == 1 and "holds another download" in done.stderr
    assert "encode_quality was 95 and is 80" in done.stderr


@pytest.mark.parametrize(
    ("columns", "more", "message"),
    [
        ({"link": "string", "TEXT": "string"}, (), "no column with addresses (URL or url)"),
        ({"URL": "string", "alt": "string"}, (), "no column with captions (TEXT or caption or text)"),
        ({"URL": "string", "alt": "string"}, ("--caption-col", "title"), "no column 'title'"),
        ({"URL": "string", "TEXT": "string"}, ("--save-additional-columns", "score"), "no column 'score'"),
        ({"URL": "string", "TEXT": "string"}, (), "the list has no rows"),
    ],
)
def test_lists_that_cannot_be_used_are_named(environment, tmp_path, columns, more, message):
    write_list(environment, tmp_path / "list.parquet", [], columns)
    done = download(environment, tmp_path / "list.parquet", tmp_path / "o", *more)
    assert done.returncode == 1 and message in done.stderr and "try:" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "o").exists()


def test_what_is_no_parquet_is_named(environment, tmp_path):
    (tmp_path / "list.parquet").write_text("URL,TEXT\n")
    done = download(environment, tmp_path / "list.parquet", tmp_path / "o")
    assert done.returncode == 1 and "cannot be read as parquet" in done.stderr
    done = download(environment, tmp_path / "none.parquet", tmp_path / "o")
    assert done.returncode == 1 and "no parquet files" in done.stderr


def test_a_download_without_one_image_is_an_error(environment, tmp_path):
    row = {"url": f"http://127.0.0.1:{closed_port()}/a.jpg", "caption": "a square"}
    write_list(environment, tmp_path / "list.parquet", [row], {"url": "string", "caption": "string"})
    done = download(environment, tmp_path / "list.parquet", tmp_path / "o")
    assert done.returncode == 1 and "not one image arrived" in done.stderr and "Connection refused" in done.stdout
