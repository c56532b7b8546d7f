"""Our training step beside a reference loop, taking turns in one process; what hooks cost; what many samples cost.

    python tools/bench_train.py --batches 32 16 8                # the embedded teacher
    python tools/bench_train.py --model sd1 --mixed-precision bf16 --steps 5 --batches 4 8 16    # SD 1.x size, random
    python tools/bench_train.py --one-step --model sd1           # one step and its peak memory

The reference loop is written from BK-SDM's description: images and captions are encoded at every step, the optimizer
is the default one, and every loss term is gathered and read at every step. It is given decoded images from memory.
Its authors' command also turns gradient checkpointing on; that is a row of its own. Both sides have the same networks,
batch, precision, sites and average.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from architectures import SD1
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from bkd.bench.train import NUM_SAMPLES, SimulatedSamples, Unsaved
from bkd.eval.peak_memory import peak_bytes
from bkd.eval.pictures import with_unet
from bkd.models.facts import model_facts
from bkd.models.load import best_device, load_pipeline, training_dtype
from bkd.models.locate import locate
from bkd.recipe.schema import Recipe, Train
from bkd.recipe.stages import Kd, Loss, Stage, Student
from bkd.runs.stage_plan import plan_stages
from bkd.runs.stage_setup import build_method
from bkd.surgery.build import build_student
from bkd.surgery.unet import plan_removal
from bkd.training.fit import Fit
from bkd.training.parallel import start_parallel

ROUNDS, WARM_UP = 40, 3
EMA_DECAY, LR = 0.98, 5e-5
BF16_PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
"""Dense bf16 operations per second, by the maker's data sheets."""


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    model: str
    blocks: str
    batch: int
    mixed_precision: str
    steps: int


def load_teacher(model: str) -> StableDiffusionPipeline:
    """The embedded pipeline, or one of SD 1.x size: its UNet and VAE with random weights."""
    pipe = load_pipeline(locate("shapes"))
    if model == "shapes":
        return pipe
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**SD1, "cross_attention_dim": pipe.text_encoder.config.hidden_size})
    pipe = with_unet(pipe, unet.requires_grad_(False).eval())
    pipe.vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        layers_per_block=2,
        sample_size=512,
    ).requires_grad_(False)
    pipe.vae_scale_factor = 8
    return pipe


def recipe_of(setting: Setting, loss: Loss, **keys: Any) -> Recipe:
    """A recipe of one stage; keys are those of `train`."""
    train = Train(
        batch=setting.batch,
        lr=LR,
        ema=EMA_DECAY,
        max_steps=10**9,
        mixed_precision=setting.mixed_precision,
        prompt_dropout=0.0,
    )
    train = replace(train, **keys)
    return Recipe(train=train, stages=(Stage(student=Student(blocks=setting.blocks), method=Kd(loss=loss)),))


class Ours:
    """The product's step."""

    def __init__(
        self,
        setting: Setting,
        loss: Loss,
        stack: ExitStack,
        *,
        num_samples: int = NUM_SAMPLES,
        **keys: Any,
    ) -> None:
        pipe = load_teacher(setting.model)
        recipe, parallel = recipe_of(setting, loss, **keys), start_parallel("auto")
        teacher = replace(model_facts(locate("shapes")), unet=dict(pipe.unet.config))
        planned = plan_stages(recipe, teacher, side=pipe.unet.config.sample_size)[0]
        method = build_method(planned, pipe, parallel.device)
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        samples = SimulatedSamples(pipe, side, num_samples)
        self.fit = Fit(method, samples, recipe.train, checkpoints=Unsaved(), parallel=parallel, seed=0)
        stack.enter_context(method.watching())
        self._batches: Iterator[Any] = stack.enter_context(closing(self.fit.batches(0)))
        self._step = 0

    def __call__(self) -> None:
        self.fit.update(self._step, self._batches)
        self._step += 1
        if self._step % 10 == 0:
            self.fit._journal.read(stop=False)


class Reference:
    """A step as BK-SDM describes it; its published command also turns gradient checkpointing on."""

    def __init__(self, setting: Setting, *, gradient_checkpointing: bool = False) -> None:
        pipe = load_teacher(setting.model)
        plan = plan_removal(pipe.unet.config, setting.blocks)
        student = build_student(pipe.unet, plan).train()
        if gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self._accelerator = Accelerator(mixed_precision=setting.mixed_precision, cpu=best_device().type == "cpu")
        device = self._accelerator.device
        dtype = training_dtype(setting.mixed_precision)
        self._pipe = pipe.to(device, dtype)
        self._optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
        self._ema = EMAModel(student.parameters(), decay=EMA_DECAY)
        self._student, self._optimizer = self._accelerator.prepare(student, self._optimizer)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1.0)
        self._ema.to(device)
        self._scheduler = DDPMScheduler.from_pretrained(locate("shapes"), subfolder="scheduler")
        self._theirs: dict[str, torch.Tensor] = {}
        self._ours: dict[str, torch.Tensor] = {}
        self._pairs = plan.feature_pairs["block"]
        for pair in self._pairs:
            self._hook(self._pipe.unet, pair.teacher, self._theirs)
            self._hook(self._accelerator.unwrap_model(self._student), pair.student, self._ours)
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self._images = torch.rand(setting.batch, 3, side, side) * 2 - 1
        self._captions = ["a picture"] * setting.batch
        self._batch = setting.batch

    @staticmethod
    def _hook(model: torch.nn.Module, name: str, into: dict[str, torch.Tensor]) -> None:
        def keep(module: torch.nn.Module, inputs: object, output: Any) -> None:
            into[name] = output[0] if isinstance(output, tuple) else output

        model.get_submodule(name).register_forward_hook(keep)

    def __call__(self) -> None:
        pipe, device = self._pipe, self._accelerator.device
        dtype = pipe.unet.dtype
        latents = pipe.vae.encode(self._images.to(device, dtype)).latent_dist.sample() * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (self._batch,), device=device).long()
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        ids = pipe.tokenizer(self._captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = pipe.text_encoder(ids.to(device))[0]
        target = noise
        if self._scheduler.config.prediction_type == "v_prediction":
            target = self._scheduler.get_velocity(latents, noise, timesteps)
        with torch.no_grad():
            teacher_pred = pipe.unet(noisy, timesteps, states).sample
        with self._accelerator.autocast():
            pred = self._student(noisy, timesteps, states).sample
        task = F.mse_loss(pred.float(), target.float())
        output = F.mse_loss(pred.float(), teacher_pred.float())
        features = [
            F.mse_loss(self._ours[p.student].float(), self._theirs[p.teacher].detach().float()) for p in self._pairs
        ]
        feature = sum(features)
        for term in (task, output, feature):
            self._accelerator.gather(term.repeat(self._batch)).mean().item()
        self._accelerator.backward(task + output + feature)
        self._accelerator.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._ema.step(self._student.parameters())


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds of one step, over some."""
    synchronise()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return (time.perf_counter() - started) / steps


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def taking_turns(sides: dict[str, Callable[[], None]], steps: int) -> dict[str, list[float]]:
    """Seconds of a step of each side, in each round."""
    for side in sides.values():
        timed(side, WARM_UP)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS):
        for name in sorted(sides, reverse=bool(turn % 2)):
            found[name].append(timed(sides[name], steps))
    return found


def median_ratio(these: list[float], those: list[float]) -> float:
    """Of times in the same round: the machine's speed may drift from round to round."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def compare(setting: Setting) -> None:
    torch.compiler.reset()  # code for one batch, not for any
    with ExitStack() as stack:
        sides = {
            "reference": Reference(setting),
            "reference, gradient checkpointing": Reference(setting, gradient_checkpointing=True),
            "ours": Ours(setting, Loss(), stack),
            "ours, compiled": Ours(setting, Loss(), stack, compile=True),
        }
        seconds = taking_turns(sides, setting.steps)
    what = f"{setting.model}, batch {setting.batch}, {setting.mixed_precision}"
    print(f"\n| {what} | s a step | images/s | ratio |\n|---|---|---|---|")
    for name in sides:
        median, ratio = statistics.median(seconds[name]), median_ratio(seconds["reference"], seconds[name])
        print(f"| {name} | {median:.4f} | {setting.batch / median:.2f} | {ratio:.2f} |")


def overhead(setting: Setting) -> None:
    """Hooks and three terms against a teacher pass, a student pass and the task loss."""
    with ExitStack() as stack:
        task_alone = Loss(task=1.0, output_kd=0.0, feature_kd=0.0)
        sides = {
            "three terms": Ours(setting, Loss(), stack, ema=0.0),
            "plain": Ours(setting, task_alone, stack, ema=0.0),
        }
        seconds = taking_turns(sides, setting.steps)
    plain, ours = (statistics.median(seconds[name]) for name in ("plain", "three terms"))
    more = median_ratio(seconds["three terms"], seconds["plain"]) - 1
    print(f"\n| two networks | s a step |\n|---|---|\n| task loss alone | {plain:.4f} |")
    print(f"| hooks and three terms | {ours:.4f} ({more:+.1%}) |")


def sizes(setting: Setting) -> None:
    """Step time, in the fastest round, and peak memory of a fresh process as the data set grows."""
    print("\n| samples | s a step at best | peak of the process |\n|---|---|---|")
    for num_samples in (1_000, 10_000, 100_000, 1_000_000):
        arguments = [sys.executable, __file__, "--samples", str(num_samples), "--batches", str(setting.batch)]
        seconds, peak = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()[-2:]
        print(f"| {num_samples:,} | {float(seconds):.4f} | {int(peak) / 2**20:,.0f} MiB |")


def one_size(setting: Setting, num_samples: int) -> None:
    with ExitStack() as stack:
        ours = Ours(setting, Loss(), stack, num_samples=num_samples)
        timed(ours, WARM_UP)
        seconds = min(timed(ours, setting.steps) for _ in range(ROUNDS))
    print(seconds, peak_bytes(best_device()))


def growth(setting: Setting, batches: list[int]) -> None:
    """Throughput, memory and use of the matrix units as the batch grows; CUDA only."""
    device = best_device()
    print("\n| batch | images/s | peak memory | bf16 peak used |\n|---|---|---|---|")
    for batch in batches:
        one = replace(setting, batch=batch)
        torch.cuda.reset_peak_memory_stats()
        with ExitStack() as stack:
            ours = Ours(one, Loss(), stack)
            timed(ours, WARM_UP)
            with FlopCounterMode(display=False) as counter:
                ours()
            seconds = statistics.median(timed(ours, setting.steps) for _ in range(3))
        used = counter.get_total_flops() / seconds / BF16_PEAK.get(torch.cuda.get_device_name(device), float("nan"))
        print(f"| {batch} | {batch / seconds:.1f} | {peak_bytes(device) / 2**30:.1f} GiB | {used:.0%} |")
        del ours


def one_step(setting: Setting) -> None:
    """One optimizer step and the peak memory of this process."""
    with ExitStack() as stack:
        ours = Ours(setting, Loss(), stack)
        seconds = timed(ours, 1)
    print(f"one step: {seconds:.1f} s, peak {peak_bytes(best_device()) / 2**30:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["shapes", "sd1"], default="shapes")
    parser.add_argument("--blocks", default="sd-small")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[32], help="the first one is what the other tables use"
    )
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--steps", type=int, default=2, help="in each turn")
    parser.add_argument("--one-step", action="store_true")
    parser.add_argument("--samples", type=int, help="time our step alone, with so many simulated samples")
    given = parser.parse_args()
    setting = Setting(given.model, given.blocks, given.batches[0], given.mixed_precision, given.steps)
    if given.one_step:
        one_step(replace(setting, batch=1))
    elif given.samples:
        one_size(setting, given.samples)
    else:
        for batch in given.batches:
            compare(replace(setting, batch=batch))
        overhead(setting)
        sizes(setting) if given.model == "shapes" else growth(setting, given.batches)


if __name__ == "__main__":
    main()
