"""Latency, memory and size of models, measured side by side on one device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from bkd import __version__
from bkd.diffusion.few_steps import steps_of
from bkd.diffusion.guidance import nearest_scale, passes_a_step, pipeline_scale
from bkd.environment import PACKAGES, installed_version
from bkd.errors import ModelError, one_of
from bkd.eval.candidates import Named, load_candidate
from bkd.eval.peak_memory import measure_peak
from bkd.models.folder import parts_of, prompt_length, unet_config, weight_files
from bkd.models.load import describe_device, dtype_named, release_memory
from bkd.progress import Phase, Progress
from bkd.surgery.cost import unet_cost
from bkd.surgery.probe import as_arguments, unet_inputs

PARTS = ("unet", "step", "pipeline")
USUAL_PARTS = ("unet", "pipeline")
MODES = ("eager", "compiled")
WARM_UPS = 2
PROMPT = "a photo of a small house by the sea"


@dataclass(frozen=True)
class SpeedWish:
    """What to measure: every combination of the lists.

    Attributes:
        parts: `unet`: one forward pass of so many samples. `step`: what the UNet does in one denoising step of so many
            images: a pass of twice as many samples, for models that are guided by two. `pipeline`: text, all steps
            with guidance, decoding.
        batches: Samples of a pass, or images of a pipeline call.
        modes: Eager, or through `torch.compile`.
        dtypes: By torch's names.
        rounds: Measurements of each; in each round every model has its turn.
        num_inference_steps: Of the pipeline.
        guidance_scale: Of the pipeline; above 1 every step evaluates the UNet twice.
        nearest_scale: Whether students that have not learnt this one are called with the nearest that they have.
    """

    parts: tuple[str, ...] = USUAL_PARTS
    batches: tuple[int, ...] = (1, 8)
    modes: tuple[str, ...] = ("eager",)
    dtypes: tuple[str, ...] = ("float32",)
    rounds: int = 10
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    nearest_scale: bool = False

    def cases(self, dtype: str) -> list[Case]:
        """Those of one dtype: eager ones first, because compiling cannot be undone."""
        modes = [mode for mode in MODES if mode in self.modes]
        return [Case(p, b, m, dtype) for m, p, b in itertools.product(modes, self.parts, self.batches)]


@dataclass(frozen=True)
class Case:
    """One kind of call."""

    part: str
    batch: int
    mode: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.part}, batch {self.batch}, {self.mode}, {self.dtype}"


def require_possible(wish: SpeedWish, device: torch.device) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        ModelError: If a word is unknown, or the device does not compute in a dtype.
    """
    for word in wish.parts:
        one_of(word, PARTS, kind="part", error=ModelError)
    for word in wish.modes:
        one_of(word, MODES, kind="mode", error=ModelError)
    for word in wish.dtypes:
        dtype_named(word, device)


def bench_speed(
    models: Sequence[Named],
    wish: SpeedWish,
    device: torch.device,
    *,
    memory: bool = True,
    phase: Phase,
    progress: Progress,
) -> dict[str, Any]:
    """Measure models in turns, so that what slows the machine down slows all of them.

    Args:
        models: The first is what the others are compared with.
        wish: What to measure.
        device: Where.
        memory: Whether to measure peak memory, too, each in a process of its own.
        phase: Told what begins.
        progress: Called with (done, total) rounds of it.

    Returns:
        `device`, `versions`, `settings`, `digests`, and for each model its size and, by case, its times and memory.

    Raises:
        ModelError: If a dtype is none that the device computes in, or a model has not learnt the guidance scale.
    """
    rows: list[dict[str, Any]] = [
        {"name": model.name, **size_of(model), **_drawing_of(model, wish), "cases": {}} for model in models
    ]
    for name in wish.dtypes:
        _time_dtype(rows, models, wish, name, device, phase, progress)
        release_memory(device)
    if memory:
        _add_memory(rows, models, wish, device, phase, progress)
    return {
        "device": describe_device(device),
        "versions": {"bkd": __version__, **{name: installed_version(name) for name in PACKAGES}},
        "settings": asdict(wish),
        "digests": {model.name: model.digest for model in models},
        "models": rows,
    }


def _time_dtype(
    rows: Sequence[dict[str, Any]],
    models: Sequence[Named],
    wish: SpeedWish,
    name: str,
    device: torch.device,
    phase: Phase,
    progress: Progress,
) -> None:
    """Every case of one dtype; when it returns, nothing holds the models any more."""
    phase(f"loading {len(models)} models in {name}")
    pipes = [load_candidate(model, dtype_named(name, device), device) for model in models]
    for case in wish.cases(name):
        if case.mode == "compiled":
            _compile([pipe.unet for pipe in pipes])
        phase(f"{case}: first calls")
        calls = [call_of(case, pipe, wish_for(model, wish)) for model, pipe in zip(models, pipes, strict=True)]
        first = [_seconds(call, device) for call in calls]
        phase(str(case))
        times = take_turns(calls, wish.rounds, device, progress)
        for row, taken, warm_up in zip(rows, times.T, first, strict=True):
            row["cases"][str(case)] = {**asdict(case), **_summary(taken, times[:, 0]), "first_call_s": warm_up}


def _compile(unets: Sequence[nn.Module]) -> None:
    """Compile networks in place, from nothing and for one shape each.

    Networks of one class count as one for the compiler, which silently runs eagerly what it compiled too often.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(unets))
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for unet in unets:
        unet.compile(dynamic=False, options={"layout_optimization": False})


def take_turns(
    calls: Sequence[Callable[[], object]], rounds: int, device: torch.device, progress: Progress
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds of each call in each round, (rounds, calls), after warming up; who begins changes from round to round."""
    for call in calls:
        for _ in range(WARM_UPS - 1):
            _seconds(call, device)
    times = np.zeros((rounds, len(calls)))
    for turn in range(rounds):
        for place in range(len(calls)):
            number = (turn + place) % len(calls)
            times[turn, number] = _seconds(calls[number], device)
        progress(turn + 1, rounds)
    return times


def wish_for(model: Named, wish: SpeedWish) -> SpeedWish:
    """The wish with the `guidance_scale` and the steps that this model's pipeline is to be called with.

    Raises:
        ModelError: If the model does not draw, or draws guided in one pass, and not at that scale.
    """
    own = _drawing_of(model, wish)
    return replace(wish, **{**own, "guidance_scale": pipeline_scale(model.folder, own["guidance_scale"], model.name)})


def _drawing_of(model: Named, wish: SpeedWish) -> dict[str, Any]:
    """Steps and guidance that a model draws with, in its user's words."""
    asked = wish.guidance_scale
    return {
        "num_inference_steps": steps_of(model.folder, wish.num_inference_steps, model.name),
        "guidance_scale": nearest_scale(model.folder, asked) if wish.nearest_scale else asked,
    }


def call_of(case: Case, pipe: StableDiffusionPipeline, wish: SpeedWish) -> Callable[[], object]:
    """What is timed."""
    if case.part == "pipeline":
        prompts = [PROMPT] * case.batch
        steps, guidance = wish.num_inference_steps, wish.guidance_scale
        return lambda: pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="pt")
    unet, tokens = pipe.unet, pipe.text_encoder.config.max_position_embeddings
    one = unet_inputs(unet.config, side=unet.config.sample_size, num_tokens=tokens)
    count = case.batch * (passes_a_step(unet.config, wish.guidance_scale) if case.part == "step" else 1)
    inputs = {name: tensor.expand(count, *tensor.shape[1:]).to(pipe.device) for name, tensor in one.items()}
    inputs = {name: x.to(unet.dtype) if x.is_floating_point() else x for name, x in inputs.items()}

    @torch.no_grad()
    def step() -> object:
        return unet(**as_arguments(inputs))

    return step


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for a device that works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(times: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Median and 90th percentile in seconds; the speed-up is the median over rounds of the ratio of times."""
    return {
        "median_s": float(np.median(times)),
        "p90_s": float(np.quantile(times, 0.9)),
        "speed_up": float(np.median(reference / times)),
        "rounds": len(times),
    }


def size_of(model: Named) -> dict[str, Any]:
    """Parameters, multiply-accumulates by both conventions, and bytes on disk."""
    cost = unet_cost(unet_config(model.folder), num_tokens=prompt_length(model.folder))
    parts = [part for part in parts_of(model.folder) if (model.folder / part / "config.json").is_file()]
    sizes = {part: sum(file.stat().st_size for file in weight_files(model.folder / part)) for part in parts}
    return {
        "unet_parameters": cost.parameters,
        "unet_macs": cost.macs,
        "unet_macs_without_attention": cost.macs_without_attention,
        "unet_bytes": sizes["unet"],
        "pipeline_bytes": sum(sizes.values()),
    }


def _add_memory(
    rows: Sequence[dict[str, Any]],
    models: Sequence[Named],
    wish: SpeedWish,
    device: torch.device,
    phase: Phase,
    progress: Progress,
) -> None:
    """Peak memory of each eager case; of others in the same process it would hold the other models, too."""
    phase("peak memory, each in a process of its own")
    asked = list(_memory_cases(models, wish))
    for done, (number, case) in enumerate(asked, 1):
        found = measure_peak(
            models[number].folder,
            asdict(case),
            num_inference_steps=wish_for(models[number], wish).num_inference_steps,
            guidance_scale=wish_for(models[number], wish).guidance_scale,
            device=device,
        )
        rows[number]["cases"].setdefault(str(case), asdict(case))["memory"] = found
        progress(done, len(asked))


def _memory_cases(models: Sequence[Named], wish: SpeedWish) -> Iterator[tuple[int, Case]]:
    for dtype, part, batch in itertools.product(wish.dtypes, wish.parts, wish.batches):
        for number in range(len(models)):
            yield number, Case(part, batch, "eager", dtype)
