"""Which other tools load a single file, and why not: they read the architecture from tensors, or have a few by heart.

Read in their sources, and not run: ComfyUI's `comfy/model_detection.py` (commit a9fc751) and `comfy/supported_models.py`
(01f03bb), AUTOMATIC1111's `modules/sd_models_config.py` (0120be7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from bkd.surgery.anatomy import Block, read_anatomy

WIDTH = 320
"""Of the outermost level, in all three families."""
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
"""By the length of a token's embedding."""
SD = ((1,) * 6 + (0,) * 2, (1,) * 9 + (0,) * 3, 1)
ORIGINAL = {768: SD, 1024: SD, 2048: ((0, 0, 2, 2, 10, 10), (0, 0, 0, 2, 2, 2, 10, 10, 10), 10)}
"""Transformer layers of every layer, down and up, outside in; and of the mid block."""
KNOWN_SDXL = ((0, 0, 2, 2, 10, 10), (0, 0, 2, 2, 4, 4), (0, 0, 1, 1, 2, 2), (0, 2, 5), (0, 2, 6))
"""Those of SDXL's down layers that ComfyUI knows: SDXL, SSD-1B, Segmind Vega and both KOALAs."""


@dataclass(frozen=True)
class Verdict:
    """Whether a tool loads a file.

    Attributes:
        tool: Its name.
        loads: True where its sources say that it does.
        why: In a clause.
    """

    tool: str
    loads: bool
    why: str

    def __str__(self) -> str:
        return f"{self.tool}: {'yes' if self.loads else 'no'}, {self.why}"


def verdicts(config: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """What other tools do with a student in the original layout.

    Args:
        config: Its UNet's.
    """
    family = FAMILIES.get(config["cross_attention_dim"]) if config["block_out_channels"][0] == WIDTH else None
    if family is None:
        unknown = "its widths are those of no Stable Diffusion"
        return Verdict("ComfyUI", False, unknown), Verdict("AUTOMATIC1111's web UI", False, unknown)
    return _comfyui(config, family), _automatic1111(config, family)


def _comfyui(config: Mapping[str, Any], family: str) -> Verdict:
    down, up, _ = depths(config)
    emptied = any(() in (block.stacks or ()) for block in _blocks(config))
    if emptied:
        return Verdict("ComfyUI", False, "it leaves out attentions that have lost all their transformer layers")
    if family == "SDXL" and down not in KNOWN_SDXL:
        known = ", ".join(str([*each]) for each in KNOWN_SDXL)
        why = f"of SDXL it knows the transformer depths {known}, and this student's are {[*down]}"
        return Verdict("ComfyUI", False, why)
    return Verdict("ComfyUI", True, f"it counts blocks by the tensors' names, and takes the file for {family}")


def _automatic1111(config: Mapping[str, Any], family: str) -> Verdict:
    if depths(config) == ORIGINAL[config["cross_attention_dim"]]:
        return Verdict("AUTOMATIC1111's web UI", True, f"the student has the blocks of {family}")
    why = f"it builds all blocks of {family}, and those that the file lacks would hold no trained weights"
    return Verdict("AUTOMATIC1111's web UI", False, why)


def depths(config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """Transformer layers of every layer, down and up, outside in; and of the mid block, None without its attention."""
    whole = read_anatomy(config).whole
    sides = (tuple(chain.from_iterable(map(_depths, side))) for side in (whole.down, whole.up))
    down, up = sides
    return down, up, len(whole.mid.stack) if whole.mid is not None and whole.mid.stack is not None else None


def _depths(block: Block) -> tuple[int, ...]:
    return tuple(len(block.stack_of(layer)) for layer in block.layers)


def _blocks(config: Mapping[str, Any]) -> tuple[Block, ...]:
    whole = read_anatomy(config).whole
    return (*whole.down, *whole.up)
