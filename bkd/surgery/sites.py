"""Do a plan's feature pairs fit? Answered on the meta device, where a whole UNet takes a second and no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bkd.errors import ShapeMismatch
from bkd.hooks import FeatureTap
from bkd.surgery.build import build_empty
from bkd.surgery.plan import FeaturePair, RemovalPlan
from bkd.surgery.probe import as_arguments, unet_inputs


def check_pairs(config: Mapping[str, Any], plan: RemovalPlan, pairs: Sequence[FeaturePair]) -> None:
    """Run teacher and student once and compare the shapes of what the pairs name.

    Args:
        config: The teacher's configuration.
        plan: How the student comes from it.
        pairs: Modules whose outputs are to be compared.

    Raises:
        ModelError: If a module is missing or does not run.
        ShapeMismatch: Naming the first pair that differs.
    """
    theirs = _shapes(build_empty(dict(config)), [pair.teacher for pair in pairs])
    ours = _shapes(build_empty(dict(config), plan), [pair.student for pair in pairs])
    for pair, teacher, student in zip(pairs, theirs, ours, strict=True):
        if teacher != student:
            raise ShapeMismatch(
                "these activations cannot be compared",
                where=f"{pair.teacher} (teacher) and {pair.student} (student)",
                got=f"{teacher} and {student}",
                remedy="choose other sites: stages.0.method.sites",
            )


def _shapes(unet: UNet2DConditionModel, names: Sequence[str]) -> list[tuple[int, ...]]:
    inputs = unet_inputs(unet.config, side=unet.config.sample_size, num_tokens=77, seed=None)
    with torch.no_grad(), torch.device("meta"), FeatureTap(unet, names) as tap:
        _, features = tap.run(partial(unet, **as_arguments(inputs)))
    return [tuple(feature.shape) for feature in features]
