"""InceptionV3 as FID, KID and IS know it: TensorFlow's network of 2015, from a weight file on this machine."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkd.data.weight_files import read_tensors
from bkd.environment import installed_version
from bkd.errors import DataError, EnvironmentProblem
from bkd.files import file_digest

NUM_FEATURES = 2048
SIDE = 299
PUBLISHED = "6726825d"
"""How the SHA-256 of the published weights begins; torch-fidelity's and pytorch-fid's files are the same."""
WHERE = "pt_inception-2015-12-05-6726825d.pth, from the releases of mseitzer/pytorch-fid"
Resize = Literal["pytorch-fid", "torch-fidelity"]


@dataclass(frozen=True, eq=False)
class Inception:
    """The network, and what its figures depend on.

    Attributes:
        body: torch-fidelity's layers up to the features, frozen, float32.
        classes: (1008, 2048), the last layer's weight; IS leaves its bias out.
        digest: SHA-256 of the weight file.
    """

    body: nn.Module
    classes: Tensor
    digest: str

    @property
    def num_features(self) -> int:
        return int(self.classes.shape[1])

    @property
    def name(self) -> str:
        """For reports: figures of other weights compare with nothing."""
        known = self.digest.startswith(PUBLISHED)
        return f"InceptionV3 2015-12-05, {'published weights' if known else 'OTHER WEIGHTS'} {self.digest[:8]}"

    def to(self, device: torch.device) -> Inception:
        """The same on another device."""
        return Inception(self.body.to(device), self.classes.to(device), self.digest)

    @torch.no_grad()
    def features(self, pixels: Iterable[Tensor], resize: Resize) -> Tensor:
        """What FID and KID compare: (N, 2048), float32, on the CPU.

        Args:
            pixels: Batches (B, 3, H, W), uint8.
            resize: How they come to 299 px.
        """
        device = self.classes.device
        return torch.cat([self.body(RESIZES[resize](batch.to(device))).cpu() for batch in pixels])

    def logits(self, features: Tensor) -> Tensor:
        """What IS reads, (N, 1008), of features."""
        return features @ self.classes.T.to(features)


def _like_pytorch_fid(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1


def _like_torch_fidelity(pixels: Tensor) -> Tensor:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), (SIDE, SIDE), align_corners=False)
    return (resized - 128) / 128


RESIZES: dict[Resize, Callable[[Tensor], Tensor]] = {
    "pytorch-fid": _like_pytorch_fid,
    "torch-fidelity": _like_torch_fidelity,
}
"""How the two tools whose figures papers give bring images to 299 px and to the network's range."""


def inception_digest(weights: Path) -> str:
    """SHA-256 of the weight file.

    Raises:
        DataError: If there is none.
    """
    if not weights.is_file():
        raise DataError("no InceptionV3 weights there", where=weights, allowed=WHERE, remedy="download it once")
    return file_digest(weights)


def load_inception(weights: Path) -> Inception:
    """Load the network, on the CPU.

    Args:
        weights: The published file, or `.safetensors` with the same tensors.

    Raises:
        DataError: If the file is missing, damaged or of another network.
        EnvironmentProblem: If torch-fidelity is not installed.
    """
    if installed_version("torch-fidelity") is None:
        raise EnvironmentProblem("InceptionV3's layers come from torch-fidelity", remedy="pip install 'bkd[fid]'")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    digest = inception_digest(weights)
    # The class reads its weights as a pickle that may run code; so it gets a copy that was read without.
    copy = io.BytesIO()
    torch.save(read_tensors(weights, remedy=f"use {WHERE}"), copy)
    copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3("bkd", ["2048", "logits_unbiased"], copy)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()
        raise DataError(
            "not the weights of FID's InceptionV3",
            where=weights,
            got=shorten(problem[min(1, len(problem) - 1)], 200, placeholder=" …"),
            allowed=WHERE,
            remedy="torchvision's Inception has other layers and gives other figures",
        ) from None
    layers = [layer for name, layer in network.named_children() if name != "fc"]
    return Inception(nn.Sequential(*layers, nn.Flatten()), network.fc.weight.detach(), digest)
