"""How close a student's images are to its teacher's, drawn from the same prompts and noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bkd.eval.statistics import mean_of

IDENTICAL_DB = 100.0
"""Peak signal-to-noise ratio of equal images, which is infinite, and of any that come nearer than this."""


def closeness(
    images: Iterable[Tensor], teacher: Iterable[Tensor], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Mean PSNR and SSIM (Wang et al. 2004) over pairs of images, with intervals.

    Args:
        images: The student's, in batches (B, 3, H, W), uint8.
        teacher: The teacher's, in the same batches; compared pair by pair, because SSIM's windows take much memory.
        device: Where to compute.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr: list[float] = []
    ssim: list[float] = []
    for ours, theirs in zip(images, teacher, strict=True):
        for pair in zip(*(torch.split(batch.to(device).float(), 1) for batch in (ours, theirs)), strict=True):
            ratio = peak_signal_noise_ratio(*pair, data_range=255.0)
            psnr.append(min(float(ratio), IDENTICAL_DB))
            ssim.append(float(structural_similarity_index_measure(*pair, data_range=255.0)))
    return {"psnr_db": asdict(mean_of(psnr)), "ssim": asdict(mean_of(ssim))}
