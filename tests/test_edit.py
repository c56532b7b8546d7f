"""Editing: an image to its noise, and the noise to another image."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bkd.data.shapes import scene
from bkd.data.shapes_checker import rendered
from bkd.diffusion.few_steps import FewSteps
from bkd.diffusion.grid import Grid
from bkd.edit import Editor
from bkd.edit_plan import Half
from bkd.errors import DataError, ModelError
from bkd.models.load import load_noise_schedule
from bkd.surgery.plan import PLAN_FILE
from bkd.surgery.unet import plan_removal
from tests.test_halving import ddim

SCENE = scene("test", 0)


@pytest.fixture
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "scene.png"
    Image.fromarray(rendered([SCENE])[0].permute(1, 2, 0).numpy()).save(path)
    return path


def half(folder, scale=1.0, steps=4, name="model"):
    return Half(name, folder, scale, steps)


def claimed(folder, target, steps):
    """A copy of a model that says it was halved."""
    made = shutil.copytree(folder, target)
    config = json.loads((folder / "unet" / "config.json").read_text())
    facts = {**json.loads(plan_removal(config, "none").to_json()), "few_steps": steps.facts()}
    (made / PLAN_FILE).write_text(json.dumps(facts))
    return made


def test_what_is_encoded_and_decoded_alike_comes_back(teacher_folder):
    pixels, prompts = rendered([SCENE]), [SCENE.caption]
    editor = Editor(half(teacher_folder, steps=50), half(teacher_folder, steps=50))
    again = editor.decode(editor.encode(pixels, prompts), prompts)
    assert again.shape == pixels.shape and again.dtype == torch.uint8
    assert (again.float() - pixels.float()).square().mean().sqrt() < 10  # of 255; the autoencoder's own error is 3


@pytest.mark.parametrize("steps", [4, 16])
def test_encoding_is_ddim_backwards(teacher, teacher_folder, steps):
    """Step by step in float64, with the network told the noisier end of each step."""
    noise = Editor(half(teacher_folder, steps=steps), half(teacher_folder, steps=steps)).encode(
        rendered([SCENE]), [SCENE.caption]
    )
    grid = Grid.of(load_noise_schedule(teacher_folder), steps)
    embeds = teacher.encode_prompt([SCENE.caption], "cpu", 1, False)[0]
    with torch.no_grad():
        images = rendered([SCENE]).float() / 127.5 - 1
        z = (teacher.vae.encode(images).latent_dist.mean * teacher.vae.config.scaling_factor).double()
        for index in reversed(range(steps)):
            output = teacher.unet(z.float(), grid.timesteps[index], embeds).sample.double()
            levels = [(grid.alphas[k], grid.sigmas[k]) for k in (index + 1, index)]
            z = ddim(z, output, *levels, "v_prediction")
    assert torch.allclose(noise, z.float(), atol=1e-3)


def test_a_distilled_encoder_takes_its_own_steps(teacher_folder, tmp_path, monkeypatch):
    encoder = claimed(teacher_folder, tmp_path / "encoder", FewSteps(2, direction="inversion"))
    decoder = claimed(teacher_folder, tmp_path / "decoder", FewSteps(4))
    editor, counts = Editor(half(encoder, steps=50), half(decoder, steps=50)), []
    for pipe in (editor._encoder, editor._decoder):
        pipe.unet.register_forward_pre_hook(lambda unet, inputs: counts.append(int(inputs[1])))
    noise = editor.encode(rendered([SCENE]), ["one"])
    assert counts == [499, 999]
    editor.decode(noise, ["other"])
    assert counts[2:] == [999, 749, 499, 249]


def test_an_image_is_edited_from_the_command_line(bkd, image, tmp_path):
    output = tmp_path / "edited.png"
    edit = ["edit", image, "--encoder", "shapes", "--from", SCENE.caption, "--num-inference-steps", 4, "-o", output]
    code, printed = bkd(*edit, "--to", SCENE.caption.replace("black", "white").replace("gray", "white"))
    assert code == 0, printed
    with Image.open(output) as edited:
        assert edited.size == (32, 32) and np.asarray(edited).std() > 10
    code, printed = bkd(*edit, "--to", "another")
    assert code == 1 and "the output file exists" in printed
    assert bkd(*edit, "--to", "another", "--overwrite", "--encoder-guidance-scale", 2)[0] == 0


def test_what_cannot_be_edited_is_refused(bkd_refuses, image, tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("models")
    large = folder / "large.png"
    Image.new("RGB", (64, 48)).save(large)
    broken = folder / "broken.png"
    broken.write_bytes(image.read_bytes()[:100])
    text = folder / "text.png"
    text.write_text("no picture")
    drawing = claimed(teacher_folder, folder / "drawing", FewSteps(4))
    encoding = claimed(teacher_folder, folder / "encoding", FewSteps(4, direction="inversion"))
    told = claimed(teacher_folder, folder / "told", FewSteps(4))
    facts = json.loads((told / PLAN_FILE).read_text())
    facts["guidance"] = {"low": 2.0, "high": 5.0, "takes_scale": False}
    (told / PLAN_FILE).write_text(json.dumps(facts))

    def refuses(message, *more, picture=image, encoder="shapes", output="out.png"):
        arguments = ["edit", picture, "--encoder", encoder, "--from", "a", "--to", "b", "-o", output, *more]
        bkd_refuses(arguments, message)

    refuses("got: 64 x 48 px\n  allowed: 32 x 32 px", picture=large)
    refuses(f"{broken}: image cannot be decoded", picture=broken)
    refuses("got: no JPEG, PNG, WEBP\n  allowed: a whole JPEG, PNG or WebP file", picture=text)
    refuses(f"{folder / 'none.png'}: no such image", picture=folder / "none.png")
    refuses("was not trained to encode", encoder=drawing)
    refuses("encodes images, and does not draw", "--decoder", encoding)
    refuses("has not learnt that guidance scale", "--decoder", told, "--decoder-guidance-scale", 8)
    refuses("the output is a .png file", output="out.jpg")
    bkd_refuses(["edit", image, "--encoder", "shapes", "--from", " ", "--to", "b", "-o", "x.png"], "two prompts")
    bkd_refuses(["sample", encoding, "--prompt", "a", "-o", "out"], "encodes images, and does not draw")


def test_a_decoder_of_another_space_or_of_other_levels_is_refused(teacher_folder, tmp_path):
    other = shutil.copytree(teacher_folder, tmp_path / "other")
    weights = next((other / "vae").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"] * 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="another latent space"):
        Editor(half(teacher_folder), half(other)).encode(rendered([SCENE]), ["a"])
    halved = shutil.copytree(teacher_folder, tmp_path / "half")
    weights = next((halved / "vae").glob("*.safetensors"))
    rounded = {name: x.half() for name, x in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})
    Editor(half(teacher_folder), half(halved)).encode(rendered([SCENE]), ["a"])  # the same, rounded
    levels = shutil.copytree(teacher_folder, tmp_path / "levels")
    path = levels / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))
    with pytest.raises(ModelError, match="other noise levels"):
        Editor(half(teacher_folder), half(levels))
    with pytest.raises(DataError, match="another size"):
        Editor(half(teacher_folder), half(teacher_folder)).encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"])
