"""LAION's aesthetic scores: image features of OpenAI's CLIP ViT-L/14 and a small head, from files on this machine.

V1 (LAION-AI/aesthetic-predictor) is one linear layer, V2 (improved-aesthetic-predictor) a chain of five without
anything between them when it predicts. Their scales differ: laion-art's 8 is V1, the 6.5 of "6.5+" is V2.

The heads fit no other CLIP, and a wrong one gives numbers that look right. What can be noticed is refused: other
keys, shapes, activation or preprocessing, weights that do not know colours (random or damaged), scores out of range.
What cannot: the weights of another ViT-L/14 of the same geometry, given as a single file, or in a folder that says
QuickGELU and OpenAI's preprocessing of them; nor a head of the right shapes that was trained for something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bkd.data.weight_files import CONFIG_FILE, WEIGHT_SUFFIXES, find_clip_weights, read_tensors
from bkd.errors import DataError
from bkd.files import file_digest

ARCHITECTURE = "ViT-L-14-quickgelu"
CONVERSION = "open_clip_model.safetensors of timm/vit_large_patch14_clip_224.openai"
V2_LAYERS = (0, 2, 4, 6, 7)
"""Numbers in the names of V2's layers; those between were dropout."""
V2_WIDTHS = (1024, 128, 64, 16, 1)
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (128, 0, 128),
    "pink": (255, 170, 190),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
MIN_KNOWN_COLOURS = 5
"""Of 8. By chance it is one; the best of 330 random models knew four."""
PLAUSIBLE_SCORES = (-5.0, 15.0)
Version = Literal["v1", "v2"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AestheticPredictor:
    """A CLIP and a head that were found to belong together, as far as that can be found.

    Attributes:
        version: Of the head; to be recorded beside its scores, because scales differ.
        digest: SHA-256 over both weight files; to be recorded likewise.
        clip: open_clip's model, frozen, float32, in eval mode.
        preprocess: open_clip's transform of one picture for inference.
        layers: (weight, bias) of the head's linear layers, float32.
        device: Where it computes.
    """

    version: Version
    digest: str
    clip: Any
    preprocess: Callable[[Image.Image], Tensor]
    layers: tuple[tuple[Tensor, Tensor], ...]
    device: str

    def score(self, pixels: Sequence[Image.Image]) -> list[float]:
        """Aesthetic scores of pictures, mostly 0..10, higher is better; computed in one pass.

        Args:
            pixels: RGB pictures of any size, upright; lay transparency on white before.
        """
        if not pixels:
            return []
        with torch.inference_mode():
            features = self.features(pixels)
            for weight, bias in self.layers:
                features = F.linear(features, weight, bias)
        return [float(score) for score in features.squeeze(1)]

    def features(self, pixels: Sequence[Image.Image]) -> Tensor:
        """(B, D), float32: CLIP's image features, of length one, as the heads were trained on."""
        batch = torch.stack([self.preprocess(picture) for picture in pixels]).to(self.device)
        with torch.inference_mode():
            return F.normalize(self.clip.encode_image(batch).float(), dim=-1)


def load_predictor(
    clip: Path, head: Path, *, device: str = "cpu", architecture: str = ARCHITECTURE
) -> AestheticPredictor:
    """Load and check a predictor; nothing is ever downloaded.

    Args:
        clip: Folder with `open_clip_config.json` and weights, or a weight file (`.safetensors`, `.bin`, `.pt`).
        head: V1 or V2, as published (`.pth`) or as `.safetensors`; which of them is seen from its keys and shapes.
        device: Where to compute.
        architecture: open_clip's name for what the weights are; it must use QuickGELU. The published heads need
            the default.

    Raises:
        DataError: If a file is missing, damaged or of another kind, or the two do not give aesthetic scores.
    """
    import open_clip

    config = _architecture(architecture)
    if clip.is_dir():
        _check_config(clip / CONFIG_FILE, architecture, config)
    weights = find_clip_weights(clip, example=CONVERSION)
    version, layers = _load_head(head, int(config["embed_dim"]))
    _check_weights(weights, architecture, config)
    # An absolute path is never mistaken for one of open_clip's tags, which it would download.
    model, preprocess = open_clip.create_model_from_pretrained(
        architecture, pretrained=str(weights.absolute()), precision="fp32", device=device
    )
    predictor = AestheticPredictor(
        version=version,
        digest=hashlib.sha256((file_digest(weights) + file_digest(head)).encode()).hexdigest(),
        clip=model.eval().requires_grad_(False),
        preprocess=preprocess,
        layers=tuple((weight.to(device), bias.to(device)) for weight, bias in layers),
        device=device,
    )
    pictures = [Image.new("RGB", (224, 224), colour) for colour in COLOURS.values()]
    _check_colours(predictor, pictures, architecture, weights)
    _check_scores(predictor, pictures, head)
    return predictor


def _architecture(name: str) -> dict[str, Any]:
    import open_clip

    # Before anything else: open_clip would look for names such as hf-hub:… on the network.
    config = dict(open_clip.get_model_config(name) or {}) if name in open_clip.list_models() else {}
    plain = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    if config.keys() != plain or "hf_" in str(config) or "timm_" in str(config) or config["quick_gelu"] is not True:
        raise DataError(
            "not an architecture that the heads could belong to",
            where=f"architecture {name}",
            allowed=f"a plain CLIP of open_clip with QuickGELU, such as {ARCHITECTURE}",
        )
    return config


def _check_config(file: Path, architecture: str, config: Mapping[str, Any]) -> None:
    """Refuse a folder whose weights are of another geometry, activation or preprocessing."""
    try:
        stored = json.loads(file.read_text("utf-8"))
        found = _described(stored["model_cfg"], stored.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("no configuration of an open_clip model", where=file, got=repr(error)) from error
    if not found["quick_gelu"]:
        raise DataError(
            "this CLIP was trained with another activation than the heads' one",
            where=file,
            got="quick_gelu: false, or not said",
            allowed="quick_gelu: true, as for OpenAI's weights",
            remedy=f"use {CONVERSION}",
        )
    expected = _described(config, {})
    if wrong := [name for name in expected if found[name] != expected[name]]:
        raise DataError(
            f"this is not the configuration of {architecture}",
            where=file,
            got=", ".join(f"{name}: {found[name]}" for name in wrong),
            allowed=", ".join(f"{name}: {expected[name]}" for name in wrong),
        )


def _described(model: Mapping[str, Any], preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says, by dotted name, with open_clip's defaults for what it leaves out."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg

    described = {"embed_dim": model["embed_dim"], "quick_gelu": bool(model.get("quick_gelu", False))}
    described |= {f"vision_cfg.{name}": value for name, value in asdict(CLIPVisionCfg(**model["vision_cfg"])).items()}
    described |= {f"text_cfg.{name}": value for name, value in asdict(CLIPTextCfg(**model["text_cfg"])).items()}
    used = {**asdict(PreprocessCfg()), **{name: value for name, value in preprocess.items() if value is not None}}
    for name in ("mean", "std", "interpolation", "resize_mode"):
        described[f"preprocess_cfg.{name}"] = used[name] if isinstance(used[name], str) else list(used[name])
    return described


def _check_weights(file: Path, architecture: str, config: Mapping[str, Any]) -> None:
    """Compare every tensor's name and shape: open_clip would stretch position embeddings that do not fit."""
    import open_clip

    found = {name: tuple(tensor.shape) for name, tensor in read_tensors(file, remedy=f"use {CONVERSION}").items()}
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in open_clip.CLIP(**config).state_dict().items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in sorted(found) if name not in expected],
        "of another shape": [name for name in expected if name in found and found[name] != expected[name]],
    }
    if any(problems.values()):
        got = (f"{len(names)} {kind}, the first: {names[0]}" for kind, names in problems.items() if names)
        raise DataError(
            f"these are not the weights of {architecture}", where=file, got="; ".join(got), remedy=f"use {CONVERSION}"
        )


def _load_head(file: Path, width: int) -> tuple[Version, list[tuple[Tensor, Tensor]]]:
    """A head's version and its linear layers, for features of this width."""
    if not file.is_file() or file.suffix not in WEIGHT_SUFFIXES:
        raise DataError("no aesthetic head there", where=file, allowed=f"a file ({', '.join(WEIGHT_SUFFIXES)})")
    tensors = read_tensors(file, remedy=f"use {CONVERSION}")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    allowed: dict[Version, dict[str, tuple[int, ...]]] = {"v1": {"weight": (1, width), "bias": (1,)}, "v2": {}}
    for number, (into, out) in zip(V2_LAYERS, pairwise((width, *V2_WIDTHS)), strict=True):
        allowed["v2"] |= {f"layers.{number}.weight": (out, into), f"layers.{number}.bias": (out,)}
    for version, shapes in allowed.items():
        if found == shapes:
            names = [name.removesuffix("weight") for name in shapes if name.endswith("weight")]
            return version, [(tensors[f"{name}weight"].float(), tensors[f"{name}bias"].float()) for name in names]
    raise DataError(
        "neither of the two aesthetic heads",
        where=file,
        got=_listed(found),
        allowed=f"{_listed(allowed['v1'])} (V1); {_listed(allowed['v2'])} (V2)",
    )


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:10]) or "nothing"


def _check_colours(
    predictor: AestheticPredictor, pictures: Sequence[Image.Image], architecture: str, file: Path
) -> None:
    """Plain pictures must be nearest to their own captions: random weights, too, load without an error."""
    import open_clip

    tokens = open_clip.get_tokenizer(architecture)([f"a photo of the color {name}" for name in COLOURS])
    with torch.inference_mode():
        captions = F.normalize(predictor.clip.encode_text(tokens.to(predictor.device)).float(), dim=-1)
        similarity = predictor.features(pictures) @ captions.T
    # A caption that is near to every picture would be nearest to all of them; that part is taken away.
    nearest = (similarity - similarity.mean(dim=0)).argmax(dim=1).tolist()
    known = sum(caption == picture for picture, caption in enumerate(nearest))
    if known < MIN_KNOWN_COLOURS:
        raise DataError(
            "these CLIP weights do not know colours: random or damaged weights",
            where=file,
            got=f"{known} of {len(COLOURS)} plain pictures nearest to their captions",
            allowed=f"at least {MIN_KNOWN_COLOURS}",
            remedy=f"use {CONVERSION}",
        )


def _check_scores(predictor: AestheticPredictor, pictures: Sequence[Image.Image], head: Path) -> None:
    scores = predictor.score(pictures)
    low, high = PLAUSIBLE_SCORES
    if not all(low <= score <= high for score in scores):  # not a number is no score either
        raise DataError(
            "head and CLIP do not belong together",
            where=head,
            got=f"plain pictures score {', '.join(f'{score:.3g}' for score in scores)}",
            allowed=f"{low:g} to {high:g}",
        )
