"""Memory of training, part by part: a recipe's method beside what it could have been.

Counted: two optimizer steps of fake tensors, which have sizes and no values; any model and any batch, in seconds, from
configurations alone. Measured: two real steps, in a process that does nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bkd.bench.train import SimulatedSamples
from bkd.errors import BkdError, RecipeError
from bkd.fresh_process import measured_alone, process_peak
from bkd.methods.base import Method, map_tensors
from bkd.models.folder import native_resolution, parts_of, read_json, unet_config, vae_factor
from bkd.models.load import autocast, best_device, describe_device, load_pipeline, training_dtype
from bkd.models.locate import locate_teacher
from bkd.progress import Phase
from bkd.recipe.load import dump_recipe, load_recipe
from bkd.recipe.lora import Lora
from bkd.recipe.schema import Recipe, Train
from bkd.recipe.stages import WHOLE, Finetune, Stage, Student
from bkd.rng import StepRng
from bkd.runs.run import check_stages
from bkd.runs.stage_setup import assemble, place_networks
from bkd.surgery.build import build_empty
from bkd.training.average import Average
from bkd.training.live_bytes import LiveBytes, as_fake, distinct_bytes
from bkd.training.optimizer import GuardedOptimizer
from bkd.training.parallel import Parallel, start_parallel

STEPS = 2
"""In the second the optimizer's state is there from the start."""
USUAL_PRUNING = "sd-small"


def memory_stages(stage: Stage) -> dict[str, Stage]:
    """What is compared, by name: the first is what the others are percentages of."""
    lora, can_share = stage.lora or Lora(), stage.student.path is None
    if isinstance(stage.method, Finetune):
        adapted = replace(stage, lora=replace(lora, share_base=can_share))
        return {"full fine-tune": replace(stage, lora=None), "LoRA fine-tune": adapted}
    pruned = Student(blocks=USUAL_PRUNING) if str(stage.student) == WHOLE else stage.student
    learning = replace(stage, student=Student(blocks=WHOLE), lora=None)
    return {
        "full fine-tune": replace(learning, method=Finetune()),
        "full distillation": learning,
        "LoRA": replace(learning, lora=replace(lora, share_base=False)),
        "LoRA, shared": replace(learning, lora=replace(lora, share_base=True)),
        f"LoRA, {'shared, ' if can_share else ''}{pruned}": replace(
            stage, student=pruned, lora=replace(lora, share_base=can_share)
        ),
    }


def compare_memory(recipe: Recipe, batches: Sequence[int], *, count: bool, phase: Phase) -> dict[str, Any]:
    """Memory of each of `memory_stages`, for each number of images in a pass.

    Args:
        recipe: As validated; its first stage is looked at.
        batches: Images in a pass.
        count: Whether to count fake tensors, instead of measuring real steps in fresh processes.
        phase: Told what begins.

    Returns:
        `how`, `dtype`, `optimizer`, and under `batches`, by batch and name, bytes by part.

    Raises:
        BkdError: If the teacher, or the recipe's stage, does not fit, or a count is not possible.
    """
    teacher = locate_teacher(recipe.teacher, weights=not count)
    stages = memory_stages(recipe.stages[0])
    check_stages(replace(recipe, stages=recipe.stages[:1]), teacher)
    impossible = {name: why for name, stage in stages.items() if (why := _impossible(recipe, stage, teacher))}
    if count and recipe.train.optimizer == "adamw-8bit":
        raise RecipeError(
            "8-bit states cannot be counted",
            where="train.optimizer",
            got=recipe.train.optimizer,
            allowed="adamw, sgd",
            remedy="measure on the GPU, without --count",
        )
    found: dict[int, dict[str, Any]] = {batch: {} for batch in batches}
    for batch, rows in found.items():
        for name, stage in stages.items():
            phase(f"{name}, {batch} images")
            if name in impossible:
                rows[name] = {"skipped": impossible[name]}
                continue
            one = for_one_pass(recipe, stage, batch)
            rows[name] = count_memory(one, teacher) if count else measure_memory(one)
    device = best_device()
    measured = "by the allocator" if device.type == "cuda" else "tensors' bytes, and the process with its libraries"
    return {
        "how": "counted: tensors' bytes" if count else f"measured on {describe_device(device)}: {measured}",
        "dtype": str(training_dtype(recipe.train.mixed_precision)).removeprefix("torch."),
        "optimizer": recipe.train.optimizer,
        "batches": found,
    }


def _impossible(recipe: Recipe, stage: Stage, teacher: Path) -> str | None:
    """Why there is no such row: what is compared with was not asked for, and may not fit."""
    try:
        check_stages(replace(recipe, stages=(stage,)), teacher)
    except BkdError as error:
        return str(error).splitlines()[0]
    return None


def for_one_pass(recipe: Recipe, stage: Stage, batch: int) -> Recipe:
    """The recipe with one stage, and steps of one pass."""
    own = replace(stage.train, batch=None, grad_accum=None)
    train = replace(recipe.train, batch=batch, grad_accum=1, parallel="auto", compile=False)
    return replace(recipe, stages=(replace(stage, train=own),), train=train)


@dataclass(frozen=True)
class Parts:
    """Networks and optimizer of a training in progress."""

    teacher: UNet2DConditionModel | None
    encoders: tuple[nn.Module, ...]
    student: nn.Module
    optimizer: GuardedOptimizer
    average: Average

    def weights(self) -> Iterator[Tensor]:
        """All weights that are on the device."""
        for network in (self.teacher, *self.encoders, self.student):
            if network is not None:
                yield from network.parameters()

    def bytes_at(self, peak: int) -> dict[str, int]:
        """Name -> bytes; what is left of the peak are gradients, activations, and what operations need for a moment."""
        known: set[int] = set()
        moments = (value for state in self.optimizer.state().values() for value in state.values())
        parts = {
            "teacher": distinct_bytes(self.teacher.parameters(), known) if self.teacher is not None else 0,
            "text encoders": distinct_bytes((p for e in self.encoders for p in e.parameters()), known),
            "student": distinct_bytes(self.student.parameters(), known),
            "optimizer": sum(value.numel() * value.element_size() for value in moments if isinstance(value, Tensor)),
            "average": distinct_bytes(self.average.tensors.values(), known),
        }
        return {**parts, "gradients, activations": peak - sum(parts.values()), "peak": peak}


def _steps(method: Method, drawn: Any, train: Train, parallel: Parallel, parts: Parts) -> None:
    method.trainable.train()
    if train.gradient_checkpointing:
        method.trainable.enable_gradient_checkpointing()  # type: ignore[operator]
    with method.watching():
        for step in range(STEPS):
            with autocast(training_dtype(train.mixed_precision), parallel.device):
                total = method.loss(drawn).total
            parts.optimizer.backward(total)
            del total
            parts.optimizer.step(train.lr)
            parts.average.update(step + 1)


def _parts(method: Method, pipe: Any, holds_teacher: bool, train: Train, parallel: Parallel) -> Parts:
    parameters = {name: p for name, p in method.trainable.named_parameters() if p.requires_grad}
    return Parts(
        pipe.unet if holds_teacher else None,
        tuple(pipe.components[name] for name in ("text_encoder", "text_encoder_2") if pipe.components.get(name)),
        method.trainable,
        GuardedOptimizer(train, parameters, parallel),
        Average(parameters, train.ema),
    )


def count_memory(recipe: Recipe, teacher: Path) -> dict[str, int]:
    """Bytes by part at the peak of a step, of fake tensors.

    Args:
        recipe: As `for_one_pass` made it.
        teacher: Pipeline folder; configurations and tokenizers are enough.
    """
    planned, pipe = check_stages(recipe, teacher)[0], _empty_pipeline(teacher)
    train = planned.train
    parallel = Parallel("alone", start_parallel("auto").place, torch.device("cpu"))
    student, holds_teacher = place_networks(planned, pipe, torch.device("meta"))
    samples = SimulatedSamples(pipe, recipe.data.resolution or native_resolution(teacher))
    real = _drawn(assemble(planned, pipe, student), samples, train.batch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, nn.Parameter] = {}
        for network in (pipe.unet, student, *pipe.encoders):
            as_fake(network, made)
        method = assemble(planned, pipe, student)
        drawn = map_tensors(real, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        parts = _parts(method, pipe, holds_teacher, train, parallel)
        with LiveBytes(parts.weights()) as live:
            _steps(method, drawn, train, parallel, parts)
        return parts.bytes_at(live.peak)


def _drawn(method: Method, samples: SimulatedSamples, batch: int) -> Any:
    indices = torch.arange(batch).numpy()
    others = indices if method.needs_others else None
    return method.draw(samples.gather(indices, others=others), StepRng(0, 0, range(batch)))


def _empty_pipeline(folder: Path) -> Any:
    """What a training asks of a pipeline, with networks on the meta device."""
    index, parts = read_json(folder / "model_index.json"), {}
    with torch.device("meta"):
        for name in parts_of(folder):
            if name.startswith("text_encoder"):
                kind = getattr(transformers, index[name][1])
                parts[name] = kind(kind.config_class.from_pretrained(folder / name)).requires_grad_(False).eval()
            elif name.startswith("tokenizer"):
                parts[name] = transformers.AutoTokenizer.from_pretrained(folder / name)
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.18215, latent_channels=4))
    unet = build_empty(unet_config(folder)).requires_grad_(False).eval()
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    config = SimpleNamespace(force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True))
    more = {"vae_scale_factor": vae_factor(folder), "components": parts, "encoders": encoders, "config": config}
    return SimpleNamespace(**parts, unet=unet, vae=vae, **more)


def measure_memory(recipe: Recipe) -> dict[str, Any]:
    """Bytes by part at the peak of a real step in a fresh process; `process`: its resident memory, libraries included.

    Args:
        recipe: As `for_one_pass` made it.

    Returns:
        As `count_memory`, by the allocator's peak on CUDA; or `skipped`: why there is nothing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / "recipe.yaml"
        given.write_text(dump_recipe(recipe), encoding="utf-8")
        return measured_alone("bkd.bench.memory", str(given))


def _measure(recipe: Recipe) -> Mapping[str, Any]:
    teacher = locate_teacher(recipe.teacher)
    planned, pipe = check_stages(recipe, teacher)[0], load_pipeline(teacher)
    train, parallel = planned.train, start_parallel(recipe.train.parallel)
    student, holds_teacher = place_networks(planned, pipe, parallel.device)
    method = assemble(planned, pipe, student)
    samples = SimulatedSamples(pipe, recipe.data.resolution or native_resolution(teacher))
    drawn = map_tensors(_drawn(method, samples, train.batch), lambda tensor: tensor.to(parallel.device))
    parts = _parts(method, pipe, holds_teacher, train, parallel)
    _forget_peak()
    if parallel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(parallel.device)
        _steps(method, drawn, train, parallel, parts)
        return parts.bytes_at(torch.cuda.max_memory_allocated(parallel.device))
    with LiveBytes(parts.weights()) as live:
        _steps(method, drawn, train, parallel, parts)
    return {**parts.bytes_at(live.peak), "process": process_peak()}


def _forget_peak() -> None:
    """Loading a model takes more for a moment than holding it; Linux can start its record anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(load_recipe(sys.argv[1]))) + "\n")
