"""Shards, images, order and cache: nothing unreadable gets in, nothing runs, and the order is a pure function."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bkd import files
from bkd.data import indexing
from bkd.data.caching import ensure_latents, plan_caching, read_latents
from bkd.data.captions import CaptionSource
from bkd.data.images import decode_image, to_model_range, to_pixels
from bkd.data.indexing import index_shard
from bkd.data.order import Order
from bkd.data.shapes import render, scene
from bkd.data.shards import NewSample, expand_shards, write_shards
from bkd.data.sources import find_sources
from bkd.data.survey import DataWish
from bkd.errors import DataError
from bkd.rng import StepRng

KILLED = """
import os, signal, sys
from pathlib import Path
from bkd.files import replace_file
with replace_file(Path(sys.argv[1])) as stream:
    stream.write(b"half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def png(color=(200, 10, 10), size=(32, 32), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, "PNG")
    return stream.getvalue()


def test_shards_read_back_what_was_written(shards):
    samples = [s for path in shards for s in index_shard(path).samples()]
    assert len(samples) == 96 and [s.key for s in samples[:2]] == ["000000000", "000000001"]
    assert samples[64].key == "000010000"  # img2dataset numbers by shard, then by row
    drawn = scene("train", 70)
    assert samples[70].read("txt").decode() == drawn.caption
    metadata = json.loads(samples[70].read("json"))
    assert metadata["caption"] == drawn.caption and metadata["status"] == "success"
    assert {"AESTHETIC_SCORE", "pwatermark", "punsafe", "similarity", "sha256", "original_width"} <= metadata.keys()
    pixels = decode_image(samples[70].read("png"), 32).pixels.permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, render(drawn))


def test_writing_twice_gives_the_same_bytes(shards, tmp_path):
    from bkd.data.shapes_shards import shapes_samples

    again = write_shards(shapes_samples("train", 96), tmp_path, per_shard=64)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in shards]


def test_webdataset_reads_the_shards_too(shards):
    import webdataset as wds

    read = list(wds.WebDataset([str(p) for p in shards], shardshuffle=False, empty_check=False))
    assert len(read) == 96 and {"png", "txt", "json"} <= read[0].keys()


@pytest.mark.parametrize("cut", [200, 512, 1536, 20_000, -1024])
def test_a_truncated_shard_is_refused(shards, tmp_path, cut):
    whole = shards[0].read_bytes().rstrip(b"\0")
    whole += b"\0" * (-len(whole) % 512)
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[:cut] if cut > 0 else whole)
    with pytest.raises(DataError, match=r"cut\.tar: shard (truncated|corrupt)"):
        index_shard(path)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(DataError, match=r"00007\.tar: shard missing"):
        index_shard(tmp_path / "00007.tar")


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"<html>rate limited</html>" * 100)
    with pytest.raises(DataError, match="shard corrupt: not a readable tar"):
        index_shard(path)


def test_links_duplicates_and_empty_shards_are_refused(tmp_path):
    def tar(name, *members):
        path = tmp_path / name
        with tarfile.open(path, "w") as archive:
            for member in members:
                archive.addfile(member, io.BytesIO(b"x" * member.size))
        return path

    def file(name):
        info = tarfile.TarInfo(name)
        info.size = 1
        return info

    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(DataError, match="shard holds a symbolic link"):
        index_shard(tar("link.tar", link))
    with pytest.raises(DataError, match="same member twice"):
        index_shard(tar("twice.tar", file("a.png"), file("a.txt"), file("a.png")))
    assert len(index_shard(tar("other.tar", file("a.npy")))) == 0


def test_shard_patterns(tmp_path):
    for number in range(3):
        (tmp_path / f"0000{number}.tar").touch()
    expected = [tmp_path / f"0000{n}.tar" for n in range(3)]
    assert expand_shards(str(tmp_path)) == expected
    assert expand_shards(str(tmp_path / "*.tar")) == expected
    assert expand_shards(str(tmp_path / "{00000..00002}.tar")) == expected
    (tmp_path / "odd[1].tar").touch()
    assert expand_shards(str(tmp_path / "odd[1].tar")) == [tmp_path / "odd[1].tar"]
    with pytest.raises(DataError, match="no shards found"):
        expand_shards(str(tmp_path / "nothing-*.tar"))


def test_a_brace_without_partner_is_an_error():
    with pytest.raises(DataError, match="a brace in the shard pattern has no partner"):
        expand_shards("shards/{00000..00099.tar")


@pytest.mark.parametrize(
    "spec", ["pipe:touch /tmp/bkd-was-here", "ftp://example.org/{0..3}.tar", "file:///etc/{0..3}.tar"]
)
def test_commands_and_unknown_addresses_are_not_shards(spec, tmp_path):
    with pytest.raises(DataError, match="shards are not read from such an address"):
        find_sources(spec, tmp_path)


def test_transparency_is_laid_on_white():
    assert decode_image(png((10, 20, 30, 0), mode="RGBA"), 32).pixels.unique().tolist() == [255]


def test_images_are_oriented_resized_and_cropped():
    image = Image.new("RGB", (60, 30), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 30, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees: blue, on the left, comes to the top
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    pixels = decode_image(stream.getvalue(), 16).pixels
    assert pixels.shape == (3, 16, 16) and pixels[2, 2].min() > 200 and pixels[0, 13].min() > 200


@pytest.mark.parametrize("data", [b"", b"not an image", png()[:60], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(DataError, match="image cannot be decoded"):
        decode_image(data, 32)


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="image cannot be decoded"):
        decode_image(png(), 32)


def test_pixels_survive_the_model_range():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_model_range(pixels)), pixels)


def test_every_epoch_sees_every_sample_once_in_a_new_order():
    order = Order((8, 12), seed=1)
    drawn = np.concatenate([order.batch(n, 6) for n in range(10)])
    epochs = drawn.reshape(3, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(drawn[:20], Order((8, 12), seed=2).batch(0, 20))


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_windows_keep_few_shards_in_use_and_still_show_every_sample_once(window):
    counts = (5, 0, 9, 3, 4, 8, 1)
    order = Order(counts, seed=3, window=window)
    total = sum(counts)
    starts = np.cumsum([0, *counts])
    for epoch in range(3):
        drawn = order.batch(epoch, total)
        assert sorted(drawn) == list(range(total))
        shards = np.searchsorted(starts, drawn, side="right") - 1
        last_seen = {shard: place for place, shard in enumerate(shards)}
        for place in range(total):
            still_needed = {shard for shard, last in last_seen.items() if last >= place}
            assert len(still_needed & set(shards[:place])) <= window
    for step in range(0, 30, 7):
        needed = {int(np.searchsorted(starts, i, side="right")) - 1 for i in order.batch(step, 2)}
        assert needed <= set(order.shards_from(step, 2))


def test_batches_of_any_size_walk_the_same_order():
    order = Order((40, 33, 27), seed=4, window=2)
    by_ten = np.concatenate([order.batch(n, 10) for n in range(70)])
    assert np.array_equal(by_ten, np.concatenate([order.batch(n, 7) for n in range(100)]))


def test_randomness_depends_on_position_alone():
    whole, part = StepRng(5, 9, range(8)), StepRng(5, 9, range(4, 8))
    assert torch.equal(whole.normal("noise", (3, 2))[4:], part.normal("noise", (3, 2)))
    assert torch.equal(whole.integers("t", 1000)[4:], part.integers("t", 1000))
    assert not torch.equal(whole.uniform("a"), whole.uniform("b"))
    assert not torch.equal(whole.uniform("a"), StepRng(5, 10, range(8)).uniform("a"))
    noise = StepRng(0, 0, range(500)).normal("noise", (64,))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def cached(teacher, teacher_folder, spec, cache, **wish):
    """The latents of some shards, in the cache folder."""
    caching = plan_caching(str(spec), teacher_folder, DataWish(CaptionSource(), (), cache), resolution=32, **wish)
    ensure_latents(caching, lambda: teacher)
    return read_latents(caching)


def test_cached_latents_are_what_the_autoencoder_says(teacher, teacher_folder, shards, tmp_path):
    data = cached(teacher, teacher_folder, shards[0].parent, tmp_path)
    batch = data.gather(np.array([70, 3]))
    assert len(data) == 96 and not data.bad
    image = to_model_range(torch.from_numpy(render(scene("train", 70))).permute(2, 0, 1))[None]
    with torch.no_grad():
        posterior = teacher.vae.encode(image).latent_dist
    assert torch.allclose(batch.moments[:1], torch.cat([posterior.mean, posterior.std], 1), atol=5e-3)
    assert teacher.tokenizer.decode(batch.captions.token_ids[1], skip_special_tokens=True) == scene("train", 3).caption


def test_a_second_pass_encodes_nothing(teacher, teacher_folder, shards, tmp_path, monkeypatch):
    first = cached(teacher, teacher_folder, shards[0].parent, tmp_path)
    monkeypatch.setattr(teacher.vae, "encode", None)
    assert cached(teacher, teacher_folder, shards[0].parent, tmp_path).fingerprint == first.fingerprint


def test_an_interrupted_pass_continues_to_the_same_bytes(teacher, teacher_folder, shards, tmp_path, monkeypatch):
    whole = cached(teacher, teacher_folder, shards[0].parent, tmp_path / "whole")
    real, calls = type(teacher.vae).encode, []

    def failing(self, x, *args, **kwargs):
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(type(teacher.vae), "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        cached(teacher, teacher_folder, shards[0].parent, tmp_path / "cut")
    data = cached(teacher, teacher_folder, shards[0].parent, tmp_path / "cut")
    assert calls == [64, 32, 32]
    names = sorted(path.name for path in Path(whole.name).iterdir() if not path.name.endswith(".bkdindex"))
    assert names == ["00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json", "bkd_dataset.json"]
    assert all((Path(whole.name) / name).read_bytes() == (Path(data.name) / name).read_bytes() for name in names)


def test_the_fingerprint_follows_its_inputs(teacher, teacher_folder, shards, tmp_path):
    one = cached(teacher, teacher_folder, shards[0], tmp_path)
    assert one.fingerprint != cached(teacher, teacher_folder, shards[0].parent, tmp_path).fingerprint


def test_broken_images_are_counted_and_many_are_an_error(teacher, teacher_folder, tmp_path):
    def shard(name, num_bad):
        samples = [
            NewSample(image=b"broken" if i < num_bad else png(), extension="png", caption="x") for i in range(20)
        ]
        return write_shards(samples, tmp_path / name)[0].parent

    data = cached(teacher, teacher_folder, shard("few", 1), tmp_path / "cache")
    assert len(data) == 19 and data.bad == {"image cannot be decoded": 1}
    with pytest.raises(DataError, match=r"too many samples cannot be used\n.*got: 5 of 20: 5 image cannot be decoded"):
        cached(teacher, teacher_folder, shard("many", 5), tmp_path / "cache")


def test_an_index_lies_beside_its_shard_or_in_the_cache(shards, tmp_path, monkeypatch):
    path = tmp_path / "read-only" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(shards[1].read_bytes())
    beside, real = path.with_name("x.tar.bkdindex"), indexing.replace_file

    def forbidden(place):
        if place == beside:
            raise PermissionError
        return real(place)

    monkeypatch.setattr(indexing, "replace_file", forbidden)
    first = index_shard(path, tmp_path / "cache")
    assert not beside.exists() and len(list((tmp_path / "cache" / "indexes").iterdir())) == 1
    monkeypatch.setattr(indexing, "walk", None)  # a second walk would fail
    again = index_shard(path, tmp_path / "cache")
    assert again.keys.tolist() == first.keys.tolist() and again.contents == first.contents
    assert all(np.array_equal(again.fields[name], first.fields[name]) for name in first.fields)
    monkeypatch.setattr(indexing, "replace_file", real)
    monkeypatch.undo()
    assert index_shard(shards[1]) and shards[1].with_name("00001.tar.bkdindex").is_file()


def test_what_a_killed_process_left_is_removed_when_its_file_is_written_again(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "x")]) as running:
        running.wait(20)
    assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path / "x").exists()
    with files.replace_file(tmp_path / "x") as stream:
        stream.write(b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_an_index_is_made_again_when_its_shard_changes(shards, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(shards[0].read_bytes())
    assert len(index_shard(path)) == 64
    path.write_bytes(shards[1].read_bytes())
    assert len(index_shard(path)) == 32
    assert index_shard(path).sample(0).read("txt") == index_shard(shards[1]).sample(0).read("txt")


def test_an_index_is_small(shards):
    index = index_shard(shards[0])
    places = sum(p.offsets.nbytes + p.sizes.nbytes + p.checksums.nbytes for p in index.members.values())
    fields = sum(column.nbytes for column in index.fields.values())
    others = index.keys.nbytes + index.languages.nbytes + index.caption_lengths.nbytes
    assert (places + fields + others) / len(index) < 100  # 2.3 million samples in 230 MB
