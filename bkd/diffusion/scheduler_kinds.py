"""What a scheduler's configuration says of the model that it draws with. Only names and switches are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bkd.errors import ModelError

ODE_SCHEDULERS = (
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Those whose models follow the differential equation that DDIM solves: only noise levels matter, and they have them.
Others, such as those of consistency models, say that the model's steps mean something else."""

NOT_FOR_SAMPLE = (
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
"""Schedulers of diffusers that do not implement prediction_type `sample`."""


def require_ddpm_levels(scheduler: Mapping[str, Any], where: object) -> None:
    """Refuse a model whose noise levels are of another kind than DDPM's.

    Args:
        scheduler: Its configuration.
        where: Its name or file, for errors.

    Raises:
        ModelError: If they are EDM's or flow matching's.
    """
    name = _class_name(scheduler)
    if "EDM" in name or "Flow" in name or scheduler.get("use_flow_sigmas"):
        raise ModelError(
            "this model was not trained on a noise schedule of DDPM's kind",
            where=where,
            got=f"{name} with flow sigmas" if scheduler.get("use_flow_sigmas") else name,
            allowed="schedulers with betas, such as DDIM, PNDM, Euler and DPM-Solver",
        )


def require_ode(scheduler: Mapping[str, Any], model: object) -> None:
    """Refuse a model whose steps are no DDIM steps.

    Args:
        scheduler: Its configuration.
        model: Its name, for errors.

    Raises:
        ModelError: If it is drawn with in another way.
    """
    require_ddpm_levels(scheduler, model)
    name = _class_name(scheduler)
    if name not in ODE_SCHEDULERS or scheduler.get("thresholding"):
        raise ModelError(
            "this model is not drawn with as DDIM would",
            where=model,
            got=f"{name} with thresholding" if name in ODE_SCHEDULERS else name,
            allowed=", ".join(ODE_SCHEDULERS) + ": all of them describe the noise levels that DDIM walks",
            remedy="name one of those in the model's scheduler_config.json, if its noise levels are the same",
        )


def _class_name(scheduler: Mapping[str, Any]) -> str:
    return str(scheduler.get("_class_name"))
