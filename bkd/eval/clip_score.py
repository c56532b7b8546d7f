"""CLIP score: mean cosine between images and their prompts, by open_clip, from files on this machine.

Hessel et al. 2021, arXiv:2104.08718; given as the plain cosine, as BK-SDM does, not times 2.5 or 100.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bkd.data.weight_files import CONFIG_FILE, find_clip_weights, read_tensors
from bkd.errors import DataError, suggest
from bkd.files import file_digest

BATCH = 50
"""Pairs in one pass; always the same, so that scores are too."""
BKSDM_CLIP = "ViT-g-14"
EXAMPLE = "open_clip_model.safetensors and open_clip_config.json of laion/CLIP-ViT-g-14-laion2B-s34B-b88K"


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """A CLIP model, and what its scores depend on.

    Attributes:
        model: open_clip's, frozen, float32, in eval mode.
        preprocess: Of one picture.
        tokenize: Of texts; long ones are cut, the end token kept.
        name: Of the folder or architecture.
        digest: SHA-256 of the weight file.
        device: Where it computes.
    """

    model: Any
    preprocess: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    name: str
    digest: str
    device: torch.device | str

    def to(self, device: torch.device) -> ClipScorer:
        """The same on another device."""
        return replace(self, model=self.model.to(device), device=device)

    @torch.inference_mode()
    def scores(self, pixels: Iterable[Tensor], prompts: Sequence[str]) -> list[float]:
        """Cosine of each image and its prompt, -1..1.

        Args:
            pixels: Images (3, H, W), uint8.
            prompts: As many texts.
        """
        found: list[float] = []
        pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels)
        for start in range(0, len(prompts), BATCH):
            images = torch.stack([self.preprocess(picture) for picture in islice(pictures, BATCH)]).to(self.device)
            texts = self.tokenize(list(prompts[start : start + BATCH])).to(self.device)
            image_features = self.model.encode_image(images, normalize=True)
            text_features = self.model.encode_text(texts, normalize=True)
            found += (image_features.double() * text_features.double()).sum(-1).tolist()
        return found


def load_clip(clip: Path, *, architecture: str | None = None) -> ClipScorer:
    """Load a CLIP model, on the CPU; nothing is ever downloaded, and nothing is ever random.

    Args:
        clip: Folder with `open_clip_config.json` and weights, or a weight file.
        architecture: open_clip's name for what a weight file holds; a folder says it itself.

    Raises:
        DataError: If there are no weights, or they are of another architecture.
    """
    import open_clip

    weights = find_clip_weights(clip, example=EXAMPLE)
    if clip.is_dir():
        if architecture is not None:
            raise DataError("a CLIP folder says its architecture itself", where=clip, remedy="no --clip-architecture")
        _check_config(_folder_config(clip / CONFIG_FILE), clip / CONFIG_FILE)
        name = f"local-dir:{clip.absolute()}"
    elif architecture in open_clip.list_models():
        name = str(architecture)
        _check_config(open_clip.get_model_config(name) or {}, name)
    else:
        near = suggest(architecture, open_clip.list_models()) if architecture else ""
        unknown = f"unknown architecture '{architecture}'{near}"
        raise DataError(
            unknown if architecture else "a weight file does not say its architecture",
            where=clip,
            allowed=f"a name of open_clip, such as {BKSDM_CLIP} or ViT-L-14-quickgelu (OpenAI's weights)",
            remedy=f"--clip-architecture NAME, or give the folder that holds {CONFIG_FILE}, too",
        )
    read_tensors(weights)  # for what open_clip would not say in a sentence
    try:
        pretrained = {} if clip.is_dir() else {"pretrained": str(weights.absolute())}
        model, preprocess = open_clip.create_model_from_pretrained(name, precision="fp32", **pretrained)
    except Exception as error:  # missing and unexpected tensors, other shapes, unknown keys of the configuration
        reason = (str(error).strip() or type(error).__name__).splitlines()[:2]
        raise DataError(
            "these weights do not fit the CLIP they are said to be", where=clip, got=" ".join(reason)[:300]
        ) from error
    label = clip.name if clip.is_dir() else f"{architecture}, {clip.name}"
    tokenizer = open_clip.get_tokenizer(name)
    return ClipScorer(model.eval().requires_grad_(False), preprocess, tokenizer, label, file_digest(weights), "cpu")


def clip_digest(clip: Path) -> str:
    """SHA-256 of the weights, and of the configuration beside them.

    Raises:
        DataError: If there are no weights, or more than one file of them.
    """
    digests = [file_digest(find_clip_weights(clip, example=EXAMPLE))]
    if (config := clip / CONFIG_FILE).is_file():
        digests.append(file_digest(config))
    return "/".join(digests)


def _folder_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))["model_cfg"]
        return {**config, "text_cfg": dict(config["text_cfg"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("no configuration of an open_clip model", where=file, got=repr(error)) from None


def _check_config(config: Mapping[str, Any], where: object) -> None:
    text = config.get("text_cfg", {})
    if hub := sorted(key for key in text if key.startswith("hf_") and text[key]):
        raise DataError(
            "this CLIP takes its text encoder or tokenizer from the Hub",
            where=where,
            got=", ".join(f"{key}: {text[key]}" for key in hub),
            allowed="a CLIP with open_clip's own text tower",
            remedy=EXAMPLE,
        )
