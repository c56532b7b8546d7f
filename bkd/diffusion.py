"""The forward process and the three ways to state a prediction.

Notation of Salimans & Ho 2022 (arXiv:2202.00512): z = alpha x + sigma eps, with alpha^2 + sigma^2 = 1, and
v = alpha eps - sigma x. Tables are float64 on the CPU: squared small numbers cancel in float32, and some devices have
no float64 at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha and sigma of every training timestep, and what the model predicts.

    Attributes:
        alphas: (T,), float64, decreasing from nearly 1.
        sigmas: (T,), float64, increasing to nearly 1.
        prediction_type: What the UNet's output means.
    """

    alphas: Tensor
    sigmas: Tensor
    prediction_type: PredictionType

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, prediction_type: PredictionType) -> NoiseSchedule:
        """From a diffusers scheduler's `alphas_cumprod`, which is alpha squared."""
        squared = alphas_cumprod.detach().to("cpu", torch.float64)
        return cls(squared.sqrt(), (1 - squared).sqrt(), prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z = alpha x + sigma eps: (B, C, H, W) like `latents`; `timesteps` is (B,), int64."""
        alpha, sigma = self._at(timesteps, like=latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect model would predict for `add_noise(latents, noise, timesteps)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = self._at(timesteps, like=latents)
        return alpha * noise - sigma * latents  # v, equation in section 4 of arXiv:2202.00512

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weight of a sample's squared error, (B,), float32: min(SNR, gamma) on the clean latents' error.

        Source:
            Hang et al. 2023, arXiv:2303.09556, equations 7 and 8; SNR = alpha^2 / sigma^2.
        """
        index = timesteps.to("cpu")
        alpha, sigma = self.alphas[index], self.sigmas[index]
        bounded = torch.minimum(alpha.square(), gamma * sigma.square())  # min(SNR, gamma) sigma^2
        # An error of x is one of eps times sigma / alpha, and one of v times sigma.
        of_type = {"epsilon": alpha.square(), "v_prediction": torch.ones_like(alpha), "sample": sigma.square()}
        return torch.nan_to_num(bounded / of_type[self.prediction_type], nan=1.0).float()

    def _at(self, timesteps: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
        index = timesteps.to("cpu")
        shape = (-1,) + (1,) * (like.ndim - 1)
        return (
            self.alphas[index].reshape(shape).to(like.device, like.dtype),
            self.sigmas[index].reshape(shape).to(like.device, like.dtype),
        )
