"""The forward process and the three ways to state a prediction.

Notation of Salimans & Ho 2022 (arXiv:2202.00512): z = alpha x + sigma eps, with alpha^2 + sigma^2 = 1, and
v = alpha eps - sigma x. Tables are float64 on the CPU: squared small numbers cancel in float32, and some devices have
no float64 at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bkd.diffusion.terms import PredictionType


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

    def predicting(self, prediction_type: PredictionType) -> NoiseSchedule:
        """The same schedule, for a model that predicts something else."""
        return replace(self, prediction_type=prediction_type)

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

    def conversion(self, timesteps: Tensor, to: PredictionType) -> tuple[Tensor, Tensor]:
        """Factors a, b with which a prediction p of this schedule's type says the same in another: a p + b z.

        Args:
            timesteps: (B,), int64.
            to: The other type.

        Returns:
            Two tensors (B, 1, 1, 1), float32, of float64 arithmetic; see `conversion_at`.
        """
        index = timesteps.to("cpu")
        a, b = conversion_at(self.alphas[index], self.sigmas[index], self.prediction_type, to)
        return a.float().reshape(-1, 1, 1, 1), b.float().reshape(-1, 1, 1, 1)

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weight of a sample's squared error, (B,), float32: min(SNR, gamma) on the clean latents' error.

        Source:
            Hang et al. 2023, arXiv:2303.09556, equations 7 and 8; SNR = alpha^2 / sigma^2.
        """
        return self._error_weight(timesteps, lambda alpha, sigma: torch.minimum(alpha, gamma * sigma))

    def truncated_snr_weight(self, timesteps: Tensor) -> Tensor:
        """Weight of a sample's squared error, (B,), float32: max(SNR, 1) on the clean latents' error.

        Source:
            Salimans & Ho 2022, arXiv:2202.00512, section 4.
        """
        return self._error_weight(timesteps, torch.maximum)

    def _error_weight(self, timesteps: Tensor, of_x: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Weight of a prediction's squared error, from that of the clean latents' error.

        Args:
            timesteps: (B,), int64.
            of_x: From alpha^2 and sigma^2 to the latter weight times sigma^2, which is finite where the SNR is not.
        """
        index = timesteps.to("cpu")
        return error_weight_at(self.alphas[index], self.sigmas[index], self.prediction_type, of_x).float()

    def _at(self, timesteps: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
        index = timesteps.to("cpu")
        shape = (-1,) + (1,) * (like.ndim - 1)
        return (
            self.alphas[index].reshape(shape).to(like.device, like.dtype),
            self.sigmas[index].reshape(shape).to(like.device, like.dtype),
        )


def conversion_at(alpha: Tensor, sigma: Tensor, given: PredictionType, to: PredictionType) -> tuple[Tensor, Tensor]:
    """Factors a, b with which a prediction p of one type says the same in another: a p + b z.

    Args:
        alpha: (B,), of the noisy latents z that the prediction is about.
        sigma: (B,).
        given: The type of p.
        to: The other type.

    Returns:
        Two tensors (B,). Not finite where the prediction does not say what is asked for: an epsilon without signal
        (alpha = 0), clean latents without noise (sigma = 0).

    Source:
        x = (z - sigma eps) / alpha = alpha z - sigma v: arXiv:2202.00512, section 4.
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    factors: dict[tuple[PredictionType, PredictionType], tuple[Tensor, Tensor]] = {
        ("epsilon", "v_prediction"): (1 / alpha, -sigma / alpha),
        ("epsilon", "sample"): (-sigma / alpha, 1 / alpha),
        ("v_prediction", "epsilon"): (alpha, sigma),
        ("v_prediction", "sample"): (-sigma, alpha),
        ("sample", "epsilon"): (-alpha / sigma, 1 / sigma),
        ("sample", "v_prediction"): (-1 / sigma, alpha / sigma),
    }
    return factors.get((given, to), (one, zero))


def error_weight_at(
    alpha: Tensor, sigma: Tensor, predicted: PredictionType, of_x: Callable[[Tensor, Tensor], Tensor] = torch.maximum
) -> Tensor:
    """Weight of a prediction's squared error, (B,), from that of the clean latents' error.

    Args:
        alpha: (B,).
        sigma: (B,).
        predicted: The prediction's type.
        of_x: From alpha^2 and sigma^2 to the latter weight times sigma^2, which is finite where the SNR is not. The
            maximum is truncated SNR, max(SNR, 1) on the clean latents' error: arXiv:2202.00512, section 4.
    """
    alpha, sigma = alpha.square(), sigma.square()
    # An error of x is one of eps times sigma / alpha, and one of v times sigma.
    of_type = {"epsilon": alpha, "v_prediction": torch.ones_like(alpha), "sample": sigma}
    return torch.nan_to_num(of_x(alpha, sigma) / of_type[predicted], nan=1.0)
