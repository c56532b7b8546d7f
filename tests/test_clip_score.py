"""CLIP score with a tiny open_clip model of our own, from the folder to the number."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from bkd.errors import DataError
from bkd.eval.clip_score import load_clip

CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def write_clip(folder):
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    model = open_clip.CLIP(**CONFIG["model_cfg"])
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


def test_the_score_is_the_cosine_of_open_clips_own_features(clip_folder):
    from PIL import Image

    drawn = torch.manual_seed(10)  # with these no cosine is near 0
    pixels = torch.randint(0, 256, (3, 3, 40, 40), generator=drawn, dtype=torch.uint8)
    texts = ["a red circle", "a blue square", "nothing"]
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(texts)
    pictures = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in pixels])
    model.eval()
    with torch.no_grad():
        expected = torch.cosine_similarity(model.encode_image(pictures), model.encode_text(tokens))
    assert load_clip(clip_folder).scores(pixels, texts) == pytest.approx(expected.tolist(), rel=1e-5)


def test_scores_do_not_depend_on_how_many_there_are(clip_folder):
    scorer = load_clip(clip_folder)
    pixels = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    texts = [f"picture {number}" for number in range(60)]
    assert scorer.scores(pixels, texts)[:50] == scorer.scores(pixels[:50], texts[:50])
    assert scorer.digest and scorer.name == "tiny"


def test_a_folder_without_weights_is_never_random(clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(DataError, match="a CLIP folder without weights"):
        load_clip(tmp_path)


def test_missing_tensors_are_never_random(clip_folder, tmp_path):
    write_clip(tmp_path)
    tensors = open_clip.CLIP(**CONFIG["model_cfg"]).state_dict()
    tensors.pop("visual.proj")
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(DataError, match=r"do not fit the CLIP.*\n.*visual.proj"):
        load_clip(tmp_path)


def test_a_weight_file_needs_the_name_of_its_architecture(clip_folder):
    with pytest.raises(DataError, match="--clip-architecture"):
        load_clip(clip_folder / "open_clip_model.safetensors")
    with pytest.raises(DataError, match="did you mean 'RN50"):
        load_clip(clip_folder / "open_clip_model.safetensors", architecture="RN5O")
    with pytest.raises(DataError, match="do not fit the CLIP"):
        load_clip(clip_folder / "open_clip_model.safetensors", architecture="RN50")


def test_parts_on_the_hub_are_refused(clip_folder, tmp_path):
    write_clip(tmp_path)
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "someone/model"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="from the Hub"):
        load_clip(tmp_path)


def test_a_pickle_is_not_run(tmp_path):
    import pickle

    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="weights cannot be read"):
        load_clip(tmp_path)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("code ran",))
