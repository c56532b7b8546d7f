"""Trainings that tests start with `accelerate launch` on several processes: LATENTS OUT NAME…"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from bkd.data.latent_folder import open_latents
from bkd.data.latent_set import LatentSet
from bkd.lora.adapters import add_adapters
from bkd.models.load import load_pipeline
from bkd.models.locate import locate
from bkd.recipe.lora import Lora
from bkd.recipe.stages import Loss
from bkd.surgery.build import build_student
from bkd.surgery.unet import plan_removal
from bkd.training.parallel import start_parallel
from bkd.training.stop import Interrupted, StopSignal
from tests.training import kd, make_fit

STEPS = 20
SGD = {"optimizer": "sgd", "lr": 0.02, "max_grad_norm": 0.0}
RUNS = {
    "sgd": SGD,
    "adamw": {"lr": 1e-3},
    "passes": {**SGD, "grad_accum": 2},
    "recomputed": {**SGD, "gradient_checkpointing": True, "max_steps": 5},
    "features-only": {**SGD, "max_steps": 5},
    "captions": {**SGD, "max_steps": 5},
    "adapters": {**SGD, "lr": 0.1, "max_steps": 5},
    "stopped": {"lr": 1e-3},
    "continued": {"lr": 1e-3},
}
METHODS = {
    "features-only": {"loss": Loss(task=0.0, output_kd=0.0)},
    "captions": {
        "loss": Loss(balancing="teacher-power", min_snr_gamma=5.0),
        "sites": "self-attn",
        "random_conditioning": True,
    },
}


def adapted(pipe, *, share):
    """A student with adapters over the teacher's weights, or over a copy, which shards need."""
    student = build_student(pipe.unet, plan_removal(pipe.unet.config, "sd-tiny"), share_base=share)
    add_adapters(student, Lora(r=4, also_train=("norms",)), seed=1)
    return student


def run(name, latents, out):
    folder = locate("shapes")
    pipe = load_pipeline(folder)
    data = LatentSet(open_latents(latents), out)
    parallel = start_parallel("auto")
    losses = []
    place = out / ("stopped" if name == "continued" else name)
    settings = {"max_steps": STEPS, "checkpoint_every": STEPS, **RUNS[name]}
    student = adapted(pipe, share=parallel.kind != "fsdp2") if name == "adapters" else None
    method = kd(pipe, folder, student=student, **METHODS.get(name, {}))
    fit = make_fit(method, data, place / "checkpoints", losses.append, parallel=parallel, **settings)
    if name == "stopped":  # one process is asked, all stop
        fit._reads_after = lambda done, stop: setattr(stop, "requested", parallel.place.rank == 1) or done == 7
    with suppress(Interrupted), StopSignal() as stop:
        fit.run(stop)
    weights = fit.average_in_full()
    if parallel.is_main:
        (out / name).mkdir(exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, out / name / "weights.safetensors")
        facts = {"kind": parallel.kind, "totals": [report.total for report in losses]}
        (out / name / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    for wanted in sys.argv[3:]:
        run(wanted, Path(sys.argv[1]), Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
