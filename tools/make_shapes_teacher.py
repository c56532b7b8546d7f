"""Make the embedded teacher: a complete stock StableDiffusionPipeline that draws the shapes world.

    python tools/make_shapes_teacher.py vae      --work build/teacher
    python tools/make_shapes_teacher.py text     --work build/teacher
    python tools/make_shapes_teacher.py unet     --work build/teacher --steps 6000
    python tools/make_shapes_teacher.py assemble --work build/teacher -o bkd/assets/shapes
    python tools/check_shapes_gates.py

Each part is trained alone and frozen, as Stable Diffusion's were: the autoencoder on images, the text encoder on
captions (it learns to say what a caption describes), the UNet on latents with v-prediction (Salimans & Ho 2022,
arXiv:2202.00512). Run the same command again to continue an interrupted `unet`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from bkd.data.images import to_model_range
from bkd.data.shapes import BACKGROUNDS, COLORS, POSITIONS, RADII, SHAPES, Scene, scene
from bkd.data.shapes_checker import check, rendered
from bkd.models.student_folder import load_as_float32

MAX_TOKENS = 24
PROMPT_DROPOUT = 0.1
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "clip_sample": False,
    "steps_offset": 0,
}


def train_scenes(step: int, batch: int) -> list[Scene]:
    return [scene("train", step * batch + i) for i in range(batch)]


def to_images(drawn: list[Scene]) -> Tensor:
    """(B, 3, 32, 32), float32, -1..1."""
    return to_model_range(rendered(drawn))


def cosine_lr(step: int, steps: int, warmup: int = 200) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


# ---------------------------------------------------------------------------------------------- autoencoder
def train_vae(work: Path, steps: int, batch: int = 64, lr: float = 2e-3, kl_weight: float = 1e-4) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.01, fused=True)
    ema = EMAModel(vae.parameters(), decay=0.998)
    start = time.time()
    for step in range(steps):
        images = to_images(train_scenes(step, batch))
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        loss = error.abs().mean() + error.square().mean() + kl_weight * posterior.kl().mean() / 256
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_lr(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        if step % 100 == 0:
            kl = posterior.kl().mean()
            print(f"vae {step}/{steps} L1 {error.abs().mean():.4f} kl {kl:.1f} {time.time() - start:.0f}s", flush=True)
        if step % 400 == 399:
            print(f"  reconstructions correct: {_reconstruction_accuracy(vae, 200):.3f}", flush=True)
    ema.copy_to(vae.parameters())
    vae.eval()
    _standardise_latents(vae)
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def _reconstruction_accuracy(vae: AutoencoderKL, num_scenes: int) -> float:
    drawn = [scene("val", i) for i in range(num_scenes)]
    images = vae.decode(vae.encode(to_images(drawn)).latent_dist.mean).sample
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return sum(v.correct for v in check(pixels, [s.caption for s in drawn])) / num_scenes


@torch.no_grad()
def _standardise_latents(vae: AutoencoderKL) -> None:
    """Give every latent channel mean 0 and the same deviation by folding the change into the two 1x1 convolutions.

    The stock pipeline knows one scaling factor and no shift, so what it cannot express goes into the weights.
    """
    moments = torch.cat([vae.encode(to_images(train_scenes(10_000 + i, 64))).latent_dist.mean for i in range(16)])
    mean, std = moments.mean((0, 2, 3)), moments.std((0, 2, 3))
    scale = std.mean() / std
    enc, dec = vae.quant_conv, vae.post_quant_conv
    enc.weight[:4] *= scale[:, None, None, None]
    enc.bias[:4] = (enc.bias[:4] - mean) * scale
    enc.bias[4:] += 2 * scale.log()
    dec.bias += dec.weight[:, :, 0, 0] @ mean
    dec.weight /= scale[None, :, None, None]
    vae.register_to_config(scaling_factor=round(float(1 / std.mean()), 4))


# --------------------------------------------------------------------------------------------- text encoder
def build_tokenizer() -> PreTrainedTokenizerFast:
    words = ["a", "and", "at", "the", "on", "background", "top", "bottom", "left", "right"]
    words += [*BACKGROUNDS, *COLORS, *RADII, *SHAPES]
    special = ["<|startoftext|>", "<|endoftext|>", "<|unknown|>"]
    vocabulary = {word: i for i, word in enumerate(special + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|unknown|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_TOKENS,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def description(drawn: Scene) -> list[int]:
    """What a caption says as class indices: background, then shape, colour and size of each quadrant (0: none)."""
    at = {o.position: o for o in drawn.objects}
    labels = [list(BACKGROUNDS).index(drawn.background)]
    for position in POSITIONS:
        o = at.get(position)
        for name, options in (("shape", SHAPES), ("color", list(COLORS)), ("size", list(RADII))):
            labels.append(0 if o is None else 1 + list(options).index(getattr(o, name)))
    return labels


def train_text(work: Path, steps: int, batch: int = 128, lr: float = 1e-3) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=64,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    sizes = [len(BACKGROUNDS)] + [1 + len(SHAPES), 1 + len(COLORS), 1 + len(RADII)] * len(POSITIONS)
    readout = nn.Linear(64, sum(sizes))
    params = [*model.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, fused=True)
    for step in range(steps):
        drawn = train_scenes(step, batch)
        ids = tokenize(tokenizer, [s.caption for s in drawn])
        labels = torch.tensor([description(s) for s in drawn])
        hidden = model(ids).last_hidden_state
        # Read from the first end token and from the last: both summarise the caption, as CLIP's does.
        first_end = (ids == 1).int().argmax(1)
        summaries = torch.cat([hidden[torch.arange(batch), first_end], hidden[:, -1]])
        parts = readout(summaries).split(sizes, dim=1)
        losses = [F.cross_entropy(p, labels[:, k].repeat(2)) for k, p in enumerate(parts)]
        loss = torch.stack(losses).sum()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_lr(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            right = torch.stack([p.argmax(1) == labels[:, k].repeat(2) for k, p in enumerate(parts)]).all(0)
            print(f"text {step}/{steps} loss {loss:.4f} all right {right.float().mean():.3f}", flush=True)
    model.eval().save_pretrained(work / "text_encoder")
    tokenizer.save_pretrained(work / "tokenizer")


# ----------------------------------------------------------------------------------------------------- UNet
def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion's topology: four levels, two layers per block, mid block, the two innermost equally wide."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )


@torch.no_grad()
def encode_scenes(work: Path, num_scenes: int) -> tuple[Tensor, Tensor]:
    """Latent moments (N, 8, 8, 8) and token ids (N, 24) of the first scenes of the training split."""
    cached = work / "latents.pt"
    if cached.exists():
        stored = torch.load(cached, weights_only=True)
        return stored["moments"], stored["ids"]
    vae = AutoencoderKL.from_pretrained(work / "vae")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    moments, ids = [], []
    for i in range(num_scenes // 500):
        drawn = train_scenes(i, 500)
        dist = vae.encode(to_images(drawn)).latent_dist
        moments.append(torch.cat([dist.mean, dist.std], 1) * vae.config.scaling_factor)
        ids.append(tokenize(tokenizer, [s.caption for s in drawn]))
    stored = {"moments": torch.cat(moments), "ids": torch.cat(ids)}
    torch.save(stored, cached)
    return stored["moments"], stored["ids"]


def train_unet(work: Path, steps: int, batch: int, lr: float, num_scenes: int) -> None:
    moments, ids = encode_scenes(work, num_scenes)
    text = CLIPTextModel.from_pretrained(work / "text_encoder")
    empty = tokenize(PreTrainedTokenizerFast.from_pretrained(work / "tokenizer"), [""])
    scheduler = DDIMScheduler(**SCHEDULE)
    torch.manual_seed(0)
    unet = build_unet()
    ema = EMAModel(unet.parameters(), decay=0.9995)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = _load_progress(work, unet, ema, optimizer)
    start = time.time()
    running = 0.0
    for step in range(first, steps):
        rng = torch.Generator().manual_seed(step)
        pick = torch.randint(len(moments), (batch,), generator=rng)
        mean, std = moments[pick].chunk(2, dim=1)
        latents = mean + std * torch.randn(mean.shape, generator=rng)
        drop = torch.rand(batch, generator=rng) < PROMPT_DROPOUT
        with torch.no_grad():
            prompt_embeds = text(torch.where(drop[:, None], empty, ids[pick])).last_hidden_state
        # Captions matter where noise has hidden the layout, so the noisier steps are drawn more often.
        timesteps = (torch.rand(batch, generator=rng) ** 0.7 * 1000).long()
        noise = torch.randn(latents.shape, generator=rng)
        target = scheduler.get_velocity(latents, noise, timesteps)
        model_pred = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, prompt_embeds).sample
        loss = F.mse_loss(model_pred, target)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_lr(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        running = loss.item() if step == first else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 99:
            rate = (step + 1 - first) / (time.time() - start)
            eta = (steps - step) / rate / 60
            print(f"unet {step + 1}/{steps} loss {running:.4f} {rate:.2f} steps/s ETA {eta:.0f} min", flush=True)
        if step % 500 == 499 or step + 1 == steps:
            _save_progress(work, step + 1, unet, ema, optimizer)


def _save_progress(work: Path, step: int, unet: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer) -> None:
    state = {"step": step, "unet": unet.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, work / "unet.tmp")
    (work / "unet.tmp").replace(work / "unet.pt")


def _load_progress(work: Path, unet: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer) -> int:
    if not (work / "unet.pt").exists():
        return 0
    state = torch.load(work / "unet.pt", weights_only=True)
    unet.load_state_dict(state["unet"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


# ------------------------------------------------------------------------------------------------- assemble
def assemble(work: Path, output: Path) -> None:
    """Write the pipeline folder, float16 safetensors, from the EMA weights reached so far."""
    unet = build_unet()
    ema = EMAModel(unet.parameters())
    state = torch.load(work / "unet.pt", weights_only=True)
    ema.load_state_dict(state["ema"])
    ema.copy_to(unet.parameters())
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(work / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(output, safe_serialization=True)
    load_as_float32(output / "text_encoder")
    for config in output.glob("*/config.json"):  # saving notes where a part was loaded from
        facts = json.loads(config.read_text())
        facts.pop("_name_or_path", None)
        config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    # The name that transformers 4 and 5 both know; saving writes the class of whichever is installed.
    index = output / "model_index.json"
    index.write_text(index.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    print(json.dumps({"step": state["step"], "output": str(output)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["vae", "text", "unet", "assemble"])
    parser.add_argument("--work", type=Path, default=Path("build/teacher"))
    parser.add_argument("-o", "--output", type=Path, default=Path("bkd/assets/shapes"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--num-scenes", type=int, default=100_000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part == "vae":
        train_vae(args.work, args.steps or 3200)
    elif args.part == "text":
        train_text(args.work, args.steps or 2500)
    elif args.part == "unet":
        train_unet(args.work, args.steps or 6000, args.batch, args.lr, args.num_scenes)
    else:
        assemble(args.work, args.output)


if __name__ == "__main__":
    main()
