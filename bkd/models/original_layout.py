"""The original Stable Diffusion layout, in which one file holds a whole pipeline: names to names, and tensors.

It numbers a UNet's pieces in one row from input to output, and says nothing else of its architecture. diffusers reads
it back with the student's configuration beside it, and counts with one `layers_per_block` for all levels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bkd.errors import ModelError
from bkd.models.folder import is_sdxl, read_json, unet_config
from bkd.surgery.build import build_empty
from bkd.surgery.plan import GUIDANCE_INPUT

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Where the parts lie; text encoders have their own places, and their own naming."""
UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
AUTOENCODER = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    "down_blocks.": "down.",
    "resnets.": "block.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
}
OPEN_CLIP = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
PART_OF_THREE = re.compile(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def require_expressible(folder: Path) -> None:
    """Refuse a student that the layout cannot express, from its configuration alone.

    Args:
        folder: Pipeline folder.

    Raises:
        ModelError: Saying what it cannot express.
    """
    reasons = list(unexpressible(unet_config(folder)))
    if (kind := read_json(folder / "vae" / "config.json").get("_class_name")) != "AutoencoderKL":
        reasons.append(f"its autoencoder is an {kind}, and the layout has names for AutoencoderKL")
    if reasons:
        raise ModelError(
            "a single file cannot express this student",
            where=folder,
            got="; ".join(reasons),
            allowed="as many layers in every level, and tensors that the original layout has names for",
            remedy="--format pipeline",
        )


def unexpressible(config: Mapping[str, Any]) -> Iterator[str]:
    """What the layout cannot express of a UNet, or diffusers cannot read back from it."""
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int):
        yield (
            f"layers_per_block is {list(layers)}, and diffusers' reader of the layout counts with one number for all "
            "levels"
        )
        return
    nameless = [key for key in build_empty(dict(config)).state_dict() if unet_name(key, config) is None]
    if GUIDANCE_INPUT in nameless:
        nameless.remove(GUIDANCE_INPUT)
        yield "it has an input for the guidance scale, which the layout has no name for"
    if nameless:
        yield f"the layout has no name for {len(nameless)} of its tensors, such as {nameless[0]}"


def unet_name(key: str, config: Mapping[str, Any]) -> str | None:
    """The original name of a UNet's tensor, without the prefix of the part; None where there is none.

    Args:
        key: As the UNet's state dict has it.
        config: The UNet's; `layers_per_block` is one number.
    """
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    if found := MID.fullmatch(key):
        part, number, rest = found.groups()
        return f"middle_block.{2 * int(number) + (part == 'attentions')}.{_inside(part, rest)}"
    if found := BLOCK.fullmatch(key):
        side, block, part, layer, rest = found.groups()
        layers = config.get("layers_per_block", 2)
        # Both sides have one place more than `layers`: of down blocks for the resampling, of up blocks for a layer.
        place = (layers + 1) * int(block) + (side == "down") + (layers if part.endswith("samplers") else int(layer))
        behind_attention = side == "up" and "CrossAttn" in config["up_block_types"][int(block)]
        slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + behind_attention}[part]
        return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{slot}.{_inside(part, rest)}"
    return None


def _inside(part: str, rest: str) -> str:
    """A path within one of a block's parts."""
    return _renamed(rest, {"resnets": RESNET, "downsamplers": {"conv.": "op."}}.get(part, {}))


def vae_name(key: str, num_levels: int) -> str:
    """The original name of an autoencoder's tensor; the layout counts the decoder's levels from the outside in."""
    if found := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.+)", key):
        key = f"decoder.up.{num_levels - 1 - int(found[1])}.{found[2]}"
    return _renamed(key, AUTOENCODER)


def _renamed(key: str, table: Mapping[str, str]) -> str:
    """With what a table has of its path replaced, from dot to dot."""
    for ours, theirs in table.items():
        key = re.sub(rf"(^|\.){re.escape(ours)}", rf"\g<1>{theirs}", key)
    return key


def original_tensors(pipe: Any) -> dict[str, Tensor]:
    """A pipeline's UNet, autoencoder and text encoders under their names in one file.

    Args:
        pipe: A stock Stable Diffusion pipeline that the layout can express; see `require_expressible`.
    """
    config = pipe.unet.config
    tensors = {f"{UNET}{unet_name(key, config)}": tensor for key, tensor in pipe.unet.state_dict().items()}
    for key, tensor in pipe.vae.state_dict().items():
        name = vae_name(key, len(pipe.vae.config.block_out_channels))
        is_projection = ".attn_1." in name and tensor.ndim == 2  # a convolution there
        tensors[f"{VAE}{name}"] = tensor[..., None, None] if is_projection else tensor
    if is_sdxl(config):
        tensors |= _clip("conditioner.embedders.0.", pipe.text_encoder)
        tensors |= _open_clip("conditioner.embedders.1.", pipe.text_encoder_2)
    elif config.get("use_linear_projection"):  # SD 2.x
        tensors |= _open_clip("cond_stage_model.", pipe.text_encoder)
    else:
        tensors |= _clip("cond_stage_model.", pipe.text_encoder)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _clip(home: str, encoder: torch.nn.Module) -> dict[str, Tensor]:
    """A text encoder under the names of transformers, as SD 1.x has it."""
    state = encoder.state_dict()
    return {f"{home}transformer.text_model.{key.removeprefix('text_model.')}": state[key] for key in state}


def _open_clip(home: str, encoder: torch.nn.Module) -> dict[str, Tensor]:
    """A text encoder under the names of OpenCLIP, whose query, key and value are one matrix."""
    tensors: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, tensor in encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        if found := PART_OF_THREE.fullmatch(name):
            layer, which, kind = found.groups()
            joined.setdefault(f"{_renamed(layer, OPEN_CLIP)}.attn.in_proj_{kind}", {})[which] = tensor
        elif name == "text_projection.weight":
            tensors["text_projection"] = tensor.T
        else:
            tensors[_renamed(name, OPEN_CLIP)] = tensor
    tensors |= {name: torch.cat([parts[which] for which in "qkv"]) for name, parts in joined.items()}
    return {f"{home}model.{name}": tensor for name, tensor in tensors.items()}
