"""The embedded feature network: what shapes-FID compares images by.

A small convolutional network that was trained to name everything in a scene, jitter included, by
`tools/make_shapes_features.py`; its 64 numbers before the answers are the features. Distances by it are called
shapes-FID: they compare with no FID, which InceptionV3 defines.
"""

from __future__ import annotations

from importlib.resources import files

import torch
from safetensors.torch import load
from torch import Tensor, nn

from bkd.data.images import to_model_range
from bkd.data.shapes import BACKGROUNDS, COLORS, POSITIONS, QUADRANT, RADII, SHAPES, SIDE
from bkd.errors import DataError

NUM_FEATURES = 64
NAME = "shapes-features-v1"
BATCH = 100
"""Images in one pass; always the same, so that features are too."""
NUM_KINDS = 1 + len(SHAPES) * len(COLORS) * len(RADII)
"""What a quadrant can hold: nothing, or a shape of a colour and a size."""
JITTER_UNIT = QUADRANT / 4
"""Half pixels: the unit in which the network says where in its quadrant an object is."""


class ShapesFeatures(nn.Module):
    """Features of 32 x 32 scenes, and the answers they were learned for."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, wider in ((3, 24), (24, 48), (48, 64)):
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.SiLU(), nn.Conv2d(wider, wider, 3, 2, 1), nn.SiLU()]
        side = SIDE // 8
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side * side, NUM_FEATURES))
        self.register_buffer("scale", torch.ones(()))
        self.background = nn.Linear(NUM_FEATURES, len(BACKGROUNDS))
        self.kinds = nn.Linear(NUM_FEATURES, len(POSITIONS) * NUM_KINDS)
        self.jitter = nn.Linear(NUM_FEATURES, len(POSITIONS) * 2)

    def forward(self, images: Tensor) -> Tensor:
        """Features.

        Args:
            images: (B, 3, 32, 32), float, -1..1.

        Returns:
            (B, 64); of renders, the variances of the 64 are 1 on average.
        """
        features: Tensor = self.body(images) * self.scale
        return features

    def answers(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Background (B, 3) and kinds (B, 4, 25) as logits; jitter (B, 4, 2)."""
        kinds, jitter = self.kinds(features), self.jitter(features)
        return self.background(features), kinds.unflatten(1, (-1, NUM_KINDS)), jitter.unflatten(1, (-1, 2))


def load_shapes_features() -> ShapesFeatures:
    """The network that comes with the package, frozen, on the CPU."""
    network = ShapesFeatures()
    network.load_state_dict(load(files("bkd").joinpath("assets/shapes_features/model.safetensors").read_bytes()))
    return network.requires_grad_(False).eval()


@torch.no_grad()
def shapes_features(network: ShapesFeatures, pixels: Tensor) -> Tensor:
    """Features in float64.

    Args:
        network: From `load_shapes_features`.
        pixels: (N, 3, 32, 32), uint8.

    Returns:
        (N, 64), float64.

    Raises:
        DataError: If the images are of another kind.
    """
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, SIDE, SIDE):
        raise DataError(
            "images that the embedded feature network does not know",
            got=f"{tuple(pixels.shape)} {pixels.dtype}",
            allowed=f"uint8 of shape (N, 3, {SIDE}, {SIDE})",
        )
    return torch.cat([network(to_model_range(part)) for part in torch.split(pixels, BATCH)]).double()
