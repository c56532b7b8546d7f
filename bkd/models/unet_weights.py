"""What a UNet's weight files hold, from their headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bkd.errors import ModelError
from bkd.models.folder import check_weights, unet_config, weight_files
from bkd.surgery.build import build_empty

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes in which models are stored."""


def _stored(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, what the header says of it) for every tensor in the UNet's files."""
    for path in weight_files(folder / "unet"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                yield key, file.get_slice(key)


def check_unet_weights(folder: Path) -> tuple[str, ...]:
    """Compare the UNet's stored tensors, by name and shape, with what its configuration describes.

    diffusers fills what is missing with random numbers, or fails far from the cause.

    Returns:
        Names of stored tensors that the configuration does not describe; diffusers leaves them out.

    Raises:
        ModelError: If a tensor is missing or has another shape.
    """
    stored = {key: tuple(tensor.get_shape()) for key, tensor in _stored(folder)}
    described = {key: tuple(tensor.shape) for key, tensor in build_empty(unet_config(folder)).state_dict().items()}
    wrong = [key for key, shape in described.items() if stored.get(key) != shape]
    if wrong:
        raise ModelError(
            "the UNet's weights are not those of its configuration",
            where=folder / "unet",
            got=f"{len(wrong)} tensors missing or of another shape, the first: {wrong[0]}",
            remedy="get the model again; one whose blocks were deleted in place has lost its configuration",
        )
    return tuple(key for key in stored if key not in described)


def weights_problem(folder: Path) -> str | None:
    """Why a UNet's weights, where there are any, are not what its configuration says; None if they are."""
    if not weight_files(folder / "unet"):
        return None
    try:
        check_weights(folder / "unet")
        check_unet_weights(folder)
    except ModelError as error:
        return f"{error.what}: {error.got}"
    return None


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which the UNet lies on disk, so that a pruned copy can keep it; float32 where it has several."""
    found = {tensor.get_dtype() for _, tensor in _stored(folder)}
    return DTYPES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32
