"""Train the embedded feature network: the same file again on one thread of the same machine.

    python tools/make_shapes_features.py [-o bkd/assets/shapes_features] [--steps 1500]

It learns to read scenes from renders, lightly blurred, with noise: as students draw them. Minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from bkd.data.images import to_model_range
from bkd.data.shapes import BACKGROUNDS, COLORS, POSITIONS, RADII, SHAPES, Scene, scene
from bkd.data.shapes_checker import rendered
from bkd.eval.shapes_features import JITTER_UNIT, ShapesFeatures
from bkd.files import replace_file

BATCH, POOL = 128, 8000
KINDS = [(shape, color, size) for shape in SHAPES for color in COLORS for size in RADII]


def targets(drawn: Scene) -> tuple[int, list[int], list[tuple[float, float]]]:
    """Background, kind in each quadrant (0 for none), jitter there."""
    kinds, jitter = [0] * len(POSITIONS), [(0.0, 0.0)] * len(POSITIONS)
    for o in drawn.objects:
        place = POSITIONS.index(o.position)
        kinds[place] = 1 + KINDS.index((o.shape, o.color, o.size))
        jitter[place] = (o.dx / JITTER_UNIT, o.dy / JITTER_UNIT)
    return list(BACKGROUNDS).index(drawn.background), kinds, jitter


def dataset(split: str, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn = [scene(split, index) for index in range(count)]  # type: ignore[arg-type]
    background, kinds, jitter = zip(*map(targets, drawn), strict=True)
    return rendered(drawn), torch.tensor(background), torch.tensor(kinds), torch.tensor(jitter)


def disturbed(images: Tensor) -> Tensor:
    """Half of the images blurred, all with a little noise."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = (torch.rand(len(images), 1, 1, 1) - 0.5).clamp(min=0)
    return images.lerp(blurred, share) + 0.05 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def loss(network: ShapesFeatures, images: Tensor, background: Tensor, kinds: Tensor, jitter: Tensor) -> Tensor:
    seen = network.answers(network.body(images))
    there = (kinds > 0).unsqueeze(-1)
    error = ((seen[2] - jitter).square() * there).sum() / there.sum().clamp(min=1)
    return F.cross_entropy(seen[0], background) + 4 * F.cross_entropy(seen[1].flatten(0, 1), kinds.flatten()) + error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("bkd/assets/shapes_features"))
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = ShapesFeatures()
    # Renders of every split: the network must know what students may draw, held-out combinations included.
    parts = [dataset(split, POOL // 2) for split in ("train", "novel")]
    pixels, *labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for step in range(args.steps):
        chosen = torch.randint(len(pixels), (BATCH,))
        value = loss(network, disturbed(to_model_range(pixels[chosen])), *(label[chosen] for label in labels))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {value.item():.4f}", flush=True)
    with torch.no_grad():
        network.scale /= network(to_model_range(pixels)).var(0).mean().sqrt()
    pixels, *labels = dataset("test", 2000)
    with torch.no_grad():
        seen = network.answers(network.body(to_model_range(pixels)))
    right = (seen[1].argmax(2) == labels[1]).all(1) & (seen[0].argmax(1) == labels[0])
    print(f"whole scenes of split test read right: {right.float().mean():.1%}")
    args.output.mkdir(parents=True, exist_ok=True)
    with replace_file(args.output / "model.safetensors") as stream:
        stream.write(save({name: tensor.half() for name, tensor in network.state_dict().items()}))


if __name__ == "__main__":
    main()
