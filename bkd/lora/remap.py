"""LoRA files: carry a teacher's adapter to a pruned student through the plan's key map."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from bkd.errors import ModelError, OutputError
from bkd.files import replace_file
from bkd.lora.adapter_file import ADAPTER_FILE
from bkd.lora.adapters import of_one_rank
from bkd.models.folder import unet_config
from bkd.output_folder import require_new_file
from bkd.surgery.build import build_empty
from bkd.surgery.plan import Lineage

UNET = "unet"
ORIGINAL_LAYOUT = SimpleNamespace(layers_per_block=2)
"""Files with block numbers of the original layout count as whole teachers do, whatever the student has left."""
OTHER_ADAPTERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
}
"""Parts of tensor names in files of other adapters, which are often called LoRA too."""


@dataclass(frozen=True)
class Remapped:
    """What became of a LoRA's tensors.

    Attributes:
        num_carried: Tensors that the student's file holds, those of text encoders included.
        lost: Tensors of modules that the student lacks.
        unknown: UNet tensors of modules that the teacher does not have either.
    """

    num_carried: int
    lost: tuple[str, ...]
    unknown: tuple[str, ...]


def remap_lora(lora: Path, student: Path, lineage: Lineage, output: Path, *, overwrite: bool = False) -> Remapped:
    """Write a LoRA file for a student, which `pipe.load_lora_weights` takes.

    Every alpha is multiplied into its up-projection, and the UNet's adapters have one rank: the file needs no metadata,
    and loads the same everywhere.

    Args:
        lora: The teacher's: `.safetensors`, of diffusers, peft or kohya.
        student: Pipeline folder.
        lineage: How the student came from the teacher.
        output: File to write.
        overwrite: Replace it.

    Raises:
        BkdError: If the file is no LoRA of this teacher, or nothing of it could be carried over.
    """
    if output.resolve() == lora.resolve():
        raise OutputError("the output is the teacher's LoRA itself", where=output, remedy="choose another -o")
    require_new_file(output, ".safetensors", overwrite=overwrite)
    tensors = _read(lora)
    shapes = {key.removesuffix(".weight"): p.shape for key, p in build_empty(unet_config(student)).named_parameters()}
    homes = {lineage.source_of(module): module for module in shapes}
    removed = tuple(f"{module}." for module in lineage.removed_modules())
    carried, lost, unknown = {}, [], []
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        module, _, suffix = name.partition(".lora_")
        if part != UNET:
            carried[key] = tensor
        elif module in homes:
            _check_shape(lora, key, tensor, shapes[homes[module]])
            carried[f"{UNET}.{homes[module]}.lora_{suffix}"] = tensor
        elif f"{module}.".startswith(removed):
            lost.append(key)
        else:
            unknown.append(key)
    if not any(key.startswith(f"{UNET}.") for key in carried):
        raise ModelError(
            "no UNet tensor of this LoRA fits the student",
            where=lora,
            got=f"{len(lost)} tensors of removed modules, {len(unknown)} of modules that the teacher does not have",
            remedy="give a LoRA of the student's own teacher",
        )
    with replace_file(output) as stream:
        stream.write(save({key: tensor.contiguous() for key, tensor in carried.items()}, metadata={"format": "pt"}))
    return Remapped(len(carried), tuple(lost), tuple(unknown))


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors with alpha / r in the up-projections; the UNet's as `unet.MODULE.lora_A.weight`."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise ModelError(
            "not a LoRA file" if path.is_file() else "no such file",
            where=path,
            allowed="a .safetensors file; pickled files can run code and are not read",
        )
    names = _tensor_names(path)
    if path.name == ADAPTER_FILE:
        raise ModelError(
            "these are a run's adapters, and no LoRA file yet",
            where=path,
            remedy=f"bkd export {path.parent} --format lora -o lora.safetensors",
        )
    _refuse_other_adapters(path, names)
    try:
        # The SDXL loader takes files of SD 1.x and 2.x, too.
        found, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(path.resolve()), unet_config=ORIGINAL_LAYOUT, return_lora_metadata=True, use_safetensors=True
        )
    except Exception as error:  # diffusers raises a dozen kinds for files that are no LoRA it knows
        got = " ".join(str(error).split())
        raise ModelError("diffusers cannot read this as a LoRA", where=path, got=got) from error
    if not any("lora" in key for key in found):
        raise ModelError(
            "not a LoRA file", where=path, got=", ".join(list(found)[:3]), allowed="tensors named …lora_A / lora_down…"
        )
    in_file, understood = _count_adapters(names), _count_adapters(found)
    if understood < in_file:
        raise ModelError(
            "diffusers does not understand all of this LoRA",
            where=path,
            got=f"{in_file} adapted modules in the file, {understood} after loading: some names come to the same",
            remedy="save it again with diffusers or peft",
        )
    scaled = {key: tensor * _scale(key, found, alphas or {}, metadata or {}) for key, tensor in found.items()}
    unet = {key: tensor for key, tensor in scaled.items() if key.startswith(f"{UNET}.")}
    text = {key: tensor for key, tensor in scaled.items() if key not in unet}
    return {**of_one_rank(convert_unet_state_dict_to_peft(unet)), **text}


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except Exception as error:
        raise ModelError("this file cannot be read", where=path, got=error, remedy="download it again") from error


def _refuse_other_adapters(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if found := next((kind for kind in OTHER_ADAPTERS if kind in name), None):
            raise ModelError(
                f"this is a {OTHER_ADAPTERS[found]}, not a LoRA",
                where=path,
                got=name,
                allowed="LoRA files of diffusers, peft or kohya",
            )


def _count_adapters(names: Iterable[str]) -> int:
    return sum(re.search(r"lora_A|(lora|lora_linear_layer)[_.]down", name) is not None for name in names)


def _scale(key: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], metadata: Mapping[str, Any]) -> float:
    """alpha / r for an up-projection and its bias, 1 for other tensors, and where a file says nothing."""
    if not key.endswith(("up.weight", "lora_B.weight", "lora_B.bias")):
        return 1.0
    rank = tensors[key.removesuffix("bias") + "weight" if key.endswith("bias") else key].shape[1]
    # kohya's alphas, under the names that diffusers gives them
    for name in (key.replace("up.weight", "down.weight.alpha"), f"{key.split('.lora.')[0]}.alpha"):
        if name in alphas:
            return float(alphas[name]) / rank
    part, _, module = key.split(".lora_B.")[0].partition(".")
    settings = {name.removeprefix(f"{part}."): v for name, v in metadata.items() if name.startswith(f"{part}.")}
    if "lora_alpha" not in settings:
        return 1.0
    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), settings["lora_alpha"])
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def _check_shape(path: Path, key: str, tensor: Tensor, weight: tuple[int, ...]) -> None:
    wanted = {"lora_A": (1, weight[1] if len(weight) > 1 else 1), "lora_B": (0, weight[0])}
    for side, (axis, size) in wanted.items():
        if f".{side}.weight" in key and tensor.shape[axis] != size:
            raise ModelError(
                "this LoRA is for a model of other widths",
                where=path,
                got=f"{key}: {tuple(tensor.shape)}",
                allowed=f"{size} channels at that module",
                remedy="give a LoRA of the student's own teacher; one that was trained on the student fits as it is",
            )
