"""Batches are the same on any number of processes, after a kill, and when the shards are far away."""

import hashlib
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from bkd.data.caching import ensure_latents, plan_caching, read_latents
from bkd.data.captions import CaptionSource
from bkd.data.indexing import INDEX_SUFFIX
from bkd.data.latent_folder import find_latents
from bkd.data.latent_set import LatentSet
from bkd.data.order import share
from bkd.data.shapes_shards import shapes_samples
from bkd.data.shards import write_shards
from bkd.data.sources import find_sources, local_copies
from bkd.data.survey import DataWish
from bkd.errors import DataError
from tests.remote_server import TOKEN

NUM_SAMPLES, PER_SHARD, BATCH, WINDOW = 90, 10, 8, 2


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_shards(shapes_samples("train", NUM_SAMPLES), folder, per_shard=PER_SHARD)
    return folder


@pytest.fixture(scope="module")
def data(raw, teacher, teacher_folder, tmp_path_factory):
    wish = DataWish(CaptionSource(), (), tmp_path_factory.mktemp("cache"))
    caching = plan_caching(str(raw), teacher_folder, wish, resolution=32)
    ensure_latents(caching, lambda: teacher)
    return read_latents(caching, window=WINDOW)


def equal(one, other):
    return torch.equal(one.moments, other.moments) and torch.equal(one.captions.token_ids, other.captions.token_ids)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_see_what_one_would(data, world_size, passes):
    order, batch = data.order(seed=5), 32
    for step in (0, 1, 2, 3, 50):
        whole = data.gather(order.batch(step, batch))
        parts = [
            data.gather(
                order.batch(step, batch)[share(batch, parts=passes * world_size, part=part * world_size + rank)]
            )
            for part in range(passes)
            for rank in range(world_size)
        ]
        assert {len(part.moments) for part in parts} == {batch // (passes * world_size)}
        assert torch.equal(torch.cat([part.moments for part in parts]), whole.moments)
        assert torch.equal(torch.cat([part.captions.token_ids for part in parts]), whole.captions.token_ids)


WALK = """
import hashlib, sys
from pathlib import Path
from bkd.data.ahead import map_ahead
from bkd.data.latent_folder import open_latents
from bkd.data.latent_set import LatentSet
folder, log, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
data = LatentSet(open_latents(folder), folder, window=2)
order = data.order(seed=5)
first = len(log.read_text().splitlines()) if log.is_file() else 0
with log.open("a") as out:
    for batch in map_ahead(lambda step: data.gather(order.batch(step, 8)), range(first, last), workers=1, ahead=4):
        out.write(hashlib.sha256(batch.moments.numpy().tobytes()).hexdigest() + "\\n")
        out.flush()
"""


def test_a_kill_at_a_random_step_resumes_to_identical_batches(data, tmp_path):
    last, rng = 4000, random.Random(0)
    order = data.order(seed=5)
    command = [sys.executable, "-c", WALK, data.name, str(tmp_path / "log"), str(last)]
    for _ in range(2):
        stop_at = rng.randrange(50, last // 2)
        with subprocess.Popen(command) as running:
            while running.poll() is None:
                if (tmp_path / "log").is_file() and len((tmp_path / "log").read_bytes()) > stop_at * 65:
                    running.kill()
        lines = (tmp_path / "log").read_text().splitlines(keepends=True)
        (tmp_path / "log").write_text("".join(line for line in lines if line.endswith("\n") and len(line) == 65))
        assert stop_at <= len(lines) < last
    subprocess.run(command, check=True)
    found = (tmp_path / "log").read_text().splitlines()
    assert len(found) == last
    for step in [*range(20), *(rng.randrange(last) for _ in range(300)), last - 1]:
        batch = data.gather(order.batch(step, 8))
        assert found[step] == hashlib.sha256(batch.moments.numpy().tobytes()).hexdigest()


def serve(server, folder, prefix):
    for path in folder.iterdir():
        if not path.name.endswith(INDEX_SUFFIX):
            server.add(f"{prefix}/{path.name}", path.read_bytes())
    return server.url(f"{prefix}/") + TOKEN


def test_latents_far_away_give_the_same_batches_through_a_small_cache(data, server, tmp_path):
    url = serve(server, Path(data.name), "latents")
    for number, fault in ((1, "cut"), (3, 503), (4, "reset")):
        server.faults[f"latents/{number:05d}.tar"] = [fault, "send_all"]
    sizes = [path.stat().st_size for path in Path(data.name).glob("*.tar")]
    bound = 5.2 * max(sizes) / 2**30
    remote = LatentSet(find_latents(url, tmp_path, remote_cache_gib=bound), tmp_path, window=WINDOW)
    assert remote.fingerprint == data.fingerprint and len(remote) == len(data)
    order = remote.order(seed=5)
    for step in range(3 * NUM_SAMPLES // BATCH):
        remote.expect(order.shards_from(step, BATCH))
        assert equal(remote.gather(order.batch(step, BATCH)), data.gather(data.order(seed=5).batch(step, BATCH)))
        with suppress(FileNotFoundError):  # one may go while they are counted
            assert sum(path.stat().st_size for path in (tmp_path / "remote").glob("*.tar")) <= bound * 2**30
    assert not remote.replaced
    local_copies(tmp_path, bound).close()
    assert b"secret" not in b"".join(path.read_bytes() for path in (tmp_path / "remote").glob("*") if path.is_file())


def test_a_server_that_loses_its_files_stops_the_run_at_once(data, server, tmp_path):
    url = serve(server, Path(data.name), "latents")
    remote = LatentSet(find_latents(url, tmp_path, remote_cache_gib=1), tmp_path, window=WINDOW)
    for path in list(server.files):
        server.faults[path] = [404]
    before = sum(server.gets.values())
    with pytest.raises(DataError, match=r"remote file cannot be read\n  got: there is no such file"):
        remote.gather(np.arange(NUM_SAMPLES))
    assert sum(server.gets.values()) - before == 1 and not remote.replaced


def test_a_cache_that_holds_no_window_is_refused(data, server, tmp_path):
    url = serve(server, Path(data.name), "latents")
    bound = 1.5 * max(path.stat().st_size for path in Path(data.name).glob("*.tar")) / 2**30
    found = find_latents(url, tmp_path, remote_cache_gib=bound)
    with pytest.raises(
        DataError, match=r"too small(.|\n)*2 shards are shuffled together\n.*data\.remote_cache_gib=1, so"
    ):
        LatentSet(found, tmp_path, window=WINDOW)
    assert len(LatentSet(found, tmp_path, window=1)) == NUM_SAMPLES


def test_a_part_of_a_remote_data_set_is_refused(data, server, tmp_path):
    url = serve(server, Path(data.name), "part")
    server.add("part/00002_stats.json", b'{"successes": 10, "fingerprint": "of another"}')
    with pytest.raises(DataError, match=r"has not been written to its end(.|\n)*00002\.tar is of another data set"):
        find_latents(url, tmp_path, remote_cache_gib=1)


def test_remote_images_are_cached_like_local_ones(raw, data, server, teacher, teacher_folder, tmp_path):
    serve(server, raw, "raw")
    pattern = server.url("raw/{00000..00008}.tar")
    caching = plan_caching(pattern, teacher_folder, DataWish(CaptionSource(), (), tmp_path), resolution=32)
    assert caching.num_samples is None
    reports = []
    ensure_latents(caching, lambda: teacher, progress=lambda done, total: reports.append((done, total)))
    remote = read_latents(caching, window=WINDOW)
    everything = np.arange(NUM_SAMPLES)
    assert equal(remote.gather(everything), data.gather(everything))
    assert reports[-1] == (NUM_SAMPLES, NUM_SAMPLES) and sorted(reports) == reports
    server.faults["raw/00004.tar"] = [404]
    with pytest.raises(DataError, match=r"00009\.tar: remote file cannot be read\n  got: there is no such file"):
        plan_caching(
            server.url("raw/{00008..00009}.tar"), teacher_folder, DataWish(CaptionSource(), (), tmp_path), resolution=32
        )


def test_equal_addresses_share_their_copies(tmp_path):
    sources = find_sources("https://h/{0..1}.tar", tmp_path)
    assert [source.name for source in sources] == ["0.tar", "1.tar"]
    assert sources[0].copies is find_sources("https://h/2.tar", tmp_path)[0].copies
