"""Damaged shards: 2,000 of them, and none hangs, crashes, or gives a sample that is not the one that was written."""

import io
import os
import random
import signal
import tarfile

import numpy as np
import pytest

from bkd.data.captions import CaptionSource
from bkd.data.images import decode_image
from bkd.data.indexing import INDEX_SUFFIX, index_shard
from bkd.data.shapes_shards import shapes_samples
from bkd.data.shards import write_shards
from bkd.data.stats import stats_file
from bkd.errors import DataError

CASES = 500
SECONDS = 10
NUM_SAMPLES = 5


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def flip(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def garble(data, rng):
    start, size = rng.randrange(len(data)), rng.choice([1, 16, 512, 700])
    return data[:start] + rng.randbytes(len(data[start : start + size])) + data[start + size :]


def shift(data, rng):
    start, size = rng.randrange(len(data)), rng.choice([1, 512, 513])
    return data[:start] + data[start + size :] if rng.random() < 0.5 else data[:start] + data[start - size :]


DAMAGES = (truncate, flip, flip, garble, shift)


class TooSlow(BaseException):
    """No Exception, which readers of damaged files take for damage."""


@pytest.fixture
def bounded():
    """Raises what no reader catches when a case takes too long."""

    def give_up(number, frame):
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, give_up)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_shards(shapes_samples("train", NUM_SAMPLES), tmp_path_factory.mktemp("original"))[0]


def read(sample, caption):
    """What training would see of a sample, or that it would see nothing; captions are part of it where asked for."""
    try:
        text = CaptionSource().of(sample)
        pixels = decode_image(sample.read(sample.image_extension), 32).pixels.numpy().tobytes()
    except DataError:
        return None
    return (text if caption else None, pixels)


def contents(path, caption=True):
    index = index_shard(path)
    return {sample.key: read(sample, caption) for sample in index.samples() if sample.image_extension}


def damaged(data, rng):
    while (changed := rng.choice(DAMAGES)(data, rng)) == data:
        pass
    return changed


def prepare(path, data):
    path.write_bytes(data)
    path.with_name(path.name + INDEX_SUFFIX).unlink(missing_ok=True)


@pytest.mark.parametrize("seed", range(2))
def test_a_shard_that_bkd_wrote_is_read_as_written_or_refused(original, tmp_path, bounded, seed):
    """Its checksum lies beside it."""
    rng, path = random.Random(seed), tmp_path / original.name
    stats_file(path).write_bytes(stats_file(original).read_bytes())
    for _ in range(CASES):
        bounded()
        prepare(path, damaged(original.read_bytes(), rng))
        with pytest.raises(DataError):
            contents(path)


def test_damage_after_indexing_gives_the_written_sample_or_none(original, tmp_path, bounded):
    """No checksum beside it, but an index from when it was whole; size and time of the file stay the same."""
    rng, path = random.Random(2), tmp_path / original.name
    prepare(path, original.read_bytes())
    whole, stamp = contents(path), path.stat()
    index = index_shard(path)
    refused = 0
    for _ in range(CASES):
        bounded()
        path.write_bytes(flip(original.read_bytes(), rng))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        for sample in index.samples():
            found = read(sample, caption=True)
            assert found in (None, whole[sample.key])
            refused += found is None
    assert refused


def gnu_tar(original):
    """The same samples as GNU tar and Python's tarfile write them: long names, extended headers, no checksum."""
    stream = io.BytesIO()
    with tarfile.open(original) as source, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as target:
        for number, member in enumerate(source):
            data = source.extractfile(member).read()
            member.name = f"./{'long-' * 30}/{member.name}" if number % 2 else member.name
            member.pax_headers = {"mtime": "1.5"}
            target.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def test_a_foreign_shard_is_refused_or_gives_its_pictures(original, tmp_path, bounded):
    """No checksum and no index: PNG's own checksums remain; nothing can tell a changed caption."""
    rng, path = random.Random(3), tmp_path / "foreign.tar"
    whole = gnu_tar(original)
    prepare(path, whole)
    pictures = set(contents(path, caption=False).values())
    assert len(pictures) == NUM_SAMPLES and None not in pictures
    outcomes = {"refused": 0, "read": 0}
    for _ in range(CASES):
        bounded()
        prepare(path, damaged(whole, rng))
        try:
            assert set(contents(path, caption=False).values()) <= {*pictures, None}
            outcomes["read"] += 1
        except DataError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > CASES // 20


@pytest.mark.parametrize(("field", "value"), [(8, 1), (10, 24), (6, 99)], ids=["encrypted", "compression", "version"])
def test_an_index_whose_archive_says_what_no_reader_knows_is_made_again(original, tmp_path, field, value):
    path = tmp_path / original.name
    prepare(path, original.read_bytes())
    whole = contents(path)
    kept = path.with_name(path.name + INDEX_SUFFIX)
    data = bytearray(kept.read_bytes())
    entry = data.index(b"PK\x01\x02")  # of the archive's directory
    data[entry + field] = value
    kept.write_bytes(data)
    assert contents(path) == whole


def test_a_damaged_index_is_made_again(original, tmp_path, bounded):
    rng, path = random.Random(4), tmp_path / original.name
    prepare(path, original.read_bytes())
    whole = contents(path)
    kept = path.with_name(path.name + INDEX_SUFFIX)
    data = kept.read_bytes()
    for _ in range(CASES // 5):
        bounded()
        kept.write_bytes(damaged(data, rng))
        assert contents(path) == whole
        assert np.array_equal(index_shard(path).caption_lengths, index_shard(original).caption_lengths)
