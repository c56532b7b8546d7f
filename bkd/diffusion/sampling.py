"""Samplers that stock diffusers lacks, as schedulers that its pipelines take.

    pipe.scheduler = StochasticScheduler.from_config(pipe.scheduler.config)

Both walk the trailing grid of N steps and know the next point of it whatever N is; see `bkd.diffusion.grid`.
"""

from __future__ import annotations

from typing import cast, get_args

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from bkd.diffusion.grid import Grid, require_grid, rotation
from bkd.diffusion.noise_schedule import NoiseSchedule, conversion_at
from bkd.diffusion.terms import PredictionType
from bkd.errors import ModelError, one_of


class GridScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What the samplers here have in common: the noise levels, and DDIM steps between any two of them.

    Args:
        num_train_timesteps: As of every diffusers scheduler, and so are the others.
        beta_start: See there.
        beta_end: See there.
        beta_schedule: See there.
        trained_betas: See there.
        rescale_betas_zero_snr: See there.
        prediction_type: `epsilon`, `v_prediction` or `sample`.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012 - diffusers declares it so
    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
    ) -> None:
        one_of(prediction_type, get_args(PredictionType), kind="prediction_type", error=ModelError)
        table = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        kind = cast(PredictionType, prediction_type)
        self._schedule = NoiseSchedule.from_alphas_cumprod(table.alphas_cumprod, kind)
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the number of steps.

        Raises:
            ModelError: If trailing spacing has no such number of points.
        """
        require_grid(self._schedule.num_train_timesteps, num_inference_steps, "num_inference_steps")
        self.num_inference_steps = num_inference_steps
        self._grid = Grid.of(self._schedule, num_inference_steps)
        self.timesteps = self._order(self._grid.timesteps).to(device or "cpu")

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def _order(self, timesteps: Tensor) -> Tensor:
        """From first to last."""
        return timesteps

    def _index(self, timestep: int | Tensor) -> int:
        """Of the interval that a timestep names, from the noisiest."""
        return int((self._grid.timesteps == int(timestep)).nonzero().item())

    def _moved(self, model_output: Tensor, sample: Tensor, start: int, end: int) -> Tensor:
        """DDIM from one point of the grid to another."""
        alpha, sigma = self._grid.alphas[[start]], self._grid.sigmas[[start]]
        cos, sin = rotation(alpha, sigma, self._grid.alphas[end], self._grid.sigmas[end])
        of_p, of_z = conversion_at(alpha, sigma, self._schedule.prediction_type, "v_prediction")
        precise = torch.promote_types(sample.dtype, torch.float32)
        moved = (cos + sin * of_z).item() * sample.to(precise) + (sin * of_p).item() * model_output.to(precise)
        return moved.to(sample.dtype)

    def __len__(self) -> int:
        return self._schedule.num_train_timesteps


class StochasticScheduler(GridScheduler):
    """N steps, each a DDIM step two points ahead and, with fresh noise, one point back; the last goes to the end.

    For students of `halving` with `sampler: stochastic`.

    Source:
        Meng et al. 2022, arXiv:2210.03142, section 3.3 (N-step stochastic sampling).
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next point.

        Args:
            model_output: (B, C, H, W), of the model at `timestep`.
            timestep: One of `timesteps`.
            sample: Same shape, noisy latents there.
            generator: Of the fresh noise: one, or one for each image.
            return_dict: Whether `prev_sample` is an attribute of what is returned.
        """
        index = self._index(timestep)
        ahead = min(index + 2, len(self._grid))
        moved = self._moved(model_output, sample, index, ahead)
        if index + 1 < len(self._grid):
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            moved = self._noised(moved, noise, ahead, index + 1)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _noised(self, sample: Tensor, noise: Tensor, start: int, end: int) -> Tensor:
        """The forward process from one point to a noisier one."""
        alphas, sigmas = self._grid.alphas, self._grid.sigmas
        shrunk = alphas[end] / alphas[start]
        deviation = (sigmas[end] ** 2 - (shrunk * sigmas[start]) ** 2).clamp(min=0).sqrt()
        return float(shrunk) * sample + float(deviation) * noise


class InversionScheduler(GridScheduler):
    """DDIM backwards: N steps from an image's latents to the noise that they would be drawn from.

    A model is told the timestep of the noisier end of a step, as diffusers' `DDIMInverseScheduler` does, which is exact
    only where N divides the number of training timesteps.

    Source:
        Meng et al. 2022, arXiv:2210.03142, section 5 (encoder distillation).
    """

    def _order(self, timesteps: Tensor) -> Tensor:
        return timesteps.flip(0)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the noisier end of a step.

        Args:
            model_output: (B, C, H, W), of the model at `timestep`.
            timestep: One of `timesteps`.
            sample: Same shape, latents at the cleaner end.
            return_dict: Whether `prev_sample` is an attribute of what is returned.
        """
        index = self._index(timestep)
        moved = self._moved(model_output, sample, index + 1, index)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)
