"""`bkd eval` from the command line: what it writes, continues, skips and refuses."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bkd.data.prompts import read_prompts
from bkd.data.shapes import scenes
from bkd.data.shapes_checker import rendered
from bkd.errors import DataError
from bkd.eval import shown
from bkd.eval.drawing import Drawing
from bkd.eval.fidelity import FeatureStatistics
from bkd.eval.images import ImageFolder, Saving, read_pixels
from bkd.eval.inception import Inception
from bkd.eval.prompts_suite import PromptsScorer
from bkd.eval.protocols import Wish, plan_drawing, plan_suite
from bkd.eval.reference import Reference
from bkd.recipe.load import dump_recipe, load_recipe
from bkd.report.measurements import measurements
from bkd.runs.lock import LOCK_FILE
from tests.test_clip_score import write_clip

FAST = ("--num-inference-steps", 1)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """FID's InceptionV3 with random weights: the layers are real, the figures mean nothing."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Layers(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            return None

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Layers("random", ["2048"], path).state_dict(), path)
    return path


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(scene.caption for scene in scenes("test", 20)))
    return path


def report_of(folder, suite):
    return json.loads((folder / f"{suite}.json").read_text())


def tiny_inception():
    torch.manual_seed(0)
    body = nn.Sequential(nn.AvgPool2d(75), nn.Flatten(), nn.Linear(27, 12))
    return Inception(body.requires_grad_(False), torch.randn(20, 12), "no digest")


def drawn(root, name, pixels):
    folder = ImageFolder(root, name, {"of": name}, Saving(), len(pixels))
    for number, image in enumerate(pixels):
        folder.add(number, image)
    return folder


def renders(count, split="test"):
    return rendered(scenes(split, count))


def test_every_figure_says_what_it_depends_on(bkd, tmp_path):
    out = tmp_path / "out"
    code, printed = bkd("eval", "shapes", "--num-prompts", 72, *FAST, "-o", out)
    assert code == 0 and "shapes-FID" in printed
    report = report_of(out, "shapes")
    assert report["settings"]["drawing"] == {
        "num_inference_steps": 1,
        "guidance_scale": 3.0,
        "seed": 0,
        "rng": "per-image",
    }
    assert report["settings"]["extractor"] == "shapes-features-v1" and report["environment"]["versions"]["torch"]
    model = report["models"][0]
    assert model["sampler"]["_class_name"] == "DDIMScheduler"
    for split in ("test", "novel"):
        found = model["splits"][split]
        parts = found["by_objects"]
        assert found["accuracy"]["total"] == 72 == parts["one"]["total"] + parts["two"]["total"]
        assert set(found["attributes"]) >= {"shape", "color", "size", "position", "background", "count"}
        distance = found["shapes_fid"]
        assert distance["low"] < distance["value"] < distance["high"] and distance["num_images"] == 72
        assert "too few" in distance["bias"]["skipped"]


def test_what_was_drawn_is_found_again(bkd, tmp_path):
    out = tmp_path / "out"
    arguments = ("eval", "shapes", "--num-prompts", 30, "--split", "test", *FAST, "-o", out)
    assert bkd(*arguments)[0] == 0
    report = (out / "shapes.json").read_bytes()
    (out / "shapes.json").unlink()
    images = sorted((out / "images").glob("*/*.png"))
    kept = {path: path.read_bytes() for path in images}
    assert len(images) == 30
    for path in images[5:12]:
        path.unlink()
    code, printed = bkd(*arguments)
    assert code == 0 and "drawing 7 of 30 prompts" in printed
    assert (out / "shapes.json").read_bytes() == report
    assert {path: path.read_bytes() for path in images} == kept
    assert "already measured" in bkd(*arguments)[1]


def test_a_report_of_an_older_version_is_made_again_of_the_same_images(bkd, tmp_path):
    out = tmp_path / "out"
    arguments = ("eval", "shapes", "--num-prompts", 3, "--split", "test", *FAST, "-o", out)
    assert bkd(*arguments)[0] == 0
    before = report_of(out, "shapes")
    rows = [{key: value for key, value in row.items() if key != "num_inference_steps"} for row in before["models"]]
    older = {**before, "models": rows}
    (out / "shapes.json").write_text(json.dumps(older))
    code, printed = bkd(*arguments)
    assert code == 0 and "drawing" not in printed and report_of(out, "shapes") == before


def test_other_settings_need_overwrite_and_take_old_images_away(bkd, tmp_path):
    out = tmp_path / "out"
    arguments = ("eval", "shapes", "--num-prompts", 3, *FAST, "-o", out)
    assert bkd(*arguments)[0] == 0
    before = report_of(out, "shapes")
    code, printed = bkd(*arguments, "--seed", 1)
    assert code == 1 and "'seed': 0" in printed and "'seed': 1" in printed and "--overwrite" in printed
    assert report_of(out, "shapes") == before
    assert bkd(*arguments, "--seed", 1, "--overwrite")[0] == 0
    assert len(list((out / "images").iterdir())) == 1 and report_of(out, "shapes") != before


def test_two_processes_measure_what_one_does(bkd, tmp_path, cache):
    arguments = ["eval", "shapes", "--num-prompts", "40", "--num-inference-steps", "1"]
    assert bkd(*arguments, "-o", tmp_path / "one")[0] == 0
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_cpu_threads_per_process", str(torch.get_num_threads()), "-m", "bkd", *arguments]
    run = subprocess.run(
        [*command, "-o", str(tmp_path / "two")], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    one, two = (report_of(tmp_path / name, "shapes") for name in ("one", "two"))
    assert one["models"] == two["models"] and one["images"] == two["images"]
    for first in sorted((tmp_path / "one" / "images").glob("*/*")):
        assert first.read_bytes() == (tmp_path / "two" / first.relative_to(tmp_path / "one")).read_bytes()
    assert run.stdout.count("report:") == 1


def test_a_suite_of_prompts_from_end_to_end(bkd, tmp_path, prompts_file, inception_file):
    out, clip = tmp_path / "out", write_clip(tmp_path / "clip")
    real = tmp_path / "real"
    real.mkdir()
    for number, image in enumerate(renders(4, "train")):
        Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L").save(real / f"{number}.png")  # grayscale
    arguments = ("eval", "shapes", "--suite", "prompts", "--prompts", prompts_file, *FAST, "--clip", clip)
    code, printed = bkd(*arguments, "--inception", inception_file, "--reference", real, "-o", out)
    assert code == 0 and "FID skipped: 4 reference images are too few for a covariance" in printed
    model = report_of(out, "prompts")["models"][0]
    assert "KID" in printed and "subsets of 1,000" in model["kid"]["skipped"]
    assert model["inception_score"]["value"] >= 1 and "OTHER WEIGHTS" in model["inception_score"]["extractor"]
    assert -1 <= model["clip_score"]["low"] <= model["clip_score"]["value"] <= model["clip_score"]["high"] <= 1
    assert model["fid"]["resize"] == "pytorch-fid" and model["kid"]["resize"] == "torch-fidelity"
    assert "compared with" in model["closeness"]["skipped"]
    against = f"reference {model['fid']['reference'][:12]}; {model['fid']['extractor']}; CLIP clip "
    (found,) = measurements([report_of(out, "prompts")])
    assert against in " ".join(printed.split()) and against in found.conditions
    assert found.skipped[0] == "FID: 4 reference images are too few for a covariance"


def test_what_is_not_given_is_skipped_with_what_to_give(bkd, tmp_path, prompts_file):
    out = tmp_path / "out"
    code, printed = bkd("eval", "shapes", "--suite", "prompts", "--prompts", prompts_file, *FAST, "-o", out)
    model = report_of(out, "prompts")["models"][0]
    assert code == 0 and "CLIP score skipped: no CLIP: --clip FOLDER" in printed
    assert all("skipped" in model[name] for name in ("fid", "kid", "inception_score", "clip_score"))


def test_published_statistics_and_their_images_give_the_same_fid(tmp_path, monkeypatch):
    """And closeness, KID and IS beside it, on features of a network small enough to have enough images."""
    monkeypatch.setattr("bkd.eval.fidelity.KID_SUBSET_SIZE", 100)
    real, ours, theirs = renders(150, "train"), renders(160), renders(160)
    theirs[:, :, :4] = 0
    inception, files = tiny_inception(), []
    for number, image in enumerate(real):
        files.append(tmp_path / f"{number:04d}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(files[-1])
    statistics = FeatureStatistics.of(inception.features([real], "pytorch-fid"))
    np.savez(tmp_path / "real.npz", mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    folders = [drawn(tmp_path / "drawn", name, pixels) for name, pixels in (("ours", ours), ("theirs", theirs))]

    def score(reference):
        return PromptsScorer([""] * 160, reference, inception, None).score(folders, lambda text: None)

    images = score(Reference(tmp_path, tuple(files), 32, "digest"))
    published = score(Reference(tmp_path / "real.npz", (), 32, "digest"))
    for by_images, by_statistics in zip(images, published, strict=True):
        assert by_images["fid"]["value"] == pytest.approx(by_statistics["fid"]["value"], rel=1e-5)
        assert by_images["kid"]["low"] < by_images["kid"]["value"] < by_images["kid"]["high"]
        assert "statistics alone" in by_statistics["kid"]["skipped"]
    assert images[1]["fid"]["value"] > 2 * images[0]["fid"]["value"]
    assert 0 < images[1]["closeness"]["ssim"]["value"] < 1 and images[1]["closeness"]["psnr_db"]["value"] < 60


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("nowhere", lambda p: None, "no reference images or statistics there"),
        ("empty", lambda p: p.mkdir(), "a reference folder without images"),
        ("gone.npz", lambda p: None, "no such file of reference statistics"),
        ("small.npz", lambda p: np.savez(p, mu=np.zeros(64), sigma=np.eye(64)), "got: 64 features"),
        ("wide", lambda p: save_image(p / "a.png", (32, 48)), "1 of 1 images: 1 of 32 x 48"),
        ("text", lambda p: save_text(p / "a.png"), "image cannot be read"),
        ("cut", lambda p: save_half_an_image(p / "a.png"), "image cannot be read"),
    ],
)
def test_references_that_cannot_be_used_are_refused(bkd, tmp_path, prompts_file, inception_file, name, make, message):
    make(tmp_path / name)
    out = tmp_path / "out"
    arguments = ("eval", "shapes", "--suite", "prompts", "--prompts", prompts_file, "-o", out)
    code, printed = bkd(*arguments, "--reference", tmp_path / name, "--inception", inception_file)
    assert code == 1 and message in printed and "Traceback" not in printed and not out.exists()


def save_image(path, size):
    path.parent.mkdir()
    Image.new("RGB", size).save(path)


def save_half_an_image(path):
    path.parent.mkdir()
    Image.effect_noise((32, 32), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])


def save_text(path):
    path.parent.mkdir()
    path.write_text("not an image")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "coco30k"), "suite coco30k needs its prompts"),
        (("--reference", "x"), "suite shapes does not take --reference"),
        (("--suite", "prompts", "--prompts", "P", "--split", "test"), "suite prompts does not take --split"),
        (("--suite", "coco30k", "--prompts", "P", "--resize", "64"), "coco30k resizes to 256 px by itself"),
        (("--suite", "prompts", "--prompts", "P", "--reference", "."), "a reference is compared by InceptionV3"),
        (("--suite", "prompts", "--prompts", "P", "--clip", "."), "a CLIP folder without weights"),
        (("--suite", "prompts", "--prompts", "P", "--inception", "x"), "no InceptionV3 weights there"),
        (("--suite", "prompts", "--prompts", "P", "--inception", "P"), "weights cannot be read"),
        (("--suite", "prompts", "--prompts", "P", "--clip-architecture", "RN50"), "got: no --clip"),
        (("--suite", "prompts"), "--prompts FILE"),
        (("--rng", "bk"), "unknown rng 'bk'"),
        (("--dtype", "half"), "unknown dtype 'half'"),
        (("--dtype", "float16"), "float16 needs a GPU"),
        (("--split", "tset"), "did you mean 'test'"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(bkd, tmp_path, monkeypatch, prompts_file, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("a.png")  # of the reference "."
    given = [prompts_file if argument == "P" else argument for argument in arguments]
    out = tmp_path / "out"
    code, printed = bkd("eval", "shapes", *given, "-o", out)
    assert code == 1 and message in printed and "Traceback" not in printed and not out.exists()


def unfinished_run(tmp_path, status):
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe("shapes/sd-small")))
    (run / "run.json").write_text(json.dumps({"status": status, "command": "bkd train mine"}))
    return run


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_a_run_that_is_not_finished_is_refused(bkd, tmp_path, status):
    run = unfinished_run(tmp_path, status)
    code, printed = bkd("eval", run)
    assert code == 1 and "this run is not finished" in printed and "bkd train mine" in printed
    assert not (run / "eval").exists()


def test_a_run_that_is_still_training_is_refused(bkd, tmp_path):
    run = unfinished_run(tmp_path, "done")
    holder = {"host": socket.gethostname(), "pid": os.getppid(), "since": "2026-01-01T00:00:00"}
    (run / LOCK_FILE).write_text(json.dumps(holder))
    code, printed = bkd("eval", run)
    assert code == 1 and "another process" in printed and not (run / "eval").exists()


def test_half_of_a_run_is_refused(bkd, tmp_path):
    run = unfinished_run(tmp_path, "done")
    (run / "recipe.yaml").unlink()
    code, printed = bkd("eval", run)
    assert code == 1 and "half of a run" in printed and "student" in printed and not (run / "eval").exists()


def test_one_model_by_two_names_is_refused(bkd, tmp_path, teacher_folder):
    code, printed = bkd("eval", teacher_folder, teacher_folder / ".." / teacher_folder.name, "-o", tmp_path / "out")
    assert code == 1 and "the same model is named twice" in printed and not (tmp_path / "out").exists()


def test_a_student_without_weights_is_refused(bkd, tmp_path, teacher_folder):
    import shutil

    shutil.copytree(teacher_folder, tmp_path / "half")
    next((tmp_path / "half" / "unet").glob("*.safetensors")).unlink()
    code, printed = bkd("eval", tmp_path / "half", "-o", tmp_path / "out")
    assert code == 1 and "has no safetensors weights" in printed and not (tmp_path / "out").exists()


def test_coco30k_is_the_published_protocol(tmp_path):
    file = tmp_path / "metadata.csv"
    file.write_text('file_name,caption\nCOCO_val2014_000000000042.jpg,"This wire rack, with shoes"\nb.jpg,A dog.\n')
    wish = Wish(suite="coco30k", prompts=file, rng="bksdm")
    suite = plan_suite(wish)
    assert suite.prompts() == ["This wire rack, with shoes", "A dog."]
    assert suite.saving == Saving("jpeg", 256)
    assert plan_drawing(wish, "runs/mine") == Drawing(25, 7.5, 1234, "bksdm")
    assert plan_drawing(Wish(suite="coco30k"), "runs/mine") == Drawing(25, 7.5, 0, "per-image")


def test_bksdms_images_are_jpegs_before_and_after_resizing(tmp_path):
    import io

    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    folder = ImageFolder(tmp_path, "m", {}, Saving("jpeg", 32), 1)
    folder.add(0, pixels)
    first, second = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(first, "JPEG")
    Image.open(first).resize((32, 32)).save(second, "JPEG")
    assert (folder.path / "000000.jpg").read_bytes() == second.getvalue()


def test_images_of_any_kind_become_three_channels(tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "gray.png")
    Image.new("RGBA", (8, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_pixels(tmp_path / "gray.png").unique().tolist() == [100]
    assert read_pixels(tmp_path / "clear.png", 8).shape == (3, 8, 8)
    assert read_pixels(tmp_path / "clear.png").unique().tolist() == [255]


def test_prompts_come_from_lines_or_a_column(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\n two \n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("id,text\n1,one\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    (tmp_path / "c.csv").write_text("id,caption\n")
    (tmp_path / "d.csv").write_text("id,caption\n1,\n")
    for name, message in {
        "b.csv": "this CSV has no captions\n *got: id, text",
        "c.csv": "holds no prompt\n *got: a header and no rows",
        "d.csv": "a row of this CSV has no caption",
        ".": "no such file of prompts\n *got: a folder",
    }.items():
        with pytest.raises(DataError, match=message):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("accuracy", "text"), [(None, shown.NONE), (0.976, "97.6%"), (1.001, "100.1%"), (228.5, f"228 {shown.TIMES}")]
)
def test_a_share_of_next_to_nothing_is_shown_as_a_factor(accuracy, text):
    assert shown.relative(accuracy) == text
