"""Do the installed packages fit together? Answered from package metadata, before anything heavy is imported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import metadata

from bkd.errors import EnvironmentProblem

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface_hub",
    "webdataset",
    "open_clip_torch",
    "torchmetrics",
)
TORCHVISION_REMEDY = "install both from one index in one command: pip install --force-reinstall torch torchvision"


@dataclass(frozen=True)
class Place:
    """This process among those that share a job.

    Attributes:
        rank: 0 or more.
        world_size: How many there are.
    """

    rank: int = 0
    world_size: int = 1


def process_place() -> Place:
    """As `accelerate launch` and `torchrun` say; a process alone without them."""
    return Place(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def shards_networks(wish: str) -> bool:
    """Whether several processes hold networks in shards: `fsdp2`, or `auto` where `accelerate launch` was given so."""
    return wish == "fsdp2" or (wish == "auto" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true")


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torchvision_problem() -> str | None:
    """What is wrong between torch and torchvision, in a sentence, or None.

    A torchvision built for another torch makes diffusers fail to import with an error about an unrelated model
    ("BloomPreTrainedModel"), so it is better found here.
    """
    torch, torchvision = installed_version("torch"), installed_version("torchvision")
    if torch is None or torchvision is None:
        return None  # torch missing fails by itself; without torchvision prune and train work
    wanted = next(
        (
            match[1]
            for line in metadata.requires("torchvision") or []
            if (match := re.match(r"torch\s*\(?==\s*([\w.+]+)", line))
        ),
        None,
    )
    base, _, build = torch.partition("+")
    if wanted is not None and wanted.partition("+")[0] != base:
        return f"torchvision {torchvision} was built for torch {wanted}, but torch {torch} is installed"
    builds = (build, torchvision.partition("+")[2])
    if builds[0] != builds[1] and all(re.fullmatch(r"|cpu|cu\d+|rocm[\d.]+|xpu", label) for label in builds):
        return f"torch {torch} and torchvision {torchvision} come from different indexes (CPU and CUDA builds mixed)"
    return None


def require_working_environment() -> None:
    """Stop before a confusing import error.

    Raises:
        EnvironmentProblem: If torchvision does not match torch.
    """
    if problem := torchvision_problem():
        raise EnvironmentProblem(problem, remedy=TORCHVISION_REMEDY)
