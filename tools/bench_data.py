"""Speed and memory of the data path, measured side by side on this machine.

    python tools/bench_data.py [--folder FOLDER]

Random numbers of real sizes: latents of SD 1.x at 512 px, JPEGs of 512 px. Every figure that is a rate is the median
of several rounds; memory is the peak of a fresh process. Prints Markdown tables for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from bkd.data.ahead import map_ahead
from bkd.data.images import decode_image
from bkd.data.index import Sample
from bkd.data.indexing import INDEX_SUFFIX, index_shard, index_shards
from bkd.data.latent_folder import open_latents
from bkd.data.latent_set import LatentSet
from bkd.data.latent_shards import MADE_BY, LatentDescription, LatentSettings, SourceShard, to_record
from bkd.data.order import share
from bkd.data.output_set import open_output_set
from bkd.data.shards import NewSample, Record, sample_key, write_shards

ROUNDS = 5
BATCH = 32
WORKERS = 2
CACHED_PER_SHARD = 2_000
RESOLUTION = 512
NUM_JPEGS = 300
LAION_SHARDS, LAION_PER_SHARD = 230, 10_000


def make_cached(folder: Path, num_shards: int) -> None:
    """Cached samples of SD 1.x: (8, 64, 64) float16 and 77 ids; every shard but the first is a link to it."""
    settings = LatentSettings(vae="random", tokenizers=("random",), resolution=RESOLUTION)
    sources = tuple(SourceShard(f"{n:05d}.tar", str(n)) for n in range(num_shards))
    description = LatentDescription(settings, sources)
    output = open_output_set(folder, MADE_BY, num_shards, description.facts())
    output.write(0, _cached_records())
    for number in range(1, num_shards):
        for made in (output.path(0), output.path(0).with_name("00000_stats.json")):
            os.link(made, folder / made.name.replace("00000", f"{number:05d}"))


def _cached_records() -> Iterator[Record]:
    rng = np.random.default_rng(0)
    for row in range(CACHED_PER_SHARD):
        moments = rng.standard_normal((8, 64, 64), np.float32).astype(np.float16)
        ids = rng.integers(0, 49408, 77, np.int32)
        yield to_record(sample_key(0, row), {"moments": moments, "ids": ids}, {"caption": f"picture {row}"})


def read_cached(folder: Path, num_steps: int) -> float:
    """Samples a second that reach a loop which does nothing with them; read ahead as in training."""
    data = LatentSet(open_latents(folder), folder)
    order = data.order(seed=0)
    indices = (order.batch(step, BATCH)[share(BATCH, parts=1, part=0)] for step in range(num_steps))
    started = time.perf_counter()
    for batch in map_ahead(data.gather, indices, workers=1, ahead=4):
        assert batch.moments.shape == (BATCH, 8, 64, 64)
    return num_steps * BATCH / (time.perf_counter() - started)


def peak_of_reading(folder: Path, num_steps: int) -> dict[str, float]:
    """Peak memory and rate of `read_cached` in a fresh process."""
    script = f"import tools.bench_data as b, sys; b.report_reading({str(folder)!r}, {num_steps})"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout))


def report_reading(folder: str, num_steps: int) -> None:
    rate = read_cached(Path(folder), num_steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rate": rate, "peak_mib": peak}))


def make_jpegs(folder: Path) -> list[Sample]:
    """A shard of 512-px JPEGs with the detail of photographs."""
    rng = np.random.default_rng(0)

    def samples() -> Iterator[NewSample]:
        for _ in range(NUM_JPEGS):
            coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
            smooth = np.asarray(coarse.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC), np.int16)
            noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(noisy).save(stream, "JPEG", quality=90)
            yield NewSample(image=stream.getvalue(), extension="jpg", caption="a picture")

    (path,) = write_shards(samples(), folder)
    return list(index_shard(path).samples())


def pil_alone(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def decoding_rates(samples: list[Sample]) -> tuple[float, float]:
    """Images a second by PIL alone, from memory, and by `decode_image`, from the shard; rounds alternate."""
    encoded = [sample.read("jpg") for sample in samples]

    def alone() -> None:
        for _ in map_ahead(pil_alone, encoded, workers=WORKERS, ahead=64):  # kept, they would cost fresh memory
            pass

    def ours() -> None:
        decoded = map_ahead(
            lambda sample: decode_image(sample.read("jpg"), RESOLUTION), samples, workers=WORKERS, ahead=64
        )
        for _ in decoded:
            pass

    times = [(_seconds(alone), _seconds(ours)) for _ in range(ROUNDS)]
    return tuple(len(samples) / statistics.median(column) for column in zip(*times, strict=True))  # type: ignore[return-value]


def _seconds(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def make_laion(folder: Path) -> None:
    """As many samples as BK-SDM's 2.3M set: one shard with LAION's metadata, and links to it."""
    rng = np.random.default_rng(0)

    def samples() -> Iterator[NewSample]:
        for row in range(LAION_PER_SHARD):
            scores = {"AESTHETIC_SCORE": float(rng.uniform(6.25, 8)), "similarity": float(rng.uniform(0.2, 0.4))}
            safety = {"pwatermark": float(rng.uniform(0, 1)), "punsafe": float(rng.uniform(0, 0.1))}
            sizes = {"original_width": int(rng.integers(512, 4000)), "original_height": int(rng.integers(512, 4000))}
            size = {"width": 512, "height": int(rng.integers(512, 1024)), "LANGUAGE": "en", "hash": row}
            image = rng.bytes(int(rng.integers(500, 1500)))
            caption = "a picture of " + "x" * int(rng.integers(5, 120))
            yield NewSample(
                image=image, extension="jpg", caption=caption, metadata={**scores, **safety, **sizes, **size}
            )

    (path,) = write_shards(samples(), folder)
    for number in range(1, LAION_SHARDS):
        os.link(path, folder / f"{number:05d}.tar")


def report_index(folder: str) -> None:
    """Time to read all indexes, and the memory they take, in this process."""
    before = psutil.Process().memory_info().rss / 2**20
    started = time.perf_counter()
    indexes = index_shards(sorted(Path(folder).glob("*.tar")), Path(folder))
    seconds = time.perf_counter() - started
    now = psutil.Process().memory_info().rss / 2**20
    print(json.dumps({"samples": sum(map(len, indexes)), "seconds": seconds, "mib": now - before, "peak_mib": now}))


def index_figures(folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    index_shards(sorted(folder.glob("*.tar")), folder)
    making = time.perf_counter() - started
    disk = sum(path.stat().st_size for path in folder.glob(f"*{INDEX_SUFFIX}")) / 2**20
    script = f"import tools.bench_data as b; b.report_index({str(folder)!r})"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {**json.loads(found.stdout), "disk_mib": disk, "making": making}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the data; a temporary folder when not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        _print_cached(folder)
        _print_decoding(make_jpegs(folder / "jpegs"))
        make_laion(folder / "laion")
        _print_index(index_figures(folder / "laion"))


def _print_cached(folder: Path) -> None:
    print("| cached samples | read | samples/s | peak |\n|---|---|---|---|")
    for num_shards in (2, 8, 32):
        make_cached(folder / f"cached-{num_shards}", num_shards)
        steps = num_shards * CACHED_PER_SHARD // BATCH
        read_cached(folder / f"cached-{num_shards}", steps)  # indexes, and the page cache
        found = [peak_of_reading(folder / f"cached-{num_shards}", steps) for _ in range(ROUNDS)]
        rate, peak = (statistics.median(each[key] for each in found) for key in ("rate", "peak_mib"))
        print(f"| {num_shards * CACHED_PER_SHARD:,} | {steps * BATCH:,} | {rate:,.0f} | {peak:,.0f} MiB |")


def _print_decoding(samples: list[Sample]) -> None:
    alone, ours = decoding_rates(samples)
    print(f"\n| 512-px JPEGs, {WORKERS} threads | images/s | |\n|---|---|---|")
    print(f"| PIL alone, from memory | {alone:,.0f} | 100 % |")
    print(f"| `decode_image`, from a shard | {ours:,.0f} | {ours / alone:.0%} |")


def _print_index(found: dict[str, float]) -> None:
    print("\n| index of | on disk | resident | made in | read in |\n|---|---|---|---|---|")
    print(
        f"| {found['samples']:,.0f} samples | {found['disk_mib']:,.0f} MiB | {found['mib']:,.0f} MiB "
        f"(process {found['peak_mib']:,.0f} MiB) | {found['making']:,.0f} s | {found['seconds']:,.1f} s |"
    )


if __name__ == "__main__":
    main()
