"""Progressive halving in formulas: the one step that equals two steps of the teacher.

Salimans & Ho 2022, arXiv:2202.00512, section 3; Meng et al. 2022, arXiv:2210.03142, sections 3.2 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bkd.diffusion.grid import Grid, rotation
from bkd.diffusion.noise_schedule import NoiseSchedule, conversion_at, error_weight_at
from bkd.diffusion.terms import Direction, PredictionType, Sampler


@dataclass(frozen=True)
class DoubleSteps:
    """The intervals that a student is to cross in one step and its teacher in two: z, then z', then z''.

    Attributes:
        alphas: (M, 3), float64, at z, z' and z''.
        sigmas: (M, 3), float64.
        timesteps: (M,), int64: what the student is told.
        first_timesteps: (M,), int64: what the teacher is told at z.
        second_timesteps: (M,), int64: what it is told at z'.
    """

    alphas: Tensor
    sigmas: Tensor
    timesteps: Tensor
    first_timesteps: Tensor
    second_timesteps: Tensor

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        num_inference_steps: int,
        *,
        sampler: Sampler = "deterministic",
        direction: Direction = "generation",
    ) -> DoubleSteps:
        """All those of a student.

        Args:
            schedule: Of the model.
            num_inference_steps: N, of the teacher.
            sampler: `deterministic`: the student's N/2 steps. `stochastic`: double steps from all N points, for a
                student that is sampled with N; the last, which has no second half, is a single one.
            direction: `inversion`: from the clean latents to the noise.
        """
        grid = Grid.of(schedule, num_inference_steps)
        starts = torch.arange(0, num_inference_steps, 2 if sampler == "deterministic" else 1)
        points = torch.stack([starts, starts + 1, starts + 2], dim=1).clamp(max=num_inference_steps)
        # A step is named by its noisier end. Where there is no second half, the name is of no account.
        names = grid.timesteps[points.clamp(max=num_inference_steps - 1)]
        if direction == "inversion":
            points = points.flip(1)
            return cls(grid.alphas[points], grid.sigmas[points], names[:, 0], names[:, 1], names[:, 0])
        return cls(grid.alphas[points], grid.sigmas[points], names[:, 0], names[:, 0], names[:, 1])

    def __len__(self) -> int:
        return len(self.timesteps)

    def take(self, index: Tensor) -> DoubleSteps:
        """Some of them, (B,)."""
        return DoubleSteps(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class Crossing:
    """What a double step makes of latents z and predictions p, by factors that depend on the noise levels alone.

    Attributes:
        halfway: Of z and of the teacher's first prediction p: their sum is z'.
        target: Of z, p, z' and of the second prediction p': their sum is what the student is to predict at z.
        single: Of z and p: what the student would predict to cross the interval as the teacher does in one step.
        weight: Of the squared error of the student's prediction.

    All are (B,) or (B, 1, 1, 1), a tensor for each factor.
    """

    halfway: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor, Tensor, Tensor]
    single: tuple[Tensor, Tensor]
    weight: Tensor


def crossing(steps: DoubleSteps, teacher: PredictionType, student: PredictionType) -> Crossing:
    """What a double step takes: (B,), float64.

    The rotations by d (z to z') and d' (z' to z'') are one by d + d' if v* = (z'' - cos(d + d') z) / sin(d + d').
    With z'' = cos d' (cos d z + sin d v) + sin d' v' nothing is left that cancels:

        v* = (sin d sin d' z + cos d' sin d v + sin d' v') / sin(d + d')

    Errors are weighted by max(SNR, 1) on the clean latents (arXiv:2202.00512, section 4), which is
    max(alpha^2, sigma^2) on v.

    Args:
        steps: B of them.
        teacher: What the teacher predicts.
        student: What the student does.
    """
    (a, a1, a2), (s, s1, s2) = steps.alphas.unbind(1), steps.sigmas.unbind(1)
    cos, sin = rotation(a, s, a1, s1)
    cos1, sin1 = rotation(a1, s1, a2, s2)
    sin2 = rotation(a, s, a2, s2)[1]
    v_p, v_z = conversion_at(a, s, teacher, "v_prediction")
    # Where a step is single there is no p', and clean latents would make this infinite.
    v1_p1, v1_z1 = (torch.where(sin1 == 0, 0, factor) for factor in conversion_at(a1, s1, teacher, "v_prediction"))
    of_v, of_z = conversion_at(a, s, "v_prediction", student)
    first, second = of_v * cos1 * sin / sin2, of_v * sin1 / sin2  # of v and v'
    single_p, single_z = conversion_at(a, s, teacher, student)
    return Crossing(
        halfway=(cos + sin * v_z, sin * v_p),
        target=(of_z + of_v * sin * sin1 / sin2 + first * v_z, first * v_p, second * v1_z1, second * v1_p1),
        single=(single_z, single_p),
        weight=error_weight_at(a, s, student),
    )
