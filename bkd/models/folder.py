"""Pipeline folders: what one must hold, and what it says, without loading it.

Only safetensors are read; nothing downloaded can run code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bkd.errors import ModelError, SurgeryError
from bkd.surgery.anatomy import read_anatomy

CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "feature_extractor": "preprocessor_config.json",
}
"""The file that each kind of part must have; every other kind has `config.json` and weights."""
REQUIRED_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
SDXL_PARTS = ("text_encoder_2", "tokenizer_2")
USUAL_PROMPT_LENGTH = 77
"""Of CLIP's text encoders."""
SUPPORTED = "Stable Diffusion 1.x and 2.x, their inpainting variants, and SDXL"
WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
"""Names of the weight files that diffusers and transformers load; a repository may hold other variants beside them."""


def check_pipeline_folder(folder: Path, *, weights: bool = True) -> None:
    """Check that a pipeline folder is whole and of a supported kind, before anything is loaded or written.

    Args:
        folder: A local folder.
        weights: Whether the weights must be there, too; configurations are enough to look at a model.

    Raises:
        ModelError: Naming the part and the file that is missing, damaged or not supported.
    """
    index = _read_index(folder)
    if index.get("unet", (None, None))[1] != "UNet2DConditionModel":
        raise ModelError(
            "this pipeline has no UNet that bkd can prune",
            where=folder,
            got=", ".join(f"{part}: {kind}" for part, (_, kind) in index.items() if kind),
            allowed=f"a pipeline with a UNet2DConditionModel: {SUPPORTED}",
        )
    for part, (library, _) in index.items():
        if library is not None:
            _check_part(folder, part, weights)
    config = unet_config(folder)
    _check_kind(folder, config)
    required = REQUIRED_PARTS + (SDXL_PARTS if is_sdxl(config) else ())
    for part in required:
        if index.get(part, (None, None))[0] is None:
            raise ModelError(f"the pipeline has no '{part}'", where=folder, allowed=", ".join(required))


def _check_part(folder: Path, part: str, weights: bool) -> None:
    config = folder / part / CONFIG_FILES.get(re.sub(r"_\d$", "", part), "config.json")
    if not config.is_file():
        raise ModelError(
            f"the pipeline folder lacks its part '{part}'",
            where=folder,
            got=f"no {part}/{config.name}",
            remedy="copy or download the whole pipeline folder",
        )
    read_json(config)
    if weights and config.name == "config.json":
        check_weights(folder / part)


def check_weights(part: Path) -> None:
    """Check that a part's weight files are all there and whole.

    Raises:
        ModelError: Naming what is missing or damaged.
    """
    files = weight_files(part)
    if not files:
        raise ModelError(
            f"the part '{part.name}' has no safetensors weights",
            where=part.parent,
            got=", ".join(sorted(path.name for path in part.iterdir())),
            allowed="model.safetensors or diffusion_pytorch_model.safetensors, whole or in numbered parts; no variants "
            "such as model.fp16.safetensors (rename them), and no .bin or .ckpt: pickled files can run code",
        )
    found = {path.name for path in files}
    indexes = [p for p in part.glob("*.safetensors.index.json") if WEIGHTS.fullmatch(p.name[: -len(".index.json")])]
    missing = {name for index in indexes for name in read_json(index).get("weight_map", {}).values()} - found
    if any("-of-" in name for name in found) and not indexes:
        missing = {"the .safetensors.index.json of the numbered parts"}
    if missing:
        raise ModelError(
            f"the weights of part '{part.name}' are incomplete",
            where=part,
            got=f"missing: {', '.join(sorted(missing))}",
            remedy="download the missing files",
        )
    for path in files:
        try:
            safe_open(path, framework="np")  # reads the header, which knows how long the file must be
        except Exception as error:
            raise ModelError(
                f"the weights of part '{part.name}' are damaged",
                where=path,
                got=error,
                remedy="download the file again",
            ) from error


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Refuse UNets of other families by their configuration."""
    problem = _unsupported(config)
    if problem:
        raise ModelError("this kind of UNet is not supported", where=folder, got=problem, allowed=SUPPORTED)


def _unsupported(config: dict[str, Any]) -> str | None:
    inputs, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
    if config.get("addition_embed_type") not in (None, "text_time"):
        return f"addition_embed_type {config['addition_embed_type']}"
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            return f"{key} {config[key]}"
    if inputs not in (outputs, 2 * outputs + 1):
        return f"{inputs} input channels for {outputs} output channels"
    if not isinstance(config.get("sample_size"), int):
        return f"sample_size {config.get('sample_size')}"
    if not isinstance(config.get("cross_attention_dim"), int):
        return f"cross_attention_dim {config.get('cross_attention_dim')}"
    try:
        read_anatomy(config)
    except SurgeryError as error:
        return f"{error.what} {error.got}"
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return f"a configuration that cannot be read ({type(error).__name__}: {error})"
    return None


def is_sdxl(config: Mapping[str, Any]) -> bool:
    """Whether a UNet takes SDXL's size conditioning and pooled prompt embedding."""
    return config.get("addition_embed_type") == "text_time"


def is_inpainting(config: Mapping[str, Any]) -> bool:
    """Whether a UNet takes a mask and a masked image beside the latents."""
    return bool(config.get("in_channels", 4) != config.get("out_channels", 4))


ORIGINS = ("_name_or_path", "name_or_path")
"""Keys of configurations that hold the folder they were loaded from, which is nobody else's business."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        ModelError: If it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path.name} cannot be read", where=path, got=error) from None
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} cannot be read", where=path, got=type(found).__name__, allowed="a JSON object")
    return found


def weight_files(part: Path) -> list[Path]:
    """The weight files of one part of a pipeline folder that a plain `from_pretrained` reads."""
    return sorted(path for path in part.iterdir() if WEIGHTS.fullmatch(path.name))


def _read_index(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    path = folder / "model_index.json"
    if not path.is_file():
        part = folder / "config.json"
        kind = read_json(part).get("_class_name", "a single part") if part.is_file() else "no model_index.json"
        raise ModelError(
            "not a diffusers pipeline folder",
            where=folder,
            got=kind,
            remedy="name the folder that holds model_index.json and every part: unet, vae, text_encoder, …",
        )
    index = read_json(path)
    return {part: (entry[0], entry[1]) for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2}


def parts_of(folder: Path) -> list[str]:
    """Names of the parts that the folder really has, in the order of its index."""
    return [part for part, (library, _) in _read_index(folder).items() if library is not None]


def unet_config(folder: Path) -> dict[str, Any]:
    """The UNet's configuration as it lies on disk."""
    return read_json(folder / "unet" / "config.json")


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration as it lies on disk."""
    return read_json(folder / "scheduler" / "scheduler_config.json")


def native_resolution(folder: Path) -> int:
    """Image side, in pixels, that the model was trained for.

    Raises:
        ModelError: As for `vae_factor`.
    """
    return int(unet_config(folder)["sample_size"]) * vae_factor(folder)


def vae_factor(folder: Path) -> int:
    """Pixels for each latent, along a side.

    Raises:
        ModelError: If the autoencoder is of another kind, or its configuration cannot be read.
    """
    path = folder / "vae" / "config.json"
    config = read_json(path)
    if "block_out_channels" not in config:
        raise ModelError(
            "this autoencoder is of another kind than Stable Diffusion's",
            where=path,
            got=config.get("_class_name"),
            allowed="AutoencoderKL",
            remedy="the model with its original autoencoder; another one can be put into a pipeline that draws",
        )
    return int(2 ** (len(config["block_out_channels"]) - 1))


def prompt_length(folder: Path) -> int:
    """Tokens of a padded prompt: the length of the UNet's prompt embedding."""
    return int(read_json(folder / "text_encoder" / "config.json").get("max_position_embeddings", USUAL_PROMPT_LENGTH))


def model_digest(folder: Path, parts: Sequence[str] | None = None) -> str:
    """SHA-256 of everything that a plain load of some parts reads: a name that no path or branch can change.

    Args:
        folder: Pipeline folder.
        parts: Which parts; all of them when not given.
    """
    digest = hashlib.sha256()
    for part in sorted(parts or parts_of(folder)):
        used = {*weight_files(folder / part), *(p for p in (folder / part).iterdir() if p.suffix in (".json", ".txt"))}
        for path in sorted(used):
            digest.update(f"{part}/{path.name}/{path.stat().st_size}/".encode())
            with path.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()
