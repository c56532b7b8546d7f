"""Folders of pictures become shards: bytes unchanged, one order, and a reason for everything left out."""

import hashlib
import io
import json
import os

import pytest
from PIL import Image

from bkd.data.indexing import index_shard
from bkd.data.pack import pack_folder, write_packing
from bkd.data.shards import write_shards
from bkd.errors import DataError


def encoded(kind="PNG", color=(200, 10, 10), size=(24, 16), mode="RGB", **options):
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, kind, **options)
    return stream.getvalue()


def frames():
    return {"save_all": True, "append_images": [Image.new("RGB", (24, 16), (0, 0, 255))]}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    return place


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def packed(folder, **options):
    """Samples by source, and the packing."""
    packing = pack_folder(folder, **options)
    return {sample.metadata["source"]: sample for sample in packing.samples()}, packing


def captions(folder, **options):
    return {source: sample.caption for source, sample in packed(folder, **options)[0].items()}


def test_captions_lie_beside_the_pictures(folder):
    files = {
        "b.JPG": encoded("JPEG"),
        "b.txt": " a red square \n",
        "a/c.d.webp": encoded("WEBP"),
        "a/c.d.caption": "\ufeffein Wörtchen 🟥",
        "a/e.png": encoded(),
        "a/e.txt": "the same",
        "a/e.caption": "the same\n",
    }
    samples, packing = packed(fill(folder, files))
    assert {source: sample.caption for source, sample in samples.items()} == {
        "a/c.d.webp": "ein Wörtchen 🟥",
        "a/e.png": "the same",
        "b.JPG": "a red square",
    }
    assert list(samples) == sorted(samples) and not packing.left_out
    assert [sample.extension for sample in samples.values()] == ["webp", "png", "jpg"]
    assert [sample.image for sample in samples.values()] == [files[source] for source in samples]


def test_two_different_captions_are_an_error(folder):
    fill(folder, {"a.png": encoded(), "a.txt": "a cat", "a.caption": "a dog"})
    with pytest.raises(
        DataError, match=r"a\.png: a picture has two different captions\n.*'a dog' in a\.caption; 'a cat'"
    ):
        pack_folder(folder)
    (folder / "a.caption").unlink()
    fill(folder, {"metadata.csv": "file_name,text\na.png,a cow\n"})
    with pytest.raises(DataError, match=r"'a cat' in a\.txt; 'a cow' in metadata\.csv line 2"):
        pack_folder(folder)


def test_a_csv_gives_captions_and_columns(folder):
    table = '\ufefffile_name,score,text\r\na.png,6.5,"says ""hi"", naïve\r\nsecond line"\r\nin/b.png,,Straße\r\n'
    fill(folder, {"a.png": encoded(), "in/b.png": encoded(), "metadata.csv": table})
    samples, _ = packed(folder)
    assert samples["a.png"].caption == 'says "hi", naïve\r\nsecond line'
    assert samples["in/b.png"].caption == "Straße"
    assert [sample.metadata["score"] for sample in samples.values()] == ["6.5", None]
    assert not {"file_name", "text"} & samples["a.png"].metadata.keys()


def test_a_jsonl_gives_captions_and_columns(folder):
    rows = [
        {"file_name": "./a.png", "caption": "no", "prompt": "no", "text": "yes", "AESTHETIC_SCORE": 7.5},
        {"file_name": "b.png", "text": "two", "width": 1, "status": "x", "key": "x", "sha256": "x", "tags": ["é", 1]},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[0] = lines[0].replace("7.5", '7.5, "bad": NaN, "big": 1e999, "low": [-Infinity]')
    fill(folder, {"a.png": encoded(), "b.png": encoded(), "metadata.jsonl": "\ufeff" + "\n\n".join(lines) + "\n"})
    samples, _ = packed(folder)
    assert {source: sample.caption for source, sample in samples.items()} == {"a.png": "yes", "b.png": "two"}
    kept = samples["a.png"].metadata
    assert kept["bad"] is None and kept["big"] is None and kept["low"] == [None] and kept["AESTHETIC_SCORE"] == 7.5
    (shard,) = write_shards(iter(samples.values()), folder.parent / "shards")
    first, second = (json.loads(sample.read("json")) for sample in index_shard(shard).samples())
    assert first["caption"] == "yes" and first["prompt"] == "no"
    assert second["width"] == 24 and second["status"] == "success" and second["key"] == "000000001"
    assert second["tags"] == ["é", 1] and len(second["sha256"]) == 64


def test_metadata_in_subfolders_names_files_beside_it(folder):
    fill(
        folder,
        {
            "one/a.png": encoded(),
            "one/metadata.csv": "file_name,text\na.png,first\n",
            "two/in/a.png": encoded(),
            "two/metadata.jsonl": '{"file_name": "in/a.png", "prompt": "second"}',
            "b.png": encoded(),
            "b.txt": "third",
        },
    )
    assert captions(folder) == {"b.png": "third", "one/a.png": "first", "two/in/a.png": "second"}


def test_the_caption_column_can_be_named(folder):
    fill(folder, {"a.png": encoded(), "metadata.csv": "file_name,text,Beschreibung\na.png,no,ja\n"})
    assert captions(folder, caption_field="Beschreibung") == {"a.png": "ja"}
    with pytest.raises(
        DataError, match=r"no column 'Beschreibun'; did you mean 'Beschreibung'\?\n.*file_name, text, Besch"
    ):
        pack_folder(folder, caption_field="Beschreibun")
    (folder / "metadata.csv").unlink()
    with pytest.raises(DataError, match="no metadata file that could have 'Beschreibung'"):
        pack_folder(folder, caption_field="Beschreibung")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\na.png,x\n", r"metadata\.csv: no column with captions\n.*file_name, label\n"),
        ("metadata.csv", "", r"no column with captions\n.*got: no rows"),
        ("metadata.csv", "name,text\na.png,x\n", r"line 2: a row without file_name\n.*name, text"),
        ("metadata.csv", "file_name,text\na.png,x, y\n", r"line 2: damaged row\n.*3 cells below 2 names"),
        ("metadata.csv", 'file_name,text\na.png,"x\n', r"metadata cannot be read\n.*unexpected end of data"),
        ("metadata.csv", "file_name,text,text\na.png,x,y\n", "a column occurs twice"),
        ("metadata.csv", b"file_name,text\na.png,na\xefve\n", r"metadata cannot be read\n.*utf-8"),
        ("metadata.csv", "file_name,text\na.png,x\n\n./a.png,y\n", r"two rows for one picture\n.*line 2, .* line 4"),
        (
            "metadata.csv",
            "file_name,text\n../a.png,x\n",
            r"line 2: a row names a file outside its folder\n.*\.\./a\.png",
        ),
        ("metadata.csv", "file_name,text\n/etc/a.png,x\n", "a row names a file outside its folder"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name"', r"metadata\.jsonl line 2: damaged row"),
        ("metadata.jsonl", '["a.png", "x"]', r"line 1: damaged row\n.*\[\"a\.png\""),
        ("metadata.jsonl", '{"text": "x"}', "line 1: a row without file_name"),
        ("metadata.jsonl", "[" * 100_000, "line 1: damaged row"),
    ],
)
def test_damaged_metadata_is_refused_with_its_line(folder, name, text, message):
    with pytest.raises(DataError, match=message):
        pack_folder(fill(folder, {"a.png": encoded(), name: text}))


def test_two_metadata_files_in_one_folder_are_refused(folder):
    fill(folder, {"a.png": encoded(), "metadata.csv": "file_name,text\na.png,x\n", "metadata.jsonl": "{}"})
    with pytest.raises(DataError, match=r"two metadata files in one folder: keep one\n.*metadata.csv, metadata.jsonl"):
        pack_folder(folder)


def test_everything_left_out_has_a_reason(folder):
    good, jpeg = encoded(), encoded("JPEG", size=(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "good.png": good,
        "cmyk.jpg": encoded("JPEG", color=(1, 2, 3, 4), mode="CMYK"),
        "phone.jpg": encoded("MPO", **frames()),
        "turned.jpg": encoded("JPEG", exif=exif),
        "wrong.jpg": good,
        "truncated.png": good[:60],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.webp": encoded("WEBP")[:-8],
        "zero.png": b"",
        "html.png": b"<html>rate limited</html>",
        "gif.png": encoded("GIF"),
        "moving.webp": encoded("WEBP", **frames()),
        "moving.png": encoded("PNG", **frames()),
        "moving.gif": encoded("GIF", **frames()),
        "old.bmp": encoded("BMP"),
    }
    texts = {name.rpartition(".")[0] + ".txt": "x" for name in files}
    others = {
        "nothing.png": good,
        "empty.png": good,
        "empty.txt": " \n",
        "latin.png": good,
        "latin.caption": "naïve".encode("latin-1"),
        "wide.png": good,
        "wide.txt": "wide".encode("utf-16"),
        "alone.txt": "x",
        "README.md": "x",
        ".hidden.png": good,
        ".git/x.png": good,
    }
    fill(folder, {**files, **texts, **others})
    (folder / "link.png").symlink_to(folder / "good.png")
    (folder / "links").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.png")
    samples, packing = packed(folder)
    assert list(samples) == ["cmyk.jpg", "good.png", "phone.jpg", "turned.jpg", "wrong.jpg"]
    assert samples["wrong.jpg"].extension == "png" and samples["phone.jpg"].extension == "jpg"
    assert samples["cmyk.jpg"].image == files["cmyk.jpg"]
    turned = samples["turned.jpg"].metadata
    assert (turned["width"], turned["height"], turned["original_width"], turned["original_height"]) == (16, 24, 16, 24)
    assert packing.left_out == {
        "truncated.png": "damaged",
        "truncated.jpg": "damaged",
        "truncated.webp": "damaged",
        "zero.png": "empty file",
        "html.png": "not a JPEG, PNG or WebP, whatever its name says",
        "gif.png": "not a JPEG, PNG or WebP, whatever its name says",
        "moving.webp": "animated: save one frame as PNG",
        "moving.png": "animated: save one frame as PNG",
        "moving.gif": "format not supported: convert to PNG",
        "old.bmp": "format not supported: convert to PNG",
        "nothing.png": "no caption",
        "empty.png": "caption empty",
        "latin.png": "caption cannot be read as UTF-8",
        "wide.png": "caption cannot be read as UTF-8",
        "alone.txt": "caption without a picture",
        "README.md": "neither picture nor caption",
        ".hidden.png": "hidden",
        ".git": "hidden",
        "link.png": "a link, not followed",
        "links": "a link, not followed",
        "pipe.png": "not a regular file",
    }
    assert next(iter(packing.reasons.items())) == ("damaged", 3) and sum(packing.reasons.values()) == 21


def test_rows_and_pictures_that_do_not_meet_are_counted(folder):
    rows = [
        {"file_name": "a.png", "text": "x"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "b.png", "text": None},
        {"file_name": "c.png", "text": ["x"]},
        {"file_name": "d.png", "text": "\ud800"},
        {"file_name": "f.gif", "text": "x"},
    ]
    pictures = {f"{name}.png": encoded() for name in "abcde"}
    lines = "\n".join(map(json.dumps, rows))
    samples, packing = packed(fill(folder, {**pictures, "f.gif": encoded("GIF"), "metadata.jsonl": lines}))
    assert list(samples) == ["a.png"]
    assert packing.left_out == {
        "b.png": "caption empty",
        "c.png": "caption is not text",
        "d.png": "caption cannot be read as UTF-8",
        "e.png": "no caption",
        "f.gif": "format not supported: convert to PNG",
        "gone.png": "in the metadata, but there is no such file",
    }


def test_pictures_too_large_to_be_safe_are_left_out(folder, monkeypatch):
    fill(folder, {"a.png": encoded(), "a.txt": "x", "b.png": encoded(size=(60, 60)), "b.txt": "x"})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16)
    samples, packing = packed(folder)
    assert list(samples) == ["a.png"]
    assert packing.left_out == {"b.png": "more pixels than are safe to decode"}


def test_nothing_is_written_when_nothing_can_be_packed(folder):
    output = folder.parent / "shards"
    with pytest.raises(DataError, match=r"not one picture can be packed\n.*got: an empty folder\n"):
        pack_folder(folder)
    fill(folder, {"a.png": encoded(), "b.png": encoded(), "c.gif": b""})
    with pytest.raises(DataError, match=r"got: 2 no caption; 1 format not supported: convert to PNG\n.*\n.*NAME\.txt"):
        pack_folder(folder)
    fill(folder, {"a.png": b"", "a.txt": "x"})
    with pytest.raises(DataError, match="1 no caption; 1 format not supported: convert to PNG; 1 empty file"):
        write_packing(pack_folder(folder), output, cache=output)
    assert not output.exists()
    with pytest.raises(DataError, match="folder cannot be read"):
        pack_folder(folder / "gone")


def many(folder, names):
    for number, name in enumerate(names):
        fill(folder, {f"{name}.png": encoded(color=(number, 0, 0)), f"{name}.txt": name})
    return folder


def test_packing_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    names = ["z", "B", "a-b", "a/b", "a/c/d", "é", "10", "9"]
    one = many(tmp_path / "one", names)
    two = tmp_path / "two"
    for name in sorted((path.relative_to(one).as_posix() for path in one.rglob("*.*")), reverse=True):
        fill(two, {name: (one / name).read_bytes()})
    real = os.walk

    def backwards(top, **options):
        for place, folders, files in real(top, **options):
            folders.sort(reverse=True)
            yield place, folders, sorted(files, reverse=True)

    first = write_shards(pack_folder(one).samples(), tmp_path / "1", per_shard=3)
    monkeypatch.setattr("bkd.data.pack.os.walk", backwards)
    second = write_shards(pack_folder(two).samples(), tmp_path / "2", per_shard=3)
    assert len(first) == 3 and [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    found = [sample.read("txt").decode() for path in first for sample in index_shard(path).samples()]
    assert found == ["10", "9", "B", "a-b", "a/b", "a/c/d", "z", "é"]


def test_shards_read_back_what_was_packed(folder):
    fill(folder, {"a.png": encoded(), "a.txt": "a square", "b.jpg": encoded("JPEG"), "b.txt": "another"})
    calls = []
    packing = pack_folder(folder)
    output = folder.parent / "shards"
    totals = write_packing(packing, output, cache=output, progress=lambda *done: calls.append(done))
    index = index_shard(output / "00000.tar")
    assert len(index) == 2 and calls[-1] == (2, 2) and totals == {"kept": 2}
    assert index.fields["width"].tolist() == [24, 24] and index.fields["original_height"].tolist() == [16, 16]
    assert index.caption_lengths.tolist() == [8, 7] and not index.contents.foreign
    for sample, name in zip(index.samples(), ("a.png", "b.jpg"), strict=True):
        content = (folder / name).read_bytes()
        metadata = json.loads(sample.read("json"))
        assert sample.read(sample.image_extension) == content
        assert metadata["source"] == name and metadata["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_picture_that_vanishes_is_counted(folder):
    fill(folder, {"a.png": encoded(), "a.txt": "x", "b.png": encoded(), "b.txt": "x"})
    packing = pack_folder(folder)
    (folder / "b.png").unlink()
    assert len(list(packing.samples())) == 1 and packing.left_out == {"b.png": "cannot be read"}
    assert len(list(packing.samples())) == 1 and packing.reasons == {"cannot be read": 1}
