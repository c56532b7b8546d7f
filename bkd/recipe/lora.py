"""The vocabulary of a recipe's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

FORBID_UNKNOWN = ConfigDict(extra="forbid")
"""Of every class of the vocabulary: a key that nobody knows is an error."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Training through low-rank adapters, W + (lora_alpha / r) B A; names are peft's (arXiv:2106.09685).

    Attributes:
        r: Rank.
        lora_alpha: Scale; as large as `r` when not given.
        target_modules: Ends of module paths; every linear and convolutional module with one of them is adapted.
        rank_pattern: Regular expression for the end of module paths -> another rank for them.
        lora_dropout: Of the adapters' input.
        share_base: Whether the student's frozen weights are the teacher's own tensors instead of a copy.
        also_train: Small tensors that train themselves besides.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    r: int = 16
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    lora_dropout: float = 0.0
    share_base: bool = True
    also_train: tuple[Literal["biases", "norms"], ...] = ()
