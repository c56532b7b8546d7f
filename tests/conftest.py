"""Offline and on the CPU; what several tests share."""

import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # of a terminal, or of pytest-xdist; output is compared as it goes to a file
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by diffusers; warns about its own options

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from bkd.cli.app import main
from bkd.models.load import load_pipeline
from bkd.models.locate import locate
from tests.remote_server import server  # noqa: F401 - a fixture
from tests.report_runs import many_page  # noqa: F401 - a fixture
from tests.warm_python import WarmPython
from tools.architectures import SD1, SDXL

SD2 = {**SD1, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SMALL = {"sample_size": 8, "cross_attention_dim": 16, "norm_num_groups": 8}
SMALL_SD1 = {**SD1, **SMALL, "block_out_channels": [16, 32, 48, 48], "attention_head_dim": 4}
SMALL_SD2 = {**SD2, **SMALL, "block_out_channels": [16, 32, 48, 48], "attention_head_dim": [2, 4, 6, 6]}
SMALL_SDXL = {
    **SDXL,
    **SMALL,
    "block_out_channels": [16, 32, 48],
    "attention_head_dim": [2, 4, 6],
    "transformer_layers_per_block": [1, 2, 4],
    "cross_attention_dim": 24,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
"""The three topologies at a size where a test can build hundreds."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Latents and shards that tests share; set where the command line looks for them."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["BKD_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    return locate("shapes")


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    """The embedded pipeline, frozen; tests must not change it."""
    torch.manual_seed(0)
    return load_pipeline(teacher_folder)


@pytest.fixture
def bkd(capsys, monkeypatch, cache):
    """Run a command in this process: exit code, and everything it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bkd", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def bkd_refuses(bkd, tmp_path, monkeypatch):
    """Run a command that must end in an error with a message, without a traceback and without writing anything."""

    def refuses(arguments, message):
        monkeypatch.chdir(tmp_path)
        code, printed = bkd(*arguments)
        assert code == 1 and "Traceback" not in printed
        assert message in printed
        assert not list(tmp_path.iterdir())

    return refuses


@pytest.fixture(scope="session", autouse=True)
def warm_python():
    """What is written is proven in forks of one process; tests/test_cli.py and tests/test_dist.py start whole ones."""
    if not hasattr(os, "fork"):
        yield
        return
    python = WarmPython()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bkd.models.proof.subprocess", python)
        yield
    python.close()


@pytest.fixture(scope="session")
def family_folders(teacher, tmp_path_factory):
    """Small pipelines of every supported family, with random UNets: name -> folder."""
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("families")
    text = {**teacher.text_encoder.config.to_dict(), "num_hidden_layers": 1, "num_attention_heads": 2}
    encoders = {
        size: CLIPTextConfig(**{**text, "hidden_size": size, "intermediate_size": 16, "projection_dim": 16})
        for size in (8, 16)
    }
    same = {"vae": teacher.vae, "tokenizer": teacher.tokenizer, "scheduler": teacher.scheduler}
    plain = {**same, "text_encoder": CLIPTextModel(encoders[16]), "safety_checker": None, "feature_extractor": None}
    unets = {"sd1": SMALL_SD1, "sd2": SMALL_SD2, "inpaint": {**SMALL_SD1, "in_channels": 9}, "sdxl": SMALL_SDXL}
    for name, config in unets.items():
        unet = UNet2DConditionModel.from_config(config)
        if name == "sdxl":
            pipe = StableDiffusionXLPipeline(
                **same,
                text_encoder=CLIPTextModel(encoders[8]),
                text_encoder_2=CLIPTextModelWithProjection(encoders[16]),
                tokenizer_2=teacher.tokenizer,
                unet=unet,
            )
        else:
            kind = StableDiffusionInpaintPipeline if name == "inpaint" else StableDiffusionPipeline
            pipe = kind(**plain, unet=unet, requires_safety_checker=False)
        pipe.save_pretrained(root / name)
    return {name: root / name for name in unets}


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Two small shards of the embedded world."""
    from bkd.data.shapes_shards import shapes_samples
    from bkd.data.shards import write_shards

    return write_shards(shapes_samples("train", 96), tmp_path_factory.mktemp("shards"), per_shard=64)
