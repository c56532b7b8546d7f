"""Write a diffusers pipeline as one file in the original layout, the way people's checkpoints lie on their disks."""

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_NAMES = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_key(key, config):
    """The original name of a UNet tensor."""
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    per_block = config["layers_per_block"] + 1
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
        side, block, part, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        place = per_block * block + layer + (side == "down")
        prefix = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{int(part == 'attentions')}"
        return f"{prefix}.{renamed_resnet(rest) if part == 'resnets' else rest}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key):
        return f"input_blocks.{per_block * (int(found[1]) + 1)}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", key):
        block = int(found[1])
        after = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{per_block * block + config['layers_per_block']}.{after}.conv.{found[2]}"
    found = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key)
    if found[1] == "attentions":
        return f"middle_block.1.{found[3]}"
    return f"middle_block.{2 * int(found[2])}.{renamed_resnet(found[3])}"


def renamed_resnet(rest):
    name, _, last = rest.rpartition(".")
    return f"{RESNET[name]}.{last}"


def vae_key(key, levels):
    """The original name of an autoencoder tensor."""
    for ours, theirs in VAE_NAMES.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.downsample", r"encoder.down.\1.downsample", key)
    key = re.sub(
        r"decoder\.up_blocks\.(\d)\.resnets\.(\d)",
        lambda found: f"decoder.up.{levels - 1 - int(found[1])}.block.{found[2]}",
        key,
    )
    key = re.sub(
        r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda f: f"decoder.up.{levels - 1 - int(f[1])}.upsample", key
    )
    if "mid_block.attentions.0." in key:
        head, tail = key.split("mid_block.attentions.0.")
        name, _, last = tail.rpartition(".")
        return f"{head}mid.attn_1.{VAE_ATTENTION[name]}.{last}"
    return key


OPEN_CLIP = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}


def open_clip_tensors(encoder):
    """SDXL's second text encoder, whose query, key and value are one matrix."""
    tensors, joined = {}, {}
    for key, tensor in encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if found := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            joined.setdefault(f"{found[1]}.attn.in_proj_{found[3]}", {})[found[2]] = tensor
        elif name == "text_projection.weight":
            tensors["text_projection"] = tensor.T
        else:
            tensors[name] = tensor
    tensors |= {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in joined.items()}
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in tensors.items()}


def save_original_layout(pipe, path):
    """One `.safetensors` file with UNet, autoencoder and text encoder; for SDXL with both of them."""
    second = getattr(pipe, "text_encoder_2", None)
    tensors = {f"model.diffusion_model.{unet_key(k, pipe.unet.config)}": v for k, v in pipe.unet.state_dict().items()}
    levels = len(pipe.vae.config.block_out_channels)
    for key, tensor in pipe.vae.state_dict().items():
        name = vae_key(key, levels)
        is_projection = "attn_1" in name and tensor.ndim == 2
        tensors[f"first_stage_model.{name}"] = tensor[..., None, None] if is_projection else tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        home = "cond_stage_model" if second is None else "conditioner.embedders.0"
        tensors[f"{home}.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    if second is not None:
        tensors |= open_clip_tensors(second)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
