"""Download the images and captions of a LAION-like list, as shards that bkd reads.

    python tools/download_laion.py --url-list improved_aesthetics_6.5plus.parquet -o laion

The list is a parquet file, or a folder of them, with a column of addresses and one of captions. img2dataset does the
work, in an environment of its own that is made on the first run, because it needs another webdataset than bkd. Images
are scaled down to --image-size on their shorter side, never up, without borders and without a change of shape. Scores
that filters ask for (aesthetic, pwatermark, punsafe, similarity, language, ...) are kept where the list has them. Sites
that forbid use for AI by the header X-Robots-Tag are respected.

A part of the addresses of an old list is always dead. Finished shards are left alone: the same command again continues
an interrupted download, and downloads a shard again whose tar was removed. Options with img2dataset's names mean what
they mean there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIREMENTS = ("img2dataset==1.47.0", "standard-imghdr; python_version >= '3.13'")
"""The tested version, and a module that it imports and Python 3.13 has no more."""
URL_COLUMNS = ("URL", "url")
CAPTION_COLUMNS = ("TEXT", "caption", "text")
AESTHETIC_COLUMNS = ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "aesthetics")
KNOWN_COLUMNS = (
    *AESTHETIC_COLUMNS,
    *("similarity", "clip_similarity", "pwatermark", "watermark", "punsafe", "nsfw_score", "hash"),
    *("language", "LANGUAGE", "lang", "WIDTH", "HEIGHT", "NSFW", "LICENSE", "SAMPLE_ID"),
)
"""What lists of LAION's kind say of an image."""
READ_LIST = """
import json, sys, pyarrow.parquet as parquet
files = [parquet.ParquetFile(path) for path in sys.argv[1:]]
print(json.dumps([{"columns": file.schema_arrow.names, "rows": file.metadata.num_rows} for file in files]))
"""
READY_FILE = "bkd_ready.txt"
SETTINGS_FILE = "bkd_download.txt"
"""Lies beside the shards; not .json, for img2dataset takes every .json there for a finished shard."""
REASONS_SHOWN = 6


class Trouble(Exception):
    """Something that the user can mend: what is wrong, what was found, what to do."""

    def __init__(self, what: str, *, got: object = None, remedy: str | None = None) -> None:
        lines = [f"error: {what}"]
        lines += [f"  {label}: {value}" for label, value in (("got", got), ("try", remedy)) if value is not None]
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class UrlList:
    """The files of a list, in img2dataset's order.

    Attributes:
        path: Parquet file, or a folder of them.
        files: Parquet files.
        columns: Names that all files have, in the first one's order.
        rows: Addresses in each file.
    """

    path: Path
    files: tuple[Path, ...]
    columns: tuple[str, ...]
    rows: tuple[int, ...]

    def num_shards(self, per_shard: int) -> int:
        """A shard never spans two files."""
        return sum(-(-rows // per_shard) for rows in self.rows)


@dataclass(frozen=True)
class Columns:
    """The columns of a list that are used."""

    url: str
    caption: str
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Environment:
    """Where img2dataset is installed."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def img2dataset(self) -> str:
        return str(self.folder / "bin" / "img2dataset")


def default_venv() -> Path:
    """In bkd's cache folder."""
    return Path(os.environ.get("BKD_CACHE", "~/.cache/bkd")).expanduser() / "img2dataset-venv"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url-list", type=Path, required=True, help="parquet file, or a folder of them")
    add("-o", "--output", type=Path, required=True, help="folder for the shards")
    add("--url-col", help=f"column of addresses; the first of {', '.join(URL_COLUMNS)} if left out")
    add("--caption-col", help=f"column of captions; the first of {', '.join(CAPTION_COLUMNS)} if left out")
    add("--save-additional-columns", nargs="+", default=[], metavar="COLUMN", help="keep these columns, too")
    add("--image-size", type=positive, default=512, help="pixels of the shorter side, at most (default 512)")
    add("--min-image-size", type=int, help="leave out images with a shorter side below this (default --image-size)")
    add("--encode-quality", type=int, default=95, help="of the JPEG files (default 95)")
    add("--number-sample-per-shard", type=positive, default=10_000, help="addresses of a shard (default 10000)")
    add("--processes-count", type=positive, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--thread-count", type=positive, default=64, help="connections of each process (default 64)")
    add("--timeout", type=positive, default=10, help="seconds to wait for a server (default 10)")
    add("--retries", type=int, default=1, help="of each address (default 1)")
    add("--venv", type=Path, default=default_venv(), help=f"environment for img2dataset (default {default_venv()})")
    add("--python", default=sys.executable, help="interpreter to make that environment with (default: this one)")
    return parser.parse_args()


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"should be 1 or more, not {number}")
    return number


def ready_environment(folder: Path, python: str) -> Environment:
    """The environment, made or completed where it is not ready."""
    folder = folder.expanduser().absolute()
    ready = folder / READY_FILE
    wanted = "\n".join(REQUIREMENTS)
    if ready.is_file() and ready.read_text().strip() == wanted:
        return Environment(folder)
    if folder.is_dir() and any(folder.iterdir()) and not ready.is_file():
        raise Trouble(f"{folder} holds something else", remedy="choose another --venv, or remove that folder")
    print(f"installing {REQUIREMENTS[0]} in {folder} (once) …", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    ready.write_text("not yet\n")
    require(run([python, "-m", "venv", str(folder)]), f"no environment could be made with {python}", "another --python")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    require(run([*pip, *REQUIREMENTS]), f"{REQUIREMENTS[0]} could not be installed", "another --python")
    ready.write_text(wanted + "\n")
    return Environment(folder)


def run(command: Sequence[str]) -> int:
    """Run a command with its output on the screen; returns its exit code."""
    try:
        # albumentations, which img2dataset imports, would otherwise ask the network for a newer version of itself
        return subprocess.run(command, env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}, check=False).returncode
    except OSError as error:
        raise Trouble(f"{command[0]} cannot be run", got=error.strerror) from error


def require(code: int, what: str, remedy: str) -> None:
    """Refuse to go on after a command that has failed."""
    if code:
        raise Trouble(what, got=f"exit code {code}; its own words are above", remedy=remedy)


def read_list(path: Path, environment: Environment) -> UrlList:
    """Columns and rows of the list, read by the environment's pyarrow."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise Trouble(f"{path}: no parquet files", remedy="give --url-list a .parquet file, or a folder of them")
    command = [environment.python, "-c", READ_LIST, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        got = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise Trouble(f"{path}: the list cannot be read as parquet", got=got, remedy="download the list again")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    columns = [name for name in found[0]["columns"] if all(name in file["columns"] for file in found)]
    return UrlList(path, tuple(files), tuple(columns), tuple(file["rows"] for file in found))


def choose_columns(listed: UrlList, url: str | None, caption: str | None, more: Sequence[str]) -> Columns:
    """The columns to use; those that are asked for must be there."""
    chosen = Columns(
        url=_column(listed, "addresses", "--url-col", url, URL_COLUMNS),
        caption=_column(listed, "captions", "--caption-col", caption, CAPTION_COLUMNS),
        kept=tuple(name for name in listed.columns if name in KNOWN_COLUMNS or name in more),
    )
    if missing := [name for name in more if name not in listed.columns]:
        raise Trouble(f"{listed.path}: no column '{missing[0]}'", got=", ".join(listed.columns), remedy="one of those")
    return chosen


def _column(listed: UrlList, kind: str, option: str, wanted: str | None, usual: Sequence[str]) -> str:
    for name in (wanted,) if wanted else usual:
        if name in listed.columns:
            return name
    what = f"no column '{wanted}'" if wanted else f"no column with {kind} ({' or '.join(usual)})"
    got = ", ".join(listed.columns) or "no columns that all files have"
    raise Trouble(f"{listed.path}: {what}", got=got, remedy=f"{option} with one of those")


def settings_of(listed: UrlList, columns: Columns, options: argparse.Namespace) -> dict[str, Any]:
    """What the shards depend on: none of it may change while a download continues."""
    return {
        "url_list": [[file.name, file.stat().st_size] for file in listed.files],
        "url_col": columns.url,
        "caption_col": columns.caption,
        "save_additional_columns": list(columns.kept),
        "image_size": options.image_size,
        "min_image_size": options.image_size if options.min_image_size is None else options.min_image_size,
        "encode_quality": options.encode_quality,
        "number_sample_per_shard": options.number_sample_per_shard,
    }


def begin(output: Path, settings: dict[str, Any]) -> None:
    """Begin a download, or continue one of the same settings."""
    record = output / SETTINGS_FILE
    if record.is_file():
        there = json.loads(record.read_text())
        if differing := [name for name in settings if settings[name] != there.get(name)]:
            got = "; ".join(f"{name} was {there.get(name)} and is {settings[name]}" for name in differing)
            raise Trouble(f"{output} holds another download", got=got, remedy="choose another -o, or the same options")
        return
    if output.is_dir() and (held := sorted(path.name for path in output.iterdir())):
        raise Trouble(f"{output} holds something else", got=", ".join(held[:4]), remedy="choose another -o")
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=1) + "\n")


def download_command(environment: Environment, settings: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """img2dataset with all its arguments."""
    own = {name: value for name, value in settings.items() if name not in ("url_list", "save_additional_columns")}
    values: dict[str, Any] = {
        "url_list": options.url_list.absolute(),
        "input_format": "parquet",
        "output_folder": options.output.absolute(),
        "output_format": "webdataset",
        **own,
        "resize_mode": "keep_ratio",  # the default, border, would add white borders
        "resize_only_if_bigger": True,
        "compute_hash": "sha256",
        "processes_count": options.processes_count,
        "thread_count": options.thread_count,
        "timeout": options.timeout,
        "retries": options.retries,
        "max_shard_retry": 1,
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }
    if kept := settings["save_additional_columns"]:
        values["save_additional_columns"] = json.dumps(kept)
    return [environment.img2dataset, *(f"--{name}={value}" for name, value in values.items())]


def finished(output: Path, num_shards: int) -> dict[int, dict[str, Any]]:
    """What img2dataset says of each finished shard, by number."""
    found = {}
    for number in range(num_shards):
        stats = output / f"{number:05d}_stats.json"
        if stats.is_file():
            found[number] = json.loads(stats.read_text())
    return found


def forget_removed(output: Path) -> None:
    """Let a shard be downloaded again whose tar was removed: img2dataset only looks for the stats."""
    for stats in output.glob("*_stats.json"):
        if not stats.with_name(stats.name.replace("_stats.json", ".tar")).is_file():
            stats.unlink()


def download(environment: Environment, listed: UrlList, columns: Columns, options: argparse.Namespace) -> None:
    """Download what has not been downloaded yet, and say what came of it."""
    settings = settings_of(listed, columns, options)
    num_shards = listed.num_shards(options.number_sample_per_shard)
    if not num_shards:
        raise Trouble(f"{listed.path}: the list has no rows", remedy="download the list again")
    begin(options.output, settings)
    forget_removed(options.output)
    if len(finished(options.output, num_shards)) == num_shards:
        print("all shards are there")
    else:
        command = download_command(environment, settings, options)
        print(shlex.join(command), flush=True)
        require(run(command), "img2dataset failed", "the same command again: it continues")
    # img2dataset ends with 0 even when it is interrupted, or a shard fails.
    stats = finished(options.output, num_shards)
    report(stats)
    if missing := [f"{number:05d}" for number in range(num_shards) if number not in stats]:
        got = f"{len(stats)} of {num_shards} shards; {', '.join(missing[:5])} missing"
        raise Trouble("the download is not complete", got=got, remedy="the same command again: it continues")
    if not any(shard["successes"] for shard in stats.values()):
        raise Trouble("not one image arrived", remedy="look at the reasons above; a finished download is not repeated")


def report(stats: dict[int, dict[str, Any]]) -> None:
    """Print how many images arrived, and why the others did not."""
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for shard in stats.values():
        totals.update({name: shard[name] for name in ("count", "successes", "failed_to_download", "failed_to_resize")})
        reasons.update(shard["status_dict"])
    print(f"{totals['successes']:,} images of {totals['count']:,} addresses; finished shards: {len(stats):,}")
    print(f"not downloaded: {totals['failed_to_download']:,}; not usable: {totals['failed_to_resize']:,}")
    failures = [(reason, count) for reason, count in reasons.most_common() if reason != "success"]
    for reason, count in failures[:REASONS_SHOWN]:
        print(f"  {count:,} {' '.join(reason.split())[:100]}")
    if others := failures[REASONS_SHOWN:]:
        print(f"  {sum(count for _, count in others):,} for other reasons")


def print_next_steps(output: Path, columns: Columns) -> None:
    """The commands that come next."""
    shards, filtered = shlex.quote(str(output)), shlex.quote(f"{output}-filtered")
    wishes = [("pwatermark", "pwatermark < 0.8, missing keep"), ("punsafe", "punsafe < 0.5, missing keep")]
    where = [text for name, text in wishes if name in columns.kept]
    if any(name in AESTHETIC_COLUMNS for name in columns.kept):
        where.insert(0, "aesthetic >= 6.5, missing drop")
    else:
        print("note: the list has no aesthetic scores; `bkd data filter --score-with` computes them")
    print("next:")
    print(f"  bkd data check {shards}")
    if where:
        filters = " ".join(f"--where {shlex.quote(text)}" for text in where)
        print(f"  bkd data filter {shards} -o {filtered} {filters}")
    print(f"  bkd train sd15/bk-small data.shards={filtered if where else shards}")


def main() -> int:
    """Download, as the command line says."""
    options = arguments()
    try:
        environment = ready_environment(options.venv, options.python)
        listed = read_list(options.url_list, environment)
        columns = choose_columns(listed, options.url_col, options.caption_col, options.save_additional_columns)
        print(f"addresses: {columns.url}; captions: {columns.caption}; kept: {', '.join(columns.kept) or 'nothing'}")
        download(environment, listed, columns, options)
        print_next_steps(options.output, columns)
    except Trouble as trouble:
        print(trouble, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command again continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
