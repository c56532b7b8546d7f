"""Single files in the original layout, as people own them: taken apart into a stock pipeline folder, once.

The layout has no configuration and no tokenizer; both come from a pipeline folder of the same architecture.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import nn

from bkd.errors import ModelError
from bkd.files import cache_folder, file_digest
from bkd.models.folder import check_pipeline_folder, is_inpainting, is_sdxl, unet_config
from bkd.models.original_layout import UNET
from bkd.models.unet_weights import DTYPES
from bkd.surgery.build import build_empty


def import_single_file(path: Path, like: Path) -> Path:
    """The pipeline folder that a single file stands for; made once, in the cache, under the digest of its sources.

    Args:
        path: A `.safetensors` file that holds UNet, autoencoder and text encoder(s).
        like: Pipeline folder that gives configuration and tokenizer; its weights are not read.

    Raises:
        ModelError: If the file is damaged, lacks a UNet, or does not fit the configuration.
    """
    dtype = check_single_file(path, like)
    sources = [path, *sorted(found for found in like.rglob("*") if found.suffix in (".json", ".txt"))]
    name = hashlib.sha256("".join(map(file_digest, sources)).encode()).hexdigest()[:16]
    folder = cache_folder() / "models" / name
    if not (folder / "model_index.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
            _convert(path, like, dtype, Path(scratch) / name)
            with suppress(FileExistsError):  # another process was faster, with the same bytes
                (Path(scratch) / name).rename(folder)
    check_pipeline_folder(folder)
    return folder


def _convert(path: Path, like: Path, dtype: torch.dtype, folder: Path) -> None:
    try:
        pipe = pipeline_class(unet_config(like)).from_single_file(
            str(path), config=str(like), torch_dtype=dtype, local_files_only=True, safety_checker=None
        )
        # A tensor that the file lacks shows only now, as one without memory.
        missing = [name for name, part in pipe.components.items() if isinstance(part, nn.Module) and _is_empty(part)]
    except Exception as error:  # a part that is missing shows as one of many kinds of error
        raise _unreadable(path, str(error).strip() or type(error).__name__) from error
    if missing:
        raise _unreadable(path, f"tensors of {', '.join(missing)} are missing")
    pipe.save_pretrained(folder, safe_serialization=True)


def _is_empty(part: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in part.parameters())


def _unreadable(path: Path, problem: str) -> ModelError:
    return ModelError(
        "diffusers cannot read this file with that configuration",
        where=path,
        got=problem.splitlines()[0],
        allowed="UNet, autoencoder and text encoder(s) in the original Stable Diffusion layout",
    )


def check_single_file(path: Path, like: Path) -> torch.dtype:
    """Refuse a file that is damaged or of another architecture, from its header alone.

    Returns:
        The dtype its UNet is stored in.

    Raises:
        ModelError: Saying what does not fit.
    """
    try:
        with safe_open(path, framework="np") as file:
            tensors = {key: file.get_slice(key) for key in file.keys() if key.startswith(UNET)}  # noqa: SIM118
            found = sum(math.prod(tensor.get_shape()) for tensor in tensors.values())
            stored = {tensor.get_dtype() for tensor in tensors.values()}
    except Exception as error:
        raise ModelError("damaged file", where=path, got=error, remedy="download the file again") from error
    if not tensors:
        raise ModelError(
            "this file holds no UNet in the original layout",
            where=path,
            allowed=f"tensors named '{UNET}…'; a LoRA or a diffusers weight file is not a whole model",
        )
    expected = sum(p.numel() for p in build_empty(unet_config(like)).parameters())
    if expected != found:
        raise ModelError(
            "this file's UNet is not the one that the configuration describes",
            where=path,
            got=f"{found:,} parameters",
            allowed=f"{expected:,}, as in {like}",
            remedy="give --config a pipeline of the same family as the file",
        )
    return DTYPES.get(min(stored), torch.float32) if len(stored) == 1 else torch.float32


def pipeline_class(config: Mapping[str, Any]) -> Any:
    """diffusers' class for a UNet's family; it reads and makes such files."""
    name = "StableDiffusionXL" if is_sdxl(config) else "StableDiffusion"
    return getattr(diffusers, f"{name}{'Inpaint' if is_inpainting(config) else ''}Pipeline")
