"""Find, check and load models. Here, and only here, dtype and device are decided.

Every model is, in the end, a stock diffusers pipeline folder on this disk: the embedded one, the user's own, the
student of a run, or a snapshot of a Hub repository. Only safetensors are read; nothing downloaded can run code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from bkd.diffusion import NoiseSchedule, PredictionType
from bkd.errors import ModelError

EMBEDDED = "shapes"
CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "feature_extractor": "preprocessor_config.json",
}
"""The file that each kind of part must have; every other kind has `config.json` and weights."""
REQUIRED_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")
"""Names of the weight files that diffusers and transformers load; a repository may hold other variants beside them."""


def locate(name: str | Path, *, revision: str | None = None) -> Path:
    """The pipeline folder that a MODEL argument means.

    Args:
        name: `shapes`, a pipeline folder, a run folder (its student is meant), or a Hub id `owner/name`.
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        ModelError: If there is no such model, or a part of it is missing.
    """
    if str(name) == EMBEDDED:
        return Path(str(resources.files("bkd") / "assets" / "shapes"))
    folder = Path(name).expanduser()
    if (folder / "run.json").is_file() and not (folder / "model_index.json").is_file():
        if not (folder / "student").is_dir():
            command = _read_json(folder / "run.json").get("command", "bkd train RECIPE -o RUN")
            raise ModelError("this run has no finished student yet", where=folder, remedy=f"finish it: {command}")
        folder = folder / "student"
    if not folder.is_dir():
        folder = _download(str(name), revision)
    check_pipeline_folder(folder)
    return folder


def _download(name: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelError(
            f"no model '{name}'",
            allowed=f"'{EMBEDDED}', a pipeline folder, a run folder, or a Hub id such as owner/name",
        )
    try:
        return Path(DiffusionPipeline.download(name, revision=revision, use_safetensors=True))
    except Exception as error:  # the Hub client raises a dozen kinds; each means that there is no model to work on
        raise ModelError(
            f"cannot get '{name}' from the Hub, and there is no such folder here",
            got=(str(error).strip() or type(error).__name__).splitlines()[0],
            remedy="give another model: --teacher FOLDER-OR-ID (make: TEACHER=FOLDER-OR-ID); "
            "private repositories need `hf auth login`",
        ) from error


def check_pipeline_folder(folder: Path) -> None:
    """Check that a pipeline folder is whole and of a supported kind, before anything is loaded or written.

    Raises:
        ModelError: Naming the part and the file that is missing, damaged or not supported.
    """
    index = _read_index(folder)
    if index.get("unet", (None, None))[1] != "UNet2DConditionModel":
        raise ModelError(
            "this pipeline has no UNet that bkd can prune",
            where=folder,
            got=", ".join(f"{part}: {kind}" for part, (_, kind) in index.items() if kind),
            allowed="a Stable Diffusion pipeline with a UNet2DConditionModel",
        )
    for part in REQUIRED_PARTS:
        if index.get(part, (None, None))[0] is None:
            raise ModelError(f"the pipeline has no '{part}'", where=folder, allowed=", ".join(REQUIRED_PARTS))
    for part, (library, _) in index.items():
        if library is not None:
            _check_part(folder, part)
    _check_kind(folder)


def _check_part(folder: Path, part: str) -> None:
    config = folder / part / CONFIG_FILES.get(part, "config.json")
    if not config.is_file():
        raise ModelError(
            f"the pipeline folder lacks its part '{part}'",
            where=folder,
            got=f"no {part}/{config.name}",
            remedy="copy or download the whole pipeline folder",
        )
    _read_json(config)
    if part in CONFIG_FILES:
        return
    files = weight_files(folder / part)
    if not files:
        raise ModelError(
            f"the part '{part}' has no safetensors weights",
            where=folder,
            got=", ".join(sorted(p.name for p in (folder / part).iterdir())),
            allowed="model.safetensors or diffusion_pytorch_model.safetensors, whole or in numbered parts; "
            "pickled .bin and .ckpt files can run code and are not read",
        )
    for path in files:
        try:
            safe_open(path, framework="pt")  # reads the header, which knows how long the file must be
        except Exception as error:
            raise ModelError(
                f"the weights of part '{part}' are damaged", where=path, got=error, remedy="download the file again"
            ) from error


def _check_kind(folder: Path) -> None:
    """Refuse UNets whose training or pruning is not supported, by their configuration."""
    config = unet_config(folder)
    if config.get("addition_embed_type") is not None:
        raise ModelError("UNets with additional embeddings (SDXL) are not supported", where=folder)
    if config.get("in_channels", 4) != config.get("out_channels", 4):
        raise ModelError(
            "inpainting and other UNets with additional input channels are not supported",
            where=folder,
            got=f"{config['in_channels']} input channels",
        )
    if not isinstance(config.get("sample_size"), int):
        raise ModelError(
            "the UNet's configuration does not say its sample_size", where=folder, got=config.get("sample_size")
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path.name} cannot be read", where=path, got=error) from None


def weight_files(part: Path) -> list[Path]:
    """The weight files of one part of a pipeline folder that a plain `from_pretrained` reads."""
    return sorted(path for path in part.iterdir() if WEIGHTS.fullmatch(path.name))


def _read_index(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise ModelError(
            "not a diffusers pipeline folder",
            where=folder,
            got="no model_index.json",
            remedy="name the folder that holds model_index.json",
        )
    index = _read_json(path)
    return {part: (entry[0], entry[1]) for part, entry in index.items() if isinstance(entry, list)}


def parts_of(folder: Path) -> list[str]:
    """Names of the parts that the folder really has, in the order of its index."""
    return [part for part, (library, _) in _read_index(folder).items() if library is not None]


def unet_config(folder: Path) -> dict[str, Any]:
    """The UNet's configuration as it lies on disk."""
    return _read_json(folder / "unet" / "config.json")


def native_resolution(folder: Path) -> int:
    """Image side, in pixels, that the model was trained for."""
    vae = json.loads((folder / "vae" / "config.json").read_text())
    pixels_per_latent: int = 2 ** (len(vae["block_out_channels"]) - 1)
    return int(unet_config(folder)["sample_size"]) * pixels_per_latent


def prompt_length(folder: Path) -> int:
    """Tokens of a padded prompt: the length of the UNet's prompt embedding."""
    return int(json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"])


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


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet alone, on the CPU."""
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which the UNet lies on disk, so that a pruned copy can keep it."""
    with safe_open(weight_files(folder / "unet")[0], framework="pt") as file:
        return cast(torch.dtype, file.get_tensor(next(iter(file.keys()))).dtype)


def load_pipeline(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> StableDiffusionPipeline:
    """The whole stock pipeline, frozen, without a safety checker (it would blacken measured images)."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder,
        torch_dtype=dtype,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
    ).to(device)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_noise_schedule(folder: Path) -> NoiseSchedule:
    """The training schedule that the folder's scheduler configuration describes."""
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    return NoiseSchedule.from_alphas_cumprod(
        scheduler.alphas_cumprod, cast(PredictionType, scheduler.config.prediction_type)
    )


def best_device() -> torch.device:
    """A CUDA device where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
