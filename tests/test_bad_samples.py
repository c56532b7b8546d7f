"""What downloads hold: none of it crashes or hangs a run, runs code, or is taken for something else."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bkd.data.caching import ensure_latents, plan_caching, read_latents
from bkd.data.captions import CaptionSource
from bkd.data.filters import parse_where
from bkd.data.images import decode_image
from bkd.data.index import forget_open_shards
from bkd.data.indexing import index_shard
from bkd.data.metadata import ORIENTATIONS
from bkd.data.reading import decoded_samples
from bkd.data.shapes_shards import shapes_samples
from bkd.data.shards import write_shards
from bkd.data.survey import DataWish
from bkd.errors import DataError

RED = (200, 10, 10)


def encoded(kind="PNG", mode="RGB", size=(32, 32), color=RED, **options):
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, kind, **options)
    return stream.getvalue()


def tar(path, members):
    """A tar of {name: bytes}; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read_all(path):
    """Captions of what can be used, and why the rest cannot."""
    wish, bad = DataWish(CaptionSource(), (), path.parent), Counter()
    selection = wish.select(path)
    samples = selection.index.samples(selection.rows.tolist())
    captions = [item.caption for item in decoded_samples(samples, 32, wish.caption, bad)]
    return captions, dict(bad) | dict(selection.reasons)


def latents(teacher, teacher_folder, spec, cache, **wish):
    caching = plan_caching(str(spec), teacher_folder, DataWish(CaptionSource(), (), cache, **wish), resolution=32)
    ensure_latents(caching, lambda: teacher)
    return read_latents(caching)


GOOD = {"a.png": encoded(), "a.txt": b"a square", "a.json": b"{}"}


def test_a_tar_in_a_tar_is_left_alone(tmp_path):
    inner = tar(tmp_path / "inner.tar", GOOD).read_bytes()
    index = index_shard(tar(tmp_path / "x.tar", {"inner.tar": inner, **GOOD}))
    assert len(index) == 1 and index.contents.foreign == {"tar": 1}


def test_empty_shards_are_no_error_beside_others_and_one_alone(tmp_path, teacher, teacher_folder, shards):
    folder = tmp_path / "some"
    tar(folder / "0.tar", {})
    (folder / "1.tar").write_bytes(shards[0].read_bytes())
    assert len(latents(teacher, teacher_folder, folder, tmp_path / "cache")) == 64
    with pytest.raises(DataError, match=r"0\.tar: the shards hold no samples\n.*allowed: KEY\.jpg"):
        latents(teacher, teacher_folder, folder / "0.tar", tmp_path / "cache")
    (folder / "2.tar").touch()
    with pytest.raises(DataError, match=r"2\.tar: shard truncated"):
        latents(teacher, teacher_folder, folder, tmp_path / "cache")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"b.png": encoded()}, "no txt"),
        ({"b.txt": b"no picture"}, "no image"),
        ({"b.png": encoded(), "b.txt": b" \n"}, "caption empty or not UTF-8"),
        ({"b.png": encoded(), "b.txt": b"caf\xe9"}, "caption empty or not UTF-8"),
        ({"b.png": b"", "b.txt": b"x"}, "image cannot be decoded"),
        ({"b.jpg": encoded("JPEG")[:-200], "b.txt": b"x"}, "image cannot be decoded"),
        ({"b.png": encoded()[:-30], "b.txt": b"x"}, "image cannot be decoded"),
        ({"b.png": encoded(size=(20_000, 20_000), mode="1", color=1), "b.txt": b"x"}, "image cannot be decoded"),
        ({"b.jpg": b"<html>not found</html>", "b.txt": b"x"}, "image cannot be decoded"),
        ({"b.jpg": encoded("GIF"), "b.txt": b"x"}, "image cannot be decoded"),
    ],
)
def test_bad_samples_are_left_out_and_counted(tmp_path, members, reason):
    captions, reasons = read_all(tar(tmp_path / "x.tar", {**GOOD, **members, "c.png": GOOD["a.png"], "c.txt": b"last"}))
    assert captions == ["a square", "last"] and reasons == {reason: 1}


@pytest.mark.parametrize(
    "json_bytes", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"similarity": 1' + b"0" * 5000 + b"}"]
)
def test_metadata_that_cannot_be_read_is_missing(tmp_path, json_bytes):
    index = index_shard(tar(tmp_path / "x.tar", {**GOOD, "a.json": json_bytes}))
    assert len(index) == 1 and not index.fields


@pytest.mark.parametrize(
    "value", [None, "NaN", "Infinity", "-Infinity", '"text"', "true", "[]", "1e999"], ids=lambda value: str(value)
)
def test_values_that_are_no_numbers_are_missing(tmp_path, value):
    fields = "{}" if value is None else f'{{"AESTHETIC_SCORE": {value}}}'
    path = tar(tmp_path / "x.tar", {**GOOD, "a.json": fields.encode()})
    for policy, kept in (("drop", 0), ("keep", 1)):
        wish = DataWish(CaptionSource(), (parse_where(f"aesthetic >= 5, missing {policy}"),), tmp_path)
        assert len(wish.select(path)) == kept
    with pytest.raises(DataError, match=r"a filter asks for 'aesthetic', which samples lack\n.*1 of 1 samples"):
        DataWish(CaptionSource(), (parse_where("aesthetic >= 5"),), tmp_path).select(path)


def decoded(data, resolution=32):
    return decode_image(data, resolution).pixels.permute(1, 2, 0).numpy()


def test_cmyk_and_grey_and_sixteen_bits_become_rgb():
    assert np.abs(decoded(encoded("JPEG", "CMYK", color=(0, 255, 255, 0)))[5, 5].astype(int) - (254, 0, 0)).max() < 8
    assert decoded(encoded(mode="L", color=77))[5, 5].tolist() == [77] * 3
    ramp = (np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, "PNG")
    assert np.abs(decoded(stream.getvalue())[..., 0].astype(int) - ramp / 257).max() <= 1


def test_a_palette_with_transparency_is_laid_on_white():
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(0, (0, 0, 16, 32))
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=0)
    pixels = decoded(stream.getvalue())
    assert pixels[5, 5].tolist() == [255] * 3 and pixels[5, 25].tolist() == [200, 10, 10]


def test_of_an_animation_the_first_picture_is_taken():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for kind in ("WEBP", "PNG"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:], lossless=True)
        assert decoded(stream.getvalue())[5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (1, 1), (33, 32)])
def test_extreme_shapes_are_enlarged_and_cropped(size):
    image = decode_image(encoded(size=size), 32)
    assert image.pixels.shape == (3, 32, 32) and image.original_size == size[::-1]
    assert image.pixels[0].unique().tolist() == [200]
    scale = 32 / min(size)
    assert image.crop_top_left == (round((size[1] * scale - 32) / 2), round((size[0] * scale - 32) / 2))


class Explosive:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "pt"])
def test_members_that_other_readers_run_are_never_opened(tmp_path, monkeypatch, bkd, extension):
    monkeypatch.chdir(tmp_path)
    path = tar(tmp_path / "x.tar", {**GOOD, f"a.{extension}": pickle.dumps(Explosive())})
    assert read_all(path)[0] == ["a square"]
    code, printed = bkd("data", "check", path)
    assert code == 0 and f"members that are never read: 1 .{extension}" in printed
    assert not (tmp_path / "exploded").exists()


def test_keys_may_have_dots_and_folders(tmp_path):
    dotted = {
        "x/img.v1.jpg": encoded("JPEG"),
        "x/img.v1.txt": b"one",
        "img.v2.jpg": encoded("JPEG"),
        "img.v2.txt": b"two",
    }
    path = tar(tmp_path / "x.tar", dotted)
    assert [sample.key for sample in index_shard(path).samples()] == ["x/img.v1", "img.v2"]
    assert read_all(path)[0] == ["one", "two"]


def test_extensions_may_be_in_capitals(tmp_path):
    assert read_all(tar(tmp_path / "x.tar", {"A.JPG": encoded("JPEG"), "A.TXT": b"loud"}))[0] == ["loud"]


def test_paths_may_have_any_characters(tmp_path, teacher, teacher_folder, shards):
    folder = tmp_path / "my #1 set? 100%"
    folder.mkdir()
    (folder / "00#0.tar").write_bytes(shards[1].read_bytes())
    assert len(latents(teacher, teacher_folder, folder, tmp_path / "cache #2")) == 32


def test_data_sets_with_equal_names_stay_apart(tmp_path, teacher, teacher_folder):
    for number, name in enumerate(("one", "two")):
        write_shards(shapes_samples("train", 4, seed=number), tmp_path / name)
    both = latents(teacher, teacher_folder, tmp_path / "{one,two}", tmp_path / "cache")
    alone = [latents(teacher, teacher_folder, tmp_path / name, tmp_path / "cache") for name in ("one", "two")]
    assert len({both.fingerprint, *(each.fingerprint for each in alone)}) == 3
    joined = torch.cat([each.gather(np.arange(4)).moments for each in alone])
    assert torch.equal(both.gather(np.arange(8)).moments, joined) and not torch.equal(joined[:4], joined[4:])


def test_filters_that_leave_nothing_are_an_error_with_the_reasons(bkd_refuses, shards):
    arguments = ["train", "shapes/sd-small", f"data.shards={shards[0].parent}", "data.filters.aesthetic=>= 9"]
    bkd_refuses(arguments, "no sample of these shards can be used\n  got: 96 samples: 96 aesthetic not >= 9")


def test_a_sample_that_is_damaged_after_caching_is_replaced_by_the_next(tmp_path, teacher, teacher_folder, shards):
    data = latents(teacher, teacher_folder, shards[0].parent, tmp_path)
    whole = data.gather(np.arange(96))
    path = data.shards[0].path
    index = index_shard(path)
    place, stamp = index.sample(7).members["moments.npy"], path.stat()
    with path.open("r+b") as stream:
        stream.seek(place.offset + 200)
        stream.write(b"\xff\xff")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    for _ in range(2):
        batch = data.gather(np.array([6, 7, 8]))
        assert torch.equal(batch.moments, whole.moments[[6, 8, 8]])
        assert torch.equal(batch.captions.token_ids, whole.captions.token_ids[[6, 8, 8]])
    assert data.replaced == {"shard changed since it was indexed": 2}


def test_a_shard_that_disappears_stops_the_run_with_the_reason(tmp_path, teacher, teacher_folder, shards):
    data = latents(teacher, teacher_folder, shards[0].parent, tmp_path)
    data.gather(np.arange(96))
    data.shards[0].path.unlink()
    forget_open_shards()
    assert len(data.gather(np.arange(64, 96)).moments) == 32  # the other shard is still there
    with pytest.raises(DataError, match=r"00000\.tar: too many cached samples cannot be read\n  got: .*: \d+ shard"):
        data.gather(np.arange(64))


FULL_DISK = """
import resource, sys
from bkd.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.argv = ["bkd", "data", "cache", *sys.argv[1:]]
main()
"""


def test_a_full_disk_leaves_what_was_finished_and_nothing_else(tmp_path, shards, cache):
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    limited = [
        sys.executable,
        "-c",
        FULL_DISK,
        str(shards[0].parent),
        "--teacher",
        "shapes",
        "-o",
        str(tmp_path / "out"),
    ]
    found = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "00000.tar: no space left for the shard" in found.stderr and "run the same command again" in found.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bkd_dataset.json"]


def test_a_disk_that_is_too_small_is_refused_before_the_work(tmp_path, teacher, teacher_folder, shards, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"the disk is too small for these latents(.|\n)*96 samples"):
        latents(teacher, teacher_folder, shards[0].parent, tmp_path)


def test_latents_that_are_not_finite_are_counted_and_many_are_an_error(tmp_path, teacher, teacher_folder, monkeypatch):
    folder = tmp_path / "shards"
    write_shards(shapes_samples("train", 32), folder)
    real = type(teacher.vae).encode

    def overflow(rows):
        def encode(self, images):
            found = real(self, images)
            found.latent_dist.mean[rows] = float("nan")
            return found

        return encode

    monkeypatch.setattr(type(teacher.vae), "encode", overflow([3]))
    data = latents(teacher, teacher_folder, folder, tmp_path / "one")
    assert len(data) == 31 and data.bad == {"latents not finite": 1}
    monkeypatch.setattr(type(teacher.vae), "encode", overflow(range(5)))
    with pytest.raises(DataError, match=r"values that are not finite\n  got: 5 of 32 latents"):
        latents(teacher, teacher_folder, folder, tmp_path / "five")


def test_captions_may_come_from_metadata(tmp_path, bkd):
    members = {"a.jpg": encoded("JPEG"), "a.json": json.dumps({"caption": "from here", "n": 3}).encode()}
    path = tar(tmp_path / "x.tar", members)
    code, printed = bkd("data", "check", path)
    assert code == 1 and "1 no txt; take captions from KEY.json: json:caption (--caption" in printed
    assert bkd("data", "check", path, "--caption", "json:caption")[0] == 0
    code, printed = bkd("data", "check", path, "--caption", "json:n")
    assert code == 1 and "1 no text in json:n" in printed
    code, printed = bkd("data", "check", path, "--caption", "xml")
    assert code == 1 and "allowed: txt, or json:FIELD" in printed


@pytest.mark.parametrize(("words", "number"), [*ORIENTATIONS.items(), ("Horizontal (normal)", 1), ("upside down", 1)])
def test_pictures_that_lost_their_exif_are_turned_by_what_metadata_says(tmp_path, words, number):
    """img2dataset stores a turned photo as it lies; Pillow's own rule for EXIF is the reference."""
    ramp = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3))
    plain, tagged = io.BytesIO(), io.BytesIO()
    ramp.save(plain, "PNG")
    exif = ramp.getexif()
    exif[0x0112] = number
    ramp.save(tagged, "PNG", exif=exif)
    metadata = json.dumps({"exif": json.dumps({"Image Orientation": words})}).encode()
    members = {"a.png": plain.getvalue(), "a.txt": b"x", "a.json": metadata, "b.png": tagged.getvalue(), "b.txt": b"x"}
    samples = index_shard(tar(tmp_path / "x.tar", members)).samples()
    lost, kept = [item.image.pixels for item in decoded_samples(samples, 32, CaptionSource(), Counter())]
    assert torch.equal(lost, kept)
    with_both = {"a.png": tagged.getvalue(), "a.txt": b"x", "a.json": metadata}
    (both,) = decoded_samples(index_shard(tar(tmp_path / "y.tar", with_both)).samples(), 32, CaptionSource(), Counter())
    assert torch.equal(both.image.pixels, kept)  # turned once


def test_many_samples_without_captions_are_an_error_unless_they_may_go(tmp_path, bkd, bkd_refuses):
    members = {f"{n}.png": encoded(color=(n, 0, 0)) for n in range(20)}
    path = tar(tmp_path / "in" / "x.tar", {**members, **{f"{n}.txt": b"x" for n in range(15)}})
    code, printed = bkd("data", "check", path)
    assert code == 1 and "5 of 20 samples lack an image or a caption" in printed
    code, printed = bkd("data", "cache", path, "--teacher", "shapes", "-o", tmp_path / "out")
    assert code == 1 and "too many samples lack an image or a caption\n  got: 5 of 20: 5 no txt" in printed
    allowed = ["--where", "caption_length >= 1, missing drop"]
    assert bkd("data", "cache", path, "--teacher", "shapes", "-o", tmp_path / "out", *allowed)[0] == 0


def test_check_counts_metadata_that_cannot_be_read_and_names_foreign_images(tmp_path, bkd):
    path = tar(tmp_path / "x.tar", {**GOOD, "b.json": b"{", "b.png": encoded(), "b.txt": b"b"})
    assert "note: 1 KEY.json cannot be read" in bkd("data", "check", path)[1]
    code, printed = bkd("data", "check", tar(tmp_path / "y.tar", {"a.gif": encoded("GIF"), "a.txt": b"x"}))
    assert code == 1 and "1 no image; images must be jpg, jpeg, png, webp; other members: gif" in " ".join(
        printed.split()
    )
