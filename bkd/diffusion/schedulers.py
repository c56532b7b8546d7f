"""Which scheduler draws with a student: the stock one that its folder names, and that of `bkd` where stock has none.

Every field is written out: a teacher's own, such as PNDM's `set_alpha_to_one` and `steps_offset`, would change the
trajectory that the student was trained for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from bkd.diffusion.few_steps import FewSteps
from bkd.diffusion.guidance import StudentKind
from bkd.diffusion.sampling import InversionScheduler, StochasticScheduler

TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""What of a scheduler's configuration the noise schedule consists of."""
CHOICES: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "euler": (EulerDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
"""What each of `bkd.diffusion.terms.SCHEDULERS` stands for."""


def student_scheduler(teacher: Mapping[str, Any], kind: StudentKind) -> dict[str, Any]:
    """The configuration that is written into a student's folder.

    Args:
        teacher: The teacher's.
        kind: How the student is used.
    """
    changed = {"prediction_type": kind.prediction_type} if kind.prediction_type else {}
    known: dict[str, Any] = {**teacher, **changed}
    if kind.few_steps is not None:
        known = json.loads(stock_scheduler(known, kind.few_steps).to_json_string())
    return known


def stock_scheduler(known: Mapping[str, Any], few: FewSteps) -> SchedulerMixin:
    """The stock scheduler that takes `few.stock_steps` steps exactly as they were trained.

    DDIM's step goes to t - T // N, which is the next point of the grid where N divides T only. A first-order
    DPM-Solver++ is the same rotation and goes to the next point whatever N is; but at zero terminal SNR, where it takes
    the square of alpha for 2^-24, it is right to 2e-3 only.

    Args:
        known: A scheduler's configuration.
        few: Number of steps, and direction.
    """
    trained = {name: known[name] for name in TRAINED if known.get(name) is not None}
    trained |= {"prediction_type": known.get("prediction_type", "epsilon"), "timestep_spacing": "trailing"}
    steps, timesteps = few.stock_steps, int(known.get("num_train_timesteps", 1000))
    trained["steps_offset"] = 1  # of no account with trailing spacing; any other makes pipelines warn
    ddim = {"clip_sample": False, "set_alpha_to_one": True, **trained}
    if few.direction == "inversion":
        return DDIMInverseScheduler(**ddim)
    if timesteps % steps == 0:
        return DDIMScheduler(thresholding=False, **ddim)
    return DPMSolverMultistepScheduler(
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        thresholding=False,
        use_karras_sigmas=False,
        lambda_min_clipped=-1e9,  # the default is -Infinity, which is no JSON
        **trained,
    )


def scheduler_of(teacher: SchedulerMixin, kind: StudentKind) -> SchedulerMixin:
    """What a student is drawn with, made from its teacher's scheduler, which stays as it is."""
    config: dict[str, Any] = dict(teacher.config)
    if kind.prediction_type is not None:
        config["prediction_type"] = kind.prediction_type
    if kind.few_steps is None:
        return type(teacher).from_config(config)
    return drawing_scheduler(stock_scheduler(config, kind.few_steps), kind.few_steps)


def chosen_scheduler(name: str, stock: SchedulerMixin) -> SchedulerMixin:
    """Another sampler for a model that takes any number of steps, on the same noise levels, with trailing spacing.

    Args:
        name: One of `CHOICES`.
        stock: The model's own.
    """
    known: Mapping[str, Any] = stock.config
    trained = {key: known[key] for key in TRAINED if known.get(key) is not None}
    trained |= {"prediction_type": known["prediction_type"], "timestep_spacing": "trailing", "steps_offset": 1}
    kind, settings = CHOICES[name]
    return kind(**settings, **trained)


def drawing_scheduler(stock: SchedulerMixin, few: FewSteps | None) -> SchedulerMixin:
    """What a student is used with: its folder's scheduler, or one of `bkd` on the same noise levels."""
    if few is not None and few.direction == "inversion":
        return InversionScheduler.from_config(stock.config)
    if few is not None and few.sampler == "stochastic":
        return StochasticScheduler.from_config(stock.config)
    return stock
