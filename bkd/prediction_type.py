"""What a UNet's output means; apart from the mathematics, so that recipes are read without torch."""

from __future__ import annotations

from typing import Literal

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""The noise, v = alpha eps - sigma x, or the clean latents; diffusers' names."""
