"""Proofs that a written student is what it should be: its tensors are its teacher's, and anyone can load it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bkd.errors import ModelError
from bkd.models.folder import unet_config, weight_files
from bkd.surgery.plan import RemovalPlan
from bkd.surgery.probe import as_arguments, unet_inputs

RELOAD_SCRIPT = """
import sys

class NoBkd:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bkd":
            raise ImportError("bkd is not available here")

sys.meta_path.insert(0, NoBkd())
import diffusers
import torch
from safetensors.torch import load_file, save_file

folder, probe, answer, lora, original, kind = sys.argv[1:]
threads, dtype = sys.stdin.read().split()
torch.set_num_threads(int(threads))
dtype = getattr(torch, dtype)

def from_folder(**parts):
    options = {"use_safetensors": True, "safety_checker": None, "requires_safety_checker": False, **parts}
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **options)

def require_same_parts(pipe, twin):
    for name, part in twin.components.items():
        if isinstance(part, torch.nn.Module):
            theirs, ours = part.state_dict(), pipe.components[name].state_dict()
            if theirs.keys() != ours.keys() or not all(torch.equal(theirs[key], ours[key]) for key in theirs):
                sys.exit(f"the file's {name} is not the folder's")

if original:
    pipe = getattr(diffusers, kind).from_single_file(original, config=folder, torch_dtype=dtype, local_files_only=True)
    require_same_parts(pipe, from_folder(unet=None))
else:
    pipe = from_folder()
if lora:
    pipe.load_lora_weights(lora)
unet = pipe.unet.eval()
del pipe

def align(module, inputs):
    module.mapped = [parameter.data for parameter in module.parameters(recurse=False)]
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.clone()

def release(module, inputs, output):
    for parameter, data in zip(module.parameters(recurse=False), module.mapped):
        parameter.data = data

for module in unet.modules():
    module.register_forward_pre_hook(align)
    module.register_forward_hook(release)
inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(probe).items()}
added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
with torch.no_grad():
    output = unet(**inputs, added_cond_kwargs=added or None).sample
save_file({"output": output}, answer)
"""
PROBE_TOKENS = 8
LORA_TOLERANCE = 1e-5
"""Of a LoRA file: alpha / r is multiplied in where the training multiplied outputs."""
BEYOND = 65_000.0
"""Stands for NaN, which equals nothing: random inputs can overflow a float16 network, in both processes alike."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    file: Path
    start: int
    stop: int

    def read(self) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.stop - self.start)


def check_finite(student: UNet2DConditionModel, plan: RemovalPlan, teacher: Path) -> None:
    """Refuse a teacher whose weights are spoiled; its student would compute NaN, and so would every proof.

    Args:
        student: Holds the teacher's tensors that are kept.
        plan: How it came from the teacher.
        teacher: Pipeline folder; to name in errors.

    Raises:
        ModelError: If a weight is NaN or infinite.
    """
    spoiled = [name for name, tensor in student.named_parameters() if not tensor.isfinite().all()]
    if spoiled:
        raise ModelError(
            "the teacher's weights hold NaN or infinity",
            where=teacher / "unet",
            got=f"{len(spoiled)} tensors, the first: {plan.source_of(spoiled[0])}",
            remedy="get the model again, or save it in float32 or bfloat16: values beyond 65,504 do not fit float16",
        )


def check_tensors(student: Path, teacher: Path, plan: RemovalPlan) -> int:
    """Compare every tensor of a pruned student, as written, with the teacher's tensor that the plan names.

    Reads one tensor of each at a time.

    Args:
        student: Pipeline folder.
        teacher: Pipeline folder.
        plan: How the one came from the other.

    Returns:
        How many tensors there are.

    Raises:
        ModelError: If one differs in a single bit.
    """
    theirs = dict(_stored_tensors(teacher / "unet"))
    ours = dict(_stored_tensors(student / "unet"))
    for key, tensor in ours.items():
        source = plan.source_of(key)
        if tensor.read() != theirs[source].read() and not _equal_after_cast(key, tensor, source, theirs[source]):
            raise ModelError("a written tensor is not its teacher's", where=tensor.file, got=f"{key} <- {source}")
    return len(ours)


def _stored_tensors(part: Path) -> Iterator[tuple[str, StoredTensor]]:
    for file in weight_files(part):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                start, stop = entry["data_offsets"]
                yield key, StoredTensor(file, 8 + length + start, 8 + length + stop)


def _equal_after_cast(key: str, ours: StoredTensor, source: str, theirs: StoredTensor) -> bool:
    """A teacher that mixes dtypes is written in one."""
    with safe_open(ours.file, framework="pt") as mine, safe_open(theirs.file, framework="pt") as other:
        written, original = mine.get_tensor(key), other.get_tensor(source)
    return written.dtype != original.dtype and torch.equal(written, original.to(written.dtype))


@torch.no_grad()
def probe_output(unet: UNet2DConditionModel) -> Tensor:
    """What a UNet computes from the probe, in its own dtype, with memory for one layer's weights only.

    Weights that lie unaligned in a mapped file can take other CPU kernels, which round differently; so each layer
    computes with an aligned copy that lives as long as its own forward pass. The reload script does the same.

    Returns:
        (1, C, s, s) with s = 2 to the power of the number of levels.
    """
    mapped: dict[nn.Module, list[Tensor]] = {}

    def align(module: nn.Module, inputs: object) -> None:
        mapped[module] = [parameter.data for parameter in module.parameters(recurse=False)]
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()

    def release(module: nn.Module, inputs: object, output: object) -> None:
        for parameter, data in zip(module.parameters(recurse=False), mapped.pop(module), strict=True):
            parameter.data = data

    handles = [module.register_forward_pre_hook(align) for module in unet.modules()]
    handles += [module.register_forward_hook(release) for module in unet.modules()]
    inputs = {name: x.to(unet.dtype) if x.is_floating_point() else x for name, x in _probe(unet.config).items()}
    try:
        output: Tensor = unet.eval()(**as_arguments(inputs)).sample
    finally:
        for handle in handles:
            handle.remove()
    return output


def _probe(config: Mapping[str, Any]) -> dict[str, Tensor]:
    # 2 x 2 at the innermost level: at 1 x 1 attention has nothing to choose from, and its weights would not matter.
    side = 2 ** len(config["down_block_types"])
    return unet_inputs(config, side=side, num_tokens=PROBE_TOKENS)


def check_reload(folder: Path, expected: Tensor) -> None:
    """Load a pipeline folder in a process without `bkd` and compare one forward pass.

    Args:
        folder: As written.
        expected: What `probe_output` gave for the UNet in memory, in the dtype to reload in.

    Raises:
        ModelError: If it does not load there, or one output value differs.
    """
    _require_equal(_reloaded_output(folder, expected.dtype), expected, folder)


def check_original(file: Path, like: Path, pipeline: str, expected: Tensor) -> None:
    """Load a file in the original layout in a process without `bkd` and compare one forward pass, and all other parts.

    Args:
        file: As written.
        like: Pipeline folder of the same model: configuration, and every part but the UNet.
        pipeline: diffusers' class for it.
        expected: What `probe_output` gave for the UNet in memory, in the dtype to reload in.

    Raises:
        ModelError: If it does not load there, one output value differs, or another part is not the folder's.
    """
    _require_equal(_reloaded_output(like, expected.dtype, original=file, pipeline=pipeline), expected, file)


def _require_equal(reloaded: Tensor, expected: Tensor, where: Path) -> None:
    if not torch.equal(reloaded.nan_to_num(nan=BEYOND), expected.nan_to_num(nan=BEYOND)):
        difference = float((reloaded.float() - expected.float()).abs().max())
        raise ModelError(
            "the reloaded student computes something else", where=where, got=f"difference {difference:.3g}"
        )


def check_lora(lora: Path, teacher: Path, expected: Tensor) -> None:
    """Load a LoRA file on a pipeline in a process without `bkd` and compare one forward pass.

    Args:
        lora: As written.
        teacher: Pipeline folder of the model that it is for.
        expected: What `probe_output` gave for the student in memory.

    Raises:
        ModelError: If it does not load there, or the output differs by more than rounding.
    """
    reloaded = _reloaded_output(teacher, expected.dtype, lora=lora)
    if not torch.allclose(reloaded, expected, rtol=LORA_TOLERANCE, atol=LORA_TOLERANCE * float(expected.abs().max())):
        difference = float((reloaded - expected).abs().max())
        raise ModelError(
            "the LoRA file on its model computes something else", where=lora, got=f"difference {difference:.3g}"
        )


def _reloaded_output(
    folder: Path, dtype: torch.dtype, *, lora: Path | None = None, original: Path | None = None, pipeline: str = ""
) -> Tensor:
    """What a stock pipeline's UNet computes from the probe, in a process without `bkd`."""
    with tempfile.TemporaryDirectory() as scratch:
        probe_file, answer_file = Path(scratch) / "probe.safetensors", Path(scratch) / "answer.safetensors"
        save_file(_probe(unet_config(folder)), probe_file)
        files = [str(file.resolve()) if file else "" for file in (lora, original)]
        finished = subprocess.run(
            [sys.executable, "-c", RELOAD_SCRIPT, str(folder.resolve()), probe_file, answer_file, *files, pipeline],
            cwd=scratch,  # nothing in the user's folder can stand before an installed module
            input=f"{torch.get_num_threads()} {str(dtype).removeprefix('torch.')}",
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise ModelError(
                "what was written does not load in stock diffusers",
                where=lora or original or folder,
                got=finished.stderr[-800:],
            )
        return load_file(answer_file)["output"]
