"""The noise levels that a few-step sampler stops at, and DDIM between them.

With alpha = cos phi and sigma = sin phi, a DDIM step from z to z' is a rotation (Salimans & Ho 2022, arXiv:2202.00512,
appendix D): z' = cos(phi' - phi) z + sin(phi' - phi) v. It is the same towards the clean latents and back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.errors import ModelError


@dataclass(frozen=True)
class Grid:
    """N + 1 points, the noisiest first, the clean latents last.

    A network's timestep names the interval that begins at it: it is told the same one whichever way the interval is
    crossed, since clean latents have none of their own.

    Attributes:
        timesteps: (N,), int64: of all points but the last; diffusers' `trailing` spacing.
        alphas: (N + 1,), float64; the last is 1.
        sigmas: (N + 1,), float64; the last is 0.
    """

    timesteps: Tensor
    alphas: Tensor
    sigmas: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, num_inference_steps: int) -> Grid:
        """The grid of so many steps.

        Args:
            schedule: Of the model.
            num_inference_steps: One for which `divides_evenly` holds.
        """
        timesteps = trailing_timesteps(schedule.num_train_timesteps, num_inference_steps)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return cls(
            timesteps, torch.cat([schedule.alphas[timesteps], one]), torch.cat([schedule.sigmas[timesteps], zero])
        )

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.timesteps)


def trailing_timesteps(num_train_timesteps: int, num_inference_steps: int) -> Tensor:
    """(N,), int64, descending: as diffusers' schedulers space them with `timestep_spacing="trailing"`."""
    # NumPy's, like theirs: torch.arange adds up otherwise, and rounds other points up.
    points = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_inference_steps)
    return torch.from_numpy(points.round().astype(np.int64)) - 1


def is_grid(num_train_timesteps: int, num_inference_steps: int) -> bool:
    """Whether that spacing gives as many points as there are steps; for 61 of 1,000, say, rounding adds one."""
    return len(trailing_timesteps(num_train_timesteps, num_inference_steps)) == num_inference_steps


def require_grid(num_train_timesteps: int, num_inference_steps: int, where: object) -> None:
    """Refuse a number of steps for which `is_grid` does not hold.

    Raises:
        ModelError: Naming `where`.
    """
    if not 0 < num_inference_steps <= num_train_timesteps or not is_grid(num_train_timesteps, num_inference_steps):
        raise ModelError(
            "this number of steps has no grid of its own",
            where=where,
            got=f"{num_inference_steps} of {num_train_timesteps:,} timesteps",
            allowed=f"1 to {num_train_timesteps}; divisors and powers of two always have one",
        )


def nests(num_train_timesteps: int, num_inference_steps: int) -> bool:
    """Whether every second point of the grid of so many steps makes up the grid of half as many."""
    if num_inference_steps % 2 or not is_grid(num_train_timesteps, num_inference_steps):
        return False
    fine = trailing_timesteps(num_train_timesteps, num_inference_steps)
    coarse = trailing_timesteps(num_train_timesteps, num_inference_steps // 2)
    return torch.equal(fine[::2], coarse)


def rotation(alpha: Tensor, sigma: Tensor, new_alpha: Tensor, new_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle between two noise levels: z' = cos z + sin v, with z and v at the first."""
    return new_alpha * alpha + new_sigma * sigma, new_sigma * alpha - new_alpha * sigma
