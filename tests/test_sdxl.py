"""SDXL's two text encoders, its pooled embedding and its sizes reach the UNet as its own pipeline would give them."""

import numpy as np
import pytest
import torch

from bkd.data.caching import ensure_latents, plan_caching, read_latents
from bkd.data.captions import CaptionSource
from bkd.data.survey import DataWish
from bkd.methods.captions import caption_encoder
from bkd.models.load import load_pipeline


@pytest.fixture(scope="module")
def pipe(family_folders):
    return load_pipeline(family_folders["sdxl"])


@pytest.fixture(scope="module")
def cached(pipe, family_folders, shards, tmp_path_factory):
    wish = DataWish(CaptionSource(), (), tmp_path_factory.mktemp("xl"))
    caching = plan_caching(str(shards[1]), family_folders["sdxl"], wish, resolution=32)
    ensure_latents(caching, lambda: pipe)
    captions = [sample.read("txt").decode() for sample in wish.select(shards[1]).index.samples()]
    return read_latents(caching).gather(np.arange(4)), captions[:4]


@pytest.mark.parametrize("zeros", [True, False])
def test_captions_are_encoded_as_the_pipeline_does(pipe, cached, zeros):
    batch, captions = cached
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    dropped = torch.tensor([False, True, False, True])
    found = caption_encoder(pipe)(batch.captions, dropped, batch.sizes)
    kept = pipe.encode_prompt(captions, num_images_per_prompt=1, do_classifier_free_guidance=True, device="cpu")
    plain, empty, pooled, empty_pooled = kept
    expected = torch.where(dropped[:, None, None], empty, plain)
    assert torch.allclose(found.prompt_embeds, expected, atol=1e-6)
    assert torch.allclose(found.added["text_embeds"], torch.where(dropped[:, None], empty_pooled, pooled), atol=1e-6)
    assert found.added["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 4
    assert bool((empty == 0).all()) == zeros


def test_an_sdxl_student_is_distilled(bkd, family_folders, shards, tmp_path):
    arguments = ["train.max_steps=2", "train.batch=4", "stages.0.student.blocks=sd-small", "-o", tmp_path / "run"]
    teacher = f"teacher.id={family_folders['sdxl']}"
    code, printed = bkd("train", "shapes/sd-small", teacher, f"data.shards={shards[1]}", *arguments)
    assert code == 0, printed
    assert "student_of" in bkd("inspect", tmp_path / "run", "--json")[1]


@pytest.mark.parametrize("lora", ["null", "{r: 4}"])
def test_an_sdxl_students_guidance_is_distilled(bkd, family_folders, shards, tmp_path, monkeypatch, lora):
    overrides = ["train.max_steps=2", "train.batch=4", f"stages.0.lora={lora}", "samples.num_inference_steps=2"]
    data = [f"teacher.id={family_folders['sdxl']}", f"data.shards={shards[1]}"]
    code, printed = bkd("train", "shapes/guided", *data, *overrides, "-o", tmp_path / "run")
    assert code == 0, printed
    student, counts = load_pipeline(tmp_path / "run" / "student"), []
    real = student.unet.forward
    monkeypatch.setattr(
        student.unet, "forward", lambda x, *args, **more: counts.append(len(x)) or real(x, *args, **more)
    )
    student("a picture", num_inference_steps=2, guidance_scale=5.0, output_type="latent")
    assert counts == [1, 1]
