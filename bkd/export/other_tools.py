"""Which other tools load a single file, and why not: they read the architecture from tensors, or have a few by heart.

Read in their sources, and not run: ComfyUI's `comfy/model_detection.py` (commit a9fc751) and
`comfy/supported_models.py` (01f03bb); AUTOMATIC1111's `modules/sd_models_config.py` (0120be7), `modules/sd_models.py`
and `modules/sd_hijack.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Union

from bkd.surgery.anatomy import Block, Mid, read_anatomy

COMFYUI, AUTOMATIC1111 = "ComfyUI", "AUTOMATIC1111's web UI"
WIDTH = 320
"""Of the outermost level, in all three families."""
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""By the length of a token's embedding."""
Depths = tuple[tuple[int, ...], tuple[int, ...], Union[Mid, None]]
"""Transformer layers of every layer, down and up, level by level from the outside in; and the mid block."""
SD: Depths = ((1, 1, 1, 1, 1, 1, 0, 0), (1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0), Mid((0,)))
SDXL: Depths = ((0, 0, 2, 2, 10, 10), (0, 0, 0, 2, 2, 2, 10, 10, 10), Mid(tuple(range(10))))
SSD_1B: Depths = ((0, 0, 2, 2, 4, 4), (0, 0, 0, 2, 1, 1, 4, 4, 10), Mid(None))
BUILT = {768: (SD,), 1024: (SD,), 2048: (SDXL, SSD_1B)}
"""What AUTOMATIC1111's web UI builds."""
KNOWN_SDXL = ((0, 0, 2, 2, 10, 10), (0, 0, 2, 2, 4, 4), (0, 0, 1, 1, 2, 2), (0, 2, 5), (0, 2, 6))
"""Those of SDXL's down layers that ComfyUI knows: SDXL, SSD-1B, Segmind Vega and both KOALAs."""


@dataclass(frozen=True)
class Verdict:
    """Whether a tool loads a file.

    Attributes:
        tool: Its name.
        loads: As its sources say.
        why: In a clause.
    """

    tool: str
    loads: bool
    why: str

    def __str__(self) -> str:
        return f"{self.tool}: {'yes' if self.loads else 'no'}, {self.why}"


def verdicts(config: Mapping[str, Any], prediction_type: str = "epsilon") -> tuple[Verdict, ...]:
    """What other tools do with a student in the original layout.

    Args:
        config: Its UNet's.
        prediction_type: What it predicts.
    """
    family = FAMILIES.get(config["cross_attention_dim"]) if config["block_out_channels"][0] == WIDTH else None
    if family is None:
        why = "its widths are those of no Stable Diffusion"
        return Verdict(COMFYUI, False, why), Verdict(AUTOMATIC1111, False, why)
    unsaid = "" if prediction_type == "epsilon" else f"; the file does not say {prediction_type}, choose it there"
    found = _comfyui(config, family), _automatic1111(config, family)
    return tuple(replace(verdict, why=verdict.why + unsaid) if verdict.loads else verdict for verdict in found)


def _comfyui(config: Mapping[str, Any], family: str) -> Verdict:
    whole = read_anatomy(config).whole
    if any(() in (block.stacks or ()) for block in (*whole.down, *whole.up)):
        return Verdict(COMFYUI, False, "it leaves out attentions that have lost all their transformer layers")
    down = depths(config)[0]
    if family == "SDXL" and down not in KNOWN_SDXL:
        known = ", ".join(str([*each]) for each in KNOWN_SDXL)
        why = f"of SDXL it knows the transformer depths {known}, and this student's are {[*down]}"
        return Verdict(COMFYUI, False, why)
    return Verdict(COMFYUI, True, f"it counts blocks by the tensors' names, and takes the file for {family}")


def _automatic1111(config: Mapping[str, Any], family: str) -> Verdict:
    built = f"the blocks of {family}{' or SSD-1B' if family == 'SDXL' else ''}"
    if depths(config) in BUILT[config["cross_attention_dim"]]:
        return Verdict(AUTOMATIC1111, True, f"the student has {built}")
    return Verdict(AUTOMATIC1111, False, f"it builds {built}, whatever the file holds")


def depths(config: Mapping[str, Any]) -> Depths:
    """What tells students of a family apart."""
    whole = read_anatomy(config).whole
    return _depths(whole.down), _depths(whole.up), whole.mid


def _depths(side: tuple[Block, ...]) -> tuple[int, ...]:
    return tuple(len(block.stack_of(layer)) for block in side for layer in block.layers)
