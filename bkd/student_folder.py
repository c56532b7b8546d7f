"""Write a student as a stock pipeline folder, and prove that it loads where `bkd` does not exist."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from bkd.errors import ModelError, OutputError
from bkd.models import parts_of, weight_files
from bkd.surgery.plan import PLAN_FILE, RemovalPlan

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"}
RELOAD_SCRIPT = """
import sys

class NoBkd:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bkd":
            raise ImportError("bkd is not available here")

sys.meta_path.insert(0, NoBkd())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

folder, probe, answer = sys.argv[1:]
torch.set_num_threads(int(sys.stdin.read()))
pipe = DiffusionPipeline.from_pretrained(
    folder, torch_dtype=torch.float32, use_safetensors=True, safety_checker=None, requires_safety_checker=False
)
inputs = load_file(probe)
# Weights that lie unaligned in a mapped file can take other kernels, which round differently.
for parameter in pipe.unet.parameters():
    parameter.data = parameter.data.clone()
with torch.no_grad():
    output = pipe.unet.eval()(inputs["sample"], inputs["timestep"], inputs["prompt_embeds"]).sample
save_file({"output": output}, answer)
"""


def require_free(folder: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse to write over something.

    Args:
        folder: Where output is to go.
        overwrite: Whether an earlier output of the same kind may be replaced.
        marker: A file by which such an output is known; nothing else is ever replaced.

    Raises:
        OutputError: If the folder holds anything else, or it is a file.
    """
    if folder.is_file():
        raise OutputError("the output folder is a file", where=folder, remedy="choose another -o")
    replaceable = (folder / marker).is_file()
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite and replaceable):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:4])
        raise OutputError(
            "the output folder holds something else",
            where=folder,
            got=held,
            remedy="choose another -o" + (", or add --overwrite" if replaceable else ""),
        )


def write_student(
    folder: Path, *, teacher: Path, unet: UNet2DConditionModel, plan: RemovalPlan, facts: dict[str, Any]
) -> None:
    """Write a whole pipeline folder: the teacher's other parts byte for byte, the student's UNet, and its plan.

    The folder appears only when it is complete and another process, in which `bkd` cannot be imported, has loaded it
    with stock diffusers and computed the same output from it.

    Args:
        folder: Must be free; see `require_free`. Replaced as a whole.
        teacher: Pipeline folder to take the other parts from.
        unet: The student.
        plan: How it came from its teacher.
        facts: More to write into the plan file, such as the teacher's digest.

    Raises:
        ModelError: If the reloaded student computes something else.
    """
    folder = folder.resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for part in parts_of(teacher):
            if part != "unet":
                shutil.copytree(teacher / part, unfinished / part, ignore=_other_weights)
        shutil.copyfile(teacher / "model_index.json", unfinished / "model_index.json")
        unet.save_pretrained(unfinished / "unet", safe_serialization=True)
        described = {**json.loads(plan.to_json()), **facts}
        (unfinished / PLAN_FILE).write_text(json.dumps(described, indent=2) + "\n")
        check_reload(unfinished, unet)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    replace_folder(unfinished, folder)


def _other_weights(part: str, names: list[str]) -> set[str]:
    """Weights in other formats and variants, which a plain load does not read."""
    used = {path.name for path in weight_files(Path(part))}
    return {name for name in names if Path(name).suffix in WEIGHT_SUFFIXES and name not in used}


def replace_folder(new: Path, final: Path) -> None:
    """Move a finished folder to its place; what was there is removed only when the new one can take over."""
    old = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    final.parent.mkdir(parents=True, exist_ok=True)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def check_reload(folder: Path, unet: UNet2DConditionModel) -> None:
    """Load a pipeline folder in a process without `bkd` and compare one forward pass with the UNet in memory.

    Raises:
        ModelError: If it does not load there, or one output value differs.
    """
    rng = torch.Generator().manual_seed(0)
    config = unet.config
    probe = {
        "sample": torch.randn(1, config.in_channels, config.sample_size, config.sample_size, generator=rng),
        "timestep": torch.tensor([500]),
        "prompt_embeds": torch.randn(1, 8, config.cross_attention_dim, generator=rng),
    }
    with tempfile.TemporaryDirectory() as scratch:
        probe_file, answer_file = Path(scratch) / "probe.safetensors", Path(scratch) / "answer.safetensors"
        save_file(probe, probe_file)
        finished = subprocess.run(
            [sys.executable, "-c", RELOAD_SCRIPT, str(folder.resolve()), str(probe_file), str(answer_file)],
            cwd=scratch,  # nothing in the user's folder can stand before an installed module
            input=str(torch.get_num_threads()),
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise ModelError(
                "the written student does not load in stock diffusers", where=folder, got=finished.stderr[-800:]
            )
        reloaded = load_file(answer_file)["output"]
    expected = _float32_copy(unet).eval()(probe["sample"], probe["timestep"], probe["prompt_embeds"]).sample
    if not torch.equal(reloaded, expected):
        difference = float((reloaded - expected).abs().max())
        raise ModelError(
            "the reloaded student computes something else", where=folder, got=f"difference {difference:.3g}"
        )


def _float32_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(unet.config)
    state = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in unet.state_dict().items()}
    copy.load_state_dict(state, strict=True, assign=True)
    return copy
