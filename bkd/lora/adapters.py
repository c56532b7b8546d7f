"""Adapters of a student in training, by peft: added, checked, merged into a copy.

The frozen weights beneath them may be the teacher's own tensors. Sharing means the same Parameter objects: it then
survives moves and casts of either network. Whatever trains without an adapter is cloned first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from bkd.errors import SurgeryError, suggest
from bkd.recipe.lora import Lora
from bkd.surgery.build import build_empty
from bkd.surgery.plan import GUIDANCE_INPUT, RemovalPlan

ADAPTER = "default"
NORMS = (nn.GroupNorm, nn.LayerNorm)
KEY = "stages.0.lora"
SCALE_PROJECTION = GUIDANCE_INPUT.removesuffix(".weight")
"""Starts as zeros and trains itself."""


def add_adapters(student: UNet2DConditionModel, lora: Lora, *, seed: int = 0) -> None:
    """Freeze a UNet, and give it adapters that change nothing until they are trained.

    What trains afterwards has `requires_grad`: the adapters, in float32 over a float32 student; an input for the
    guidance scale, where there is one; and clones, in float32, of what `lora.also_train` names.

    Args:
        student: Changed in place; its tensors may be shared with its teacher and stay as they are.
        lora: As validated by `require_adaptable`.
        seed: Of the adapters' initial values.
    """
    ranks = dict(lora.rank_pattern)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.r if lora.lora_alpha is None else lora.lora_alpha,
        target_modules=list(lora.target_modules),
        exclude_modules=[SCALE_PROJECTION] if student.config.time_cond_proj_dim else None,
        rank_pattern=ranks,
        alpha_pattern=ranks if lora.lora_alpha is None else {},
        lora_dropout=lora.lora_dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student.add_adapter(config, ADAPTER)
    for layer in _layers(student).values():
        layer.cast_input_dtype_enabled = False  # autocast decides; a cast here would keep float32 activations
    for module, key, parameter in list(_tensors_beside(student, lora)):
        setattr(module, key, nn.Parameter(parameter.detach().float().clone()))


def _tensors_beside(student: nn.Module, lora: Lora) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Module, name and tensor of what trains without an adapter."""
    for path, module in student.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            wanted = (
                f"{path}.{key}" == GUIDANCE_INPUT
                or (key == "bias" and "biases" in lora.also_train)
                or (isinstance(module, NORMS) and "norms" in lora.also_train)
            )
            if wanted:
                yield module, key, parameter


def _layers(student: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in student.named_modules() if isinstance(module, LoraLayer)}


def require_adaptable(student: nn.Module, lora: Lora) -> None:
    """Refuse adapters that peft would leave out, or make larger than what they adapt, without a word.

    Args:
        student: Without adapters; may be on the meta device.
        lora: Wish.

    Raises:
        SurgeryError: If a target names no linear or convolutional module, or a rank is larger than a module's.
    """
    modules = {name: module for name, module in student.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    modules.pop(SCALE_PROJECTION, None)
    everything = [name for name, _ in student.named_modules() if name != SCALE_PROJECTION]
    if not lora.target_modules:
        raise SurgeryError("no module is adapted", where=f"{KEY}.target_modules", got="an empty list")
    chosen: dict[str, nn.Linear | nn.Conv2d] = {}
    for target in lora.target_modules:
        found = {name: module for name, module in modules.items() if f".{name}".endswith(f".{target}")}
        if not found:
            endings = {".".join(name.split(".")[-length:]) for name in modules for length in (1, 2, 3)}
            kinds = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
            raise SurgeryError(
                f"no linear or convolutional module's path ends in '{target}'{suggest(target, sorted(endings))}",
                where=f"{KEY}.target_modules",
                allowed=", ".join(kinds) + ", to_out.0, net.0.proj, and longer ends of paths",
            )
        others = [name for name in everything if f".{name}".endswith(f".{target}") and name not in modules]
        if others:
            raise SurgeryError(
                f"'{target}' is also the end of paths of modules that are neither linear nor convolutional",
                where=f"{KEY}.target_modules",
                got=", ".join(others[:3]),
                remedy="give a longer end of the path",
            )
        chosen |= found
    for pattern in lora.rank_pattern:
        if not any(get_pattern_key([pattern], name) == pattern for name in chosen):
            raise SurgeryError(
                f"no adapted module's path ends like '{pattern}'",
                where=f"{KEY}.rank_pattern",
                got=f"target_modules {', '.join(lora.target_modules)}",
                remedy=f"adapt it, too, or leave it out: {KEY}.rank_pattern={{}} for none",
            )
    for name, module in chosen.items():
        rank = lora.rank_pattern.get(get_pattern_key(list(lora.rank_pattern), name), lora.r)
        if rank > (most := _full_rank(module)):
            raise SurgeryError(
                "this rank is larger than the module it would adapt",
                where=f"{KEY}.r, {name}",
                got=rank,
                allowed=f"at most {most} there",
                remedy=f"{KEY}.r={most}, or another rank for such modules with {KEY}.rank_pattern",
            )


def _full_rank(module: nn.Linear | nn.Conv2d) -> int:
    return min(module.weight.shape[0], module.weight[0].numel())


def trained_tensors(student: nn.Module) -> dict[str, nn.Parameter]:
    """What trains of an adapted student, by name."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def without_adapters(name: str) -> str:
    """The stock UNet's name for a tensor of an adapted one."""
    return name.replace(".base_layer.", ".")


def merged(student: UNet2DConditionModel) -> UNet2DConditionModel:
    """A stock UNet that computes what an adapted one does; the adapted one, and what it shares, stay as they are.

    Returns:
        In float32, on the CPU.
    """
    layers, state = _layers(student), {}
    for name, tensor in student.state_dict().items():
        if ".lora_" in name:
            continue
        weight = tensor.float().cpu()
        if (layer := layers.get(name.removesuffix(".base_layer.weight"))) is not None and name.endswith(".weight"):
            weight = weight + layer.get_delta_weight(ADAPTER).float().cpu()
        state[without_adapters(name)] = weight
    plain = build_empty(dict(student.config))
    plain.load_state_dict(state, strict=True, assign=True)
    return plain.eval()


def scaled_tensors(student: nn.Module) -> dict[str, Tensor]:
    """Adapters as files have them, by module path and `lora_A.weight`, `lora_B.weight`; alpha / r is multiplied in.

    All of one rank; see `of_one_rank`.
    """
    found = {}
    for name, layer in _layers(student).items():
        found[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach()
        found[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER]
    return of_one_rank(found)


def of_one_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapters, with zeros up to the greatest rank among them.

    Where a file has several ranks and no alphas, diffusers 0.37 scales all of them by one.

    Args:
        tensors: By names that end in `lora_A.weight`, (r, …), and `lora_B.weight`, (out, r, …); others stay.
    """
    ends = {"lora_A.weight": 0, "lora_B.weight": 1}
    axes = {name: axis for name in tensors for end, axis in ends.items() if name.endswith(end)}
    rank = max((tensors[name].shape[axis] for name, axis in axes.items()), default=0)
    return {
        name: (_lengthened(tensor, axes[name], rank) if name in axes else tensor).contiguous()
        for name, tensor in tensors.items()
    }


def _lengthened(tensor: Tensor, axis: int, length: int) -> Tensor:
    missing = list(tensor.shape)
    missing[axis] = length - missing[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis)


def unshared(student: nn.Module, teacher: nn.Module, plan: RemovalPlan, own: Collection[str] = ()) -> list[str]:
    """Names of frozen tensors of a student that are not its teacher's own; none where all weights are shared.

    Args:
        student: With adapters.
        teacher: The UNet that it shares with.
        plan: How the student comes from it.
        own: Names that are not to be shared though they are frozen, such as adapters that no loss reaches.
    """
    theirs = {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()}
    return [
        name
        for name, parameter in student.named_parameters()
        if not parameter.requires_grad
        and name not in own
        and parameter.data_ptr() != theirs.get(plan.source_of(without_adapters(name)))
    ]
