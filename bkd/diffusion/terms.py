"""Short words that recipes, files and formulas have in common."""

from __future__ import annotations

from typing import Literal

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""What a UNet's output means: the noise, v = alpha eps - sigma x, or the clean latents."""
Sampler = Literal["deterministic", "stochastic"]
"""Of few steps: DDIM, or two steps ahead and, with fresh noise, one back."""
Direction = Literal["generation", "inversion"]
"""From noise to an image, or from an image to the noise that it would be drawn from."""
DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""What weights are computed in or written as, by torch's names."""
SCHEDULERS = ("ddim", "ddpm", "dpm++", "euler", "unipc")
"""Samplers by the names that people know them by."""
