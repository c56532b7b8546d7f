"""`bkd data …` as a user meets it, alone, after a kill, and on several processes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bkd.data import latent_set
from bkd.data.caching import ensure_latents, plan_caching, read_latents
from bkd.data.captions import CaptionSource
from bkd.data.images import decode_image, to_model_range
from bkd.data.index import IMAGE_EXTENSIONS
from bkd.data.indexing import INDEX_SUFFIX, index_shard
from bkd.data.latent_folder import open_latents
from bkd.data.latent_set import LatentSet
from bkd.data.order import share
from bkd.data.shapes import scenes
from bkd.data.shapes_shards import shapes_samples
from bkd.data.shards import NewSample, write_shards
from bkd.data.survey import DataWish
from bkd.errors import RecipeError
from tests.test_bad_samples import encoded


def files(folder):
    """What a data set's folder holds, indexes apart: name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(INDEX_SUFFIX)}


def launch(*arguments, processes=2):
    """`accelerate launch` on CPU processes of one thread each."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        processes,
        "--cpu",
        "--num_machines",
        1,
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0, "-m", "bkd", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=environment)


def alone(*arguments):
    command = [sys.executable, "-m", "bkd", *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def five_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    write_shards(shapes_samples("train", 100), folder, per_shard=20)
    return folder


def test_check_says_what_is_there(bkd, shards):
    code, printed = bkd("data", "check", shards[0].parent)
    assert code == 0 and "2 shards" in printed and "96 samples" in printed
    assert "members: 96 json, 96 png, 96 txt" in printed and "AESTHETIC_SCORE 100%" in printed
    found = json.loads(bkd("data", "check", shards[0].parent, "--json")[1])
    assert found["kept"] == found["coverage"]["aesthetic"] == 96 and not found["problems"]
    assert found["quantiles"]["width"] == [32.0] * 5 and found["decoded"]["looked at"] == 96


def test_check_names_every_problem_and_fails(bkd, shards, tmp_path):
    (tmp_path / "0.tar").write_bytes(shards[0].read_bytes())
    (tmp_path / "1.tar").write_bytes(shards[0].read_bytes()[:5000])
    (tmp_path / "2.tar").write_bytes(b"<html>")
    (tmp_path / "0_stats.json").write_text('{"successes": 70}')
    code, printed = bkd("data", "check", tmp_path)
    assert code == 1 and "64 samples" in printed
    assert "1.tar: shard truncated" in printed and "2.tar: shard truncated" in printed
    assert "0.tar: 64 samples, though 0_stats.json says 70" in printed
    code, printed = bkd("data", "check", tmp_path / "0.tar", "--where", "language = en")
    assert code == 1 and "64 of 64 samples have no value; KEY.json has: AESTHETIC_SCORE" in printed


def test_check_notices_what_makes_bad_students(bkd, tmp_path):
    def bordered(number):
        image = Image.new("RGB", (64, 64), "white")
        image.paste((number, 0, 99), (0, 16, 64, 48))
        return image

    def png(image):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()

    samples = [NewSample(image=png(bordered(n % 7)), extension="png", caption="x") for n in range(10)]
    samples += [NewSample(image=b"broken", extension="png", caption="x")]
    write_shards(samples, tmp_path)
    code, printed = bkd("data", "check", tmp_path, "--resolution", "128")
    printed = " ".join(printed.split())
    assert code == 0 and "1 of 11 images cannot be decoded; such samples are left out" in printed
    assert "10 of 11 images have white borders" in printed and "resize_mode" in printed
    assert "10 of 11 images are smaller than 128 px" in printed and "filter by size: '>= 128, missing drop'" in printed
    assert "3 images are byte for byte the same" in printed


def test_check_applies_a_recipe(bkd, shards, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data:\n  filters: {aesthetic: '>= 6.5', pwatermark: '< 0.2, missing drop'}\n")
    code, printed = bkd("data", "check", shards[0].parent, "--recipe", recipe)
    kept, reasons = expected(shards, 6.5, 0.2)
    assert code == 0
    rows = table(printed)
    assert rows["training would use"] == str(kept)
    assert rows["aesthetic not >= 6.5"] == str(reasons[0]) and rows["pwatermark not < 0.2"] == str(reasons[1])


def table(printed):
    """First cell of each row of a printed table -> second cell."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    return {row[0]: row[1] for row in rows}


def expected(shards, aesthetic, watermark):
    found = [json.loads(s.read("json")) for path in shards for s in index_shard(path).samples()]
    low = [each["AESTHETIC_SCORE"] < aesthetic for each in found]
    marked = [each["pwatermark"] >= watermark for each in found]
    kept = sum(not a and not b for a, b in zip(low, marked, strict=True))
    return kept, (sum(low), sum(b and not a for a, b in zip(low, marked, strict=True)))


def test_filter_copies_what_passes_byte_for_byte(bkd, shards, tmp_path):
    wishes = ["--where", "aesthetic >= 6.5", "--where", "pwatermark < 0.2, missing drop"]
    code, printed = bkd("data", "filter", shards[0].parent, "-o", tmp_path / "out", *wishes)
    kept, _ = expected(shards, 6.5, 0.2)
    assert code == 0 and table(printed)["kept"] == str(kept)
    before = {s.key: s for path in shards for s in index_shard(path).samples()}
    after = [s for n in range(2) for s in index_shard(tmp_path / "out" / f"0000{n}.tar").samples()]
    assert len(after) == kept
    assert all(s.read(name) == before[s.key].read(name) for s in after for name in ("png", "txt", "json"))
    first = files(tmp_path / "out")
    assert bkd("data", "filter", shards[0].parent, "-o", tmp_path / "out", *wishes)[0] == 0
    assert files(tmp_path / "out") == first
    code, printed = bkd("data", "filter", shards[0].parent, "-o", tmp_path / "out", "--where", "aesthetic >= 7")
    assert code == 1 and "holds another data set" in printed and 'got: filters: ["aesthetic >= 6.5' in printed
    code, _ = bkd(
        "data", "filter", shards[0].parent, "-o", tmp_path / "out", "--where", "aesthetic >= 7", "--overwrite"
    )
    assert code == 0 and sum(len(index_shard(p)) for p in (tmp_path / "out").glob("*.tar")) == expected(shards, 7, 9)[0]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("aestetic >= 5", "unknown filter field 'aestetic'; did you mean 'aesthetic'?"),
        ("aesthetic", "this is no filter"),
        ("aesthetic >= many", "this is no filter"),
        ("aesthetic >= 5, missing maybe", "this is no filter"),
        ("aesthetic missing drop", "a filter needs a comparison"),
        ("language > en", "this is no filter"),
        ("", "this is no filter"),
    ],
)
def test_filters_that_cannot_be_read_are_refused(bkd_refuses, shards, where, message):
    bkd_refuses(["data", "filter", shards[0].parent, "-o", "out", "--where", where], message)


def test_pack_makes_shards_of_pictures(bkd, tmp_path):
    for number, drawn in enumerate(scenes("train", 5)):
        (tmp_path / "in" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "sub" / f"{number}.png").write_bytes(encoded(color=(number, 0, 0)))
        (tmp_path / "in" / "sub" / f"{number}.txt").write_text(drawn.caption)
    (tmp_path / "in" / "broken.png").write_bytes(b"no")
    (tmp_path / "in" / "broken.txt").write_text("x")
    code, printed = bkd("data", "pack", tmp_path / "in", "-o", tmp_path / "out", "--per-shard", "3")
    assert code == 0 and "6 files" in printed and "not a JPEG, PNG or WebP" in printed
    assert [len(index_shard(tmp_path / "out" / f"0000{n}.tar")) for n in range(2)] == [2, 3]
    assert bkd("data", "check", tmp_path / "out")[0] == 0
    first = files(tmp_path / "out")
    assert bkd("data", "pack", tmp_path / "in", "-o", tmp_path / "out", "--per-shard", "3")[0] == 0
    assert files(tmp_path / "out") == first


def test_cache_train_and_refusals_of_other_latents(bkd, bkd_refuses, shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("cached") / "latents"
    code, printed = bkd("data", "cache", shards[0].parent, "--teacher", "shapes", "-o", out)
    assert code == 0 and "96 samples in 2 shards, 32 px, float16" in printed
    assert "96 samples in 2 shards" in bkd("data", "check", out)[1]
    found = json.loads(bkd("data", "check", out, "--json")[1])
    assert (found["samples"], found["shards"], found["settings"]["resolution"]) == (96, 2, 32)
    assert "data: 96 samples" in bkd("train", "shapes/sd-small", f"data.shards={out}", "--dry-run")[1]
    train = ["train", "shapes/sd-small", f"data.shards={out}"]
    bkd_refuses([*train, "data.mirror=true"], "mirrored: False")
    bkd_refuses([*train, "data.caption=json:caption"], "caption: txt\n  allowed: caption: json:caption")
    bkd_refuses(
        ["data", "cache", out, "--teacher", "shapes", "-o", "x"], "these shards hold cached latents, not images"
    )
    code, printed = bkd("data", "cache", shards[0], "--teacher", "shapes", "-o", out)
    assert code == 1 and "the output folder holds another data set" in printed
    code, printed = bkd("data", "cache", shards[0].parent, "--teacher", "shapes", "-o", out, "--resolution", "64")
    assert code == 1 and "got: resolution: 32" in printed and "allowed: resolution: 64" in printed
    (out / "00001_stats.json").unlink()
    bkd_refuses(train, "this data set has not been written to its end\n  got: 1 of 2 shards; 00001.tar is missing")
    facts = json.loads((out / "bkd_dataset.json").read_text())
    (out / "bkd_dataset.json").write_text(json.dumps({**facts, "vae": "0" * 64}))
    bkd_refuses(train, "is damaged or of another version of bkd")


def test_latents_of_another_autoencoder_are_refused(teacher, shards, tmp_path, bkd, bkd_refuses, teacher_folder):
    other = shutil.copytree(teacher_folder, tmp_path / "teacher")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    changed = {name: tensor * 1.001 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    out = tmp_path / "latents"
    assert bkd("data", "cache", shards[0].parent, "--teacher", other, "-o", out)[0] == 0
    code, printed = bkd("train", "shapes/sd-small", f"data.shards={out}", "-o", tmp_path / "run")
    assert code == 1 and "these latents were cached with other settings" in printed and "got: vae: " in printed
    assert not (tmp_path / "run").exists()


def test_caching_after_a_kill_and_on_two_processes_gives_the_same_bytes(bkd, five_shards, tmp_path, cache):
    arguments = ["data", "cache", five_shards, "--teacher", "shapes", "-o"]
    with alone(*arguments, tmp_path / "whole") as running:
        assert running.wait(120) == 0
    whole = files(tmp_path / "whole")
    assert len(whole) == 11
    with alone(*arguments, tmp_path / "killed") as running:
        until = time.monotonic() + 60
        while not list((tmp_path / "killed").glob("*.tar")) and time.monotonic() < until:
            time.sleep(0.001)
        running.send_signal(signal.SIGKILL)
        running.wait(60)
    assert 1 <= len(list((tmp_path / "killed").glob("*.tar"))) < 5
    with alone(*arguments, tmp_path / "killed") as running:
        assert running.wait(120) == 0
    assert files(tmp_path / "killed") == whole
    launch(*arguments, tmp_path / "two")
    assert files(tmp_path / "two") == whole


def test_drawn_shards_are_the_same_whoever_draws_them(bkd, tmp_path, cache):
    prompts = tmp_path / "prompts.txt"
    captions = [drawn.caption for drawn in scenes("test", 7)]
    prompts.write_text("\n".join(captions) + "\n\n")
    arguments = [
        "data",
        "generate",
        "shapes",
        "--prompts",
        prompts,
        "--num-inference-steps",
        "2",
        "--per-shard",
        "3",
        "-o",
    ]
    with alone(*arguments, tmp_path / "one") as running:
        assert running.wait(120) == 0
    one = files(tmp_path / "one")
    launch(*arguments, tmp_path / "two")
    assert files(tmp_path / "two") == one
    samples = [s for n in range(3) for s in index_shard(tmp_path / "one" / f"0000{n}.tar").samples()]
    assert [s.read("txt").decode() for s in samples] == captions
    assert json.loads(samples[5].read("json"))["image_number"] == 5 and samples[0].image_extension in IMAGE_EXTENSIONS
    (tmp_path / "one" / "00001_stats.json").unlink()  # as after a kill
    code, printed = bkd("data", "check", tmp_path / "one")
    assert code == 1 and "run the same `bkd data generate` again" in printed
    with alone(*arguments, tmp_path / "one") as running:
        assert running.wait(120) == 0
    assert files(tmp_path / "one") == one


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file of prompts"), (b"\n \n", "holds no prompt"), (b"a\ncaf\xe9\n", "other bytes in line 2")],
)
def test_prompts_that_cannot_be_read_are_refused(bkd, tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    code, printed = bkd("data", "generate", "shapes", "--prompts", tmp_path / "p.txt", "-o", tmp_path / "out")
    assert code == 1 and message in printed and not (tmp_path / "out").exists()


def test_mirrored_latents_are_those_of_mirrored_images_and_never_where_sides_are_named(
    teacher, teacher_folder, tmp_path
):
    captions = ["a circle at the top", "a circle on the left", "a red square", "turn RIGHT here"]
    images = [encoded(color=(n * 60, 0, 0)) for n in range(4)]
    write_shards(
        [NewSample(image=i, extension="png", caption=c) for i, c in zip(images, captions, strict=True)], tmp_path / "in"
    )
    wish = DataWish(CaptionSource(), (), tmp_path)
    caching = plan_caching(str(tmp_path / "in"), teacher_folder, wish, resolution=32, mirrored=True)
    ensure_latents(caching, lambda: teacher)
    data = read_latents(caching)
    index = index_shard(data.shards[0].path)
    assert index.has("mirrored.npy").tolist() == [True, False, True, False]
    plain = data.gather(np.arange(4)).moments
    flipped = data.gather(np.arange(4), mirror=[True] * 4).moments
    assert torch.equal(plain[[1, 3]], flipped[[1, 3]])
    pixels = torch.stack([decode_image(image, 32).pixels.flip(-1) for image in images])
    with torch.no_grad():
        posterior = teacher.vae.encode(to_model_range(pixels)).latent_dist
    expected_moments = torch.cat([posterior.mean, posterior.std], 1)
    assert torch.allclose(flipped[[0, 2]], expected_moments[[0, 2]], atol=5e-3)


def test_sdxl_latents_have_both_tokenizers_and_the_sizes(bkd, family_folders, shards, tmp_path):
    arguments = ["--teacher", family_folders["sdxl"], "-o", tmp_path / "xl", "--resolution", "16"]
    assert bkd("data", "cache", shards[1], *arguments)[0] == 0
    batch = LatentSet(open_latents(tmp_path / "xl"), tmp_path).gather(np.arange(3))
    assert batch.captions.token_ids.shape == batch.captions.token_ids_2.shape and batch.moments.shape[-2:] == (4, 4)
    assert batch.sizes.tolist() == [[32, 32, 0, 0, 16, 16]] * 3


def test_a_resolution_that_the_autoencoder_cannot_take_is_refused(bkd_refuses, shards):
    arguments = ["data", "cache", shards[0], "--teacher", "shapes", "-o", "out", "--resolution", "30"]
    bkd_refuses(arguments, "got: 30 px\n  allowed: a multiple of 4\n  try: 32 px")


def test_a_window_of_batches_needs_no_index_of_other_shards(five_shards, teacher, teacher_folder, tmp_path):
    """Memory does not grow with the data set: only the shards in use are known sample by sample."""
    caching = plan_caching(str(five_shards), teacher_folder, DataWish(CaptionSource(), (), tmp_path), resolution=32)
    ensure_latents(caching, lambda: teacher)
    data = read_latents(caching, window=2)
    latent_set._index.cache_clear()
    order = data.order(seed=0)
    for step in range(4):
        data.gather(order.batch(step, 8))
    assert latent_set._index.cache_info().currsize <= 2


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    parts = [share(24, parts=8, part=part) for part in range(8)]
    assert np.concatenate(parts).tolist() == list(range(24)) and {len(part) for part in parts} == {3}
    with pytest.raises(RecipeError, match=r"10 images for 4 parts(.|\n)*train\.batch=12"):
        share(10, parts=4, part=0)
