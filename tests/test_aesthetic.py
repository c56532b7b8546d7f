"""Aesthetic scores come from the right CLIP and head or not at all; shown with a CLIP that is trained here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bkd.data.aesthetic import COLOURS, load_predictor
from bkd.errors import DataError

TINY = "bkd-tiny-quickgelu"
WIDTH = 32
CONFIG = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def changed(**parts):
    return {
        **CONFIG,
        **{name: {**CONFIG[name], **part} if isinstance(part, dict) else part for name, part in parts.items()},
    }


def batch_of(clip, pictures):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(size=clip.visual.image_size), is_train=False)
    return torch.stack([transform(picture) for picture in pictures])


def train(clip):
    """Teach it the colours' names, with some spread."""
    import open_clip

    names = open_clip.get_tokenizer(TINY)([f"a photo of the color {name}" for name in COLOURS])
    plain = batch_of(clip, [Image.new("RGB", (40, 40), colour) for colour in COLOURS.values()])
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    for _ in range(150):
        images = plain + 0.2 * torch.randn(len(plain), 3, 1, 1)
        similarity = clip.encode_image(images, normalize=True) @ clip.encode_text(names, normalize=True).T
        loss = F.cross_entropy(20 * similarity, torch.arange(len(plain)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clip.eval().requires_grad_(False)


def save(state, path):
    state = {name: tensor.clone() for name, tensor in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def save_folder(folder, state, config=CONFIG, preprocess=None, weights="open_clip_model.safetensors"):
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}}))
    save(state, folder / weights)
    return folder


def v2_layers(width=WIDTH):
    sizes = (width, 1024, 128, 64, 16, 1)
    return nn.ModuleDict({str(n): nn.Linear(a, b) for n, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False)})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A CLIP that knows colours, an untrained one, and heads."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    for name, config in ((TINY, CONFIG), ("bkd-tiny-gelu", {**CONFIG, "quick_gelu": False})):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random = open_clip.CLIP(**CONFIG).state_dict()
        clip = open_clip.CLIP(**CONFIG)
        train(clip)
        v1, v2 = nn.Linear(WIDTH, 1), v2_layers()
    for head in (v1, v2["7"]):
        nn.init.constant_(head.bias, 5.0)
    v2_state = {f"layers.{name}": tensor for name, tensor in v2.state_dict().items()}
    return SimpleNamespace(
        clip=clip,
        random=random,
        folder=save_folder(folder / "clip", clip.state_dict()),
        v1=v1.requires_grad_(False),
        v2=v2.requires_grad_(False),
        v1_file=save(v1.state_dict(), folder / "v1.safetensors"),
        v2_file=save(v2_state, folder / "v2.pth"),
        v2_state=v2_state,
    )


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(1)
    sizes = [(40, 40), (64, 33), (20, 50), (32, 32), (31, 90)]
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())
        for width, height in sizes
    ]


def load(tiny, *, clip=None, head=None, architecture=TINY):
    return load_predictor(clip or tiny.folder, head or tiny.v1_file, architecture=architecture)


def expected(tiny, pictures, version):
    features = F.normalize(tiny.clip.encode_image(batch_of(tiny.clip, pictures)), dim=-1)
    for layer in [tiny.v1] if version == "v1" else tiny.v2.values():
        features = layer(features)
    return features.squeeze(1)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_scores_are_the_head_of_normalised_features(tiny, pictures, tmp_path, version, suffix):
    state = tiny.v1.state_dict() if version == "v1" else tiny.v2_state
    predictor = load(tiny, head=save(state, tmp_path / f"head{suffix}"))
    assert predictor.version == version
    scores = torch.tensor(predictor.score(pictures))
    assert torch.allclose(scores, expected(tiny, pictures, version), atol=1e-5)
    assert scores.std() > 1e-4  # the pictures do differ


def test_scores_do_not_depend_on_the_batch(tiny, pictures):
    predictor = load(tiny, head=tiny.v2_file)
    whole = torch.tensor(predictor.score(pictures))
    single = torch.tensor([predictor.score([picture])[0] for picture in pictures])
    assert torch.allclose(whole, single, atol=1e-5)
    assert predictor.score([]) == []
    assert not predictor.clip.training and not any(p.requires_grad for p in predictor.clip.parameters())


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.bin", "clip.pt"])
def test_a_single_weight_file_is_enough(tiny, pictures, tmp_path, name):
    file = save(tiny.clip.state_dict(), tmp_path / name)
    assert load(tiny, clip=file).score(pictures) == load(tiny).score(pictures)


def test_the_digest_follows_both_files(tiny, tmp_path):
    digests = {load(tiny).digest, load(tiny, head=tiny.v2_file).digest}
    state = tiny.clip.state_dict()
    state["logit_scale"] = state["logit_scale"] + 1
    digests.add(load(tiny, clip=save(state, tmp_path / "clip.safetensors")).digest)
    assert len(digests) == 3 and load(tiny).digest in digests and all(len(digest) == 64 for digest in digests)


def test_random_weights_are_refused(tiny, tmp_path):
    file = save(tiny.random, tmp_path / "clip.safetensors")
    with pytest.raises(DataError, match="these CLIP weights do not know colours: random or damaged weights"):
        load(tiny, clip=file)
    damaged = {name: tensor.clone() for name, tensor in tiny.clip.state_dict().items()}
    damaged["visual.proj"][0, 0] = torch.nan
    with pytest.raises(DataError, match="do not know colours"):
        load(tiny, clip=save(damaged, tmp_path / "damaged.safetensors"))


def test_another_activation_is_refused(tiny, tmp_path):
    state = tiny.clip.state_dict()
    without = {name: value for name, value in CONFIG.items() if name != "quick_gelu"}
    for number, config in enumerate((without, changed(quick_gelu=False))):
        with pytest.raises(
            DataError, match=r"another activation than the heads' one\n.*quick_gelu: false, or not said"
        ):
            load(tiny, clip=save_folder(tmp_path / str(number), state, config))
    for name in ("bkd-tiny-gelu", "ViT-L-14", "roberta-ViT-B-32", "ViT-B-16-SigLIP", "hf-hub:a/b", "nothing"):
        with pytest.raises(DataError, match=f"architecture {name}: not an architecture that the heads could belong to"):
            load(tiny, architecture=name)


def test_another_geometry_or_preprocessing_is_refused(tiny, tmp_path):
    state = tiny.clip.state_dict()
    wide = save_folder(tmp_path / "wide", state, changed(text_cfg={"width": 64, "pool_type": "eos"}))
    with pytest.raises(
        DataError, match=r"text_cfg\.width: 64, text_cfg\.pool_type: eos\n.*width: 32, .*pool_type: argmax"
    ):
        load(tiny, clip=wide)
    grey = save_folder(tmp_path / "grey", state, preprocess={"mean": [0.5, 0.5, 0.5], "std": None})
    with pytest.raises(DataError, match=r"preprocess_cfg\.mean: \[0\.5, 0\.5, 0\.5\]"):
        load(tiny, clip=grey)
    with pytest.raises(DataError, match=rf"not the configuration of ViT-L-14-quickgelu\n.*embed_dim: {WIDTH}, "):
        load_predictor(tiny.folder, tiny.v1_file)


def test_weights_that_do_not_fit_are_refused(tiny, tmp_path):
    import open_clip

    larger = open_clip.CLIP(**changed(vision_cfg={"image_size": 64})).state_dict()
    with pytest.raises(DataError, match=r"not the weights of bkd-tiny.*\n.*1 of another shape, the first: visual.pos"):
        load(tiny, clip=save(larger, tmp_path / "larger.safetensors"))
    renamed = {name.replace("ln_final", "ln"): tensor for name, tensor in tiny.clip.state_dict().items()}
    with pytest.raises(DataError, match=r"2 missing, the first: ln_final\.weight; 2 unexpected, the first: ln\.bias"):
        load(tiny, clip=save(renamed, tmp_path / "renamed.safetensors"))


def test_a_folder_must_hold_weights_and_a_configuration(tiny, tmp_path):
    state = tiny.clip.state_dict()
    empty = save_folder(tmp_path / "empty", state)
    (empty / "open_clip_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"a CLIP folder without weights\n.*got: open_clip_config\.json"):
        load(tiny, clip=empty)
    several = save_folder(tmp_path / "several", state, weights="a.safetensors")
    assert load(tiny, clip=several).score([]) == []
    save(state, several / "b.bin")
    with pytest.raises(DataError, match=r"several weight files, and it is not clear which\n.*a\.safetensors, b\.bin"):
        load(tiny, clip=several)
    save(state, several / "open_clip_pytorch_model.bin")
    load(tiny, clip=several)
    for content in (None, "{", "[]", '{"model_cfg": {}}', '{"model_cfg": {"embed_dim": 1, "vision_cfg": {"x": 1}}}'):
        (several / "open_clip_config.json").unlink(missing_ok=True)
        if content is not None:
            (several / "open_clip_config.json").write_text(content)
        with pytest.raises(DataError, match="no configuration of an open_clip model"):
            load(tiny, clip=several)


@pytest.mark.parametrize("name", ["openai", "hf-hub:timm/vit_large_patch14_clip_224.openai", "clip.npz", "gone.bin"])
def test_names_are_never_looked_up(tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("clip.npz").touch()
    with pytest.raises(DataError, match=r"no CLIP weights there\n.*\n.*\n.*names on the Hub are not looked up"):
        load(tiny, clip=Path(name))


@pytest.mark.parametrize("width", [WIDTH // 2, 768])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_head_for_other_features_is_refused(tiny, tmp_path, width, version):
    state = {"weight": torch.zeros(1, width), "bias": torch.zeros(1)}
    if version == "v2":
        state = {f"layers.{name}": tensor for name, tensor in v2_layers(width).state_dict().items()}
    first = rf"weight \[1, {width}\]" if version == "v1" else rf"layers\.0\.weight \[1024, {width}\]"
    with pytest.raises(DataError, match=rf"neither of the two aesthetic heads\n.*{first}(.*\n)+.*\[1, 32\].*\(V2\)"):
        load(tiny, head=save(state, tmp_path / "head.safetensors"))


def test_what_is_no_head_is_refused(tiny, tmp_path):
    file = tmp_path / "head.pth"
    with pytest.raises(DataError, match="no aesthetic head there"):
        load(tiny, head=file)
    for content in (b"", b"<html>", tiny.v2_file.read_bytes()[:-3000]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="weights cannot be read"):
            load(tiny, head=file)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(DataError, match="a weight file must hold named tensors and nothing else"):
        load(tiny, head=file)
    (tmp_path / "head.safetensors").write_bytes(tiny.v1_file.read_bytes()[:-1])
    with pytest.raises(DataError, match="weights cannot be read"):
        load(tiny, head=tmp_path / "head.safetensors")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_nothing(tiny, tmp_path, zipped):
    marker = tmp_path / "was-here"
    for name in ("head.pth", "clip.bin"):
        torch.save({"weight": Touch(marker)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match="weights cannot be read"):
        load(tiny, head=tmp_path / "head.pth")
    with pytest.raises(DataError, match="weights cannot be read"):
        load(tiny, clip=tmp_path / "clip.bin")
    assert not marker.exists()
    torch.load(tmp_path / "head.pth", weights_only=False)
    assert marker.exists()  # it would have


def test_torchscript_is_refused(tiny, tmp_path):
    torch.jit.script(nn.Linear(WIDTH, 1)).save(tmp_path / "clip.pt")
    with pytest.raises(DataError, match=r"a TorchScript archive, which holds code\n.*open_clip_model\.safetensors"):
        load(tiny, clip=tmp_path / "clip.pt")


@pytest.mark.parametrize("bias", [100.0, -6.0, torch.nan])
def test_scores_out_of_range_are_refused(tiny, tmp_path, bias):
    state = {**tiny.v1.state_dict(), "bias": torch.tensor([bias])}
    with pytest.raises(DataError, match=r"head and CLIP do not belong together\n.*\n.*allowed: -5 to 15"):
        load(tiny, head=save(state, tmp_path / "head.safetensors"))


def test_nothing_heavy_loads_with_the_module():
    script = "import sys, bkd.data.aesthetic; sys.exit(bool({'open_clip', 'torchvision'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], env={**os.environ}, check=False).returncode == 0
