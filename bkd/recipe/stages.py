"""The vocabulary of a recipe's stages: which network trains, what it learns, and whether through adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Tag

from bkd.prediction_type import PredictionType
from bkd.surgery.plan import Sites

FORBID_UNKNOWN = ConfigDict(extra="forbid")
WHOLE = "none"
"""The preset that removes nothing."""
Balancing = Literal["none", "teacher-power"]


@dataclass(frozen=True, kw_only=True)
class Student:
    """The network to train: the teacher's, less some blocks, or one that is there already.

    Attributes:
        blocks: Presets and units to remove, separated by commas; see `bkd inspect`. `none`, or nothing given: the
            student starts as the teacher's copy.
        path: Instead of `blocks`, a student of this teacher to go on with: a run, a pipeline folder or a Hub id.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    blocks: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        return self.path or self.blocks or WHOLE

    @property
    def described(self) -> str:
        """For people."""
        return "all blocks" if str(self) == WHOLE else str(self)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The three terms (arXiv:2305.15798).

    Attributes:
        task: Weight of the error against the diffusion target.
        output_kd: Weight of the error against the teacher's output.
        feature_kd: Weight of the errors against the teacher's activations.
        balancing: `teacher-power` divides each site's error by the teacher's power there (arXiv:2404.11098).
        min_snr_gamma: Min-SNR weighting of the task term (arXiv:2303.09556); 0 for none, 5 in the paper.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    task: float = 1.0
    output_kd: float = 1.0
    feature_kd: float = 1.0
    balancing: Balancing = "none"
    min_snr_gamma: float = 0.0

    @property
    def reaches_all(self) -> bool:
        """Whether every parameter of a student has a gradient: features alone never reach its last layers."""
        return bool(self.task or self.output_kd)


@dataclass(frozen=True, kw_only=True)
class Kd:
    """Task, output and feature distillation from the teacher.

    Attributes:
        loss: The terms and their weights.
        sites: Where features are compared: after every `block`, at BK-SDM's sites (`bk`), after every `layer` (SSD-1B)
            or every `self-attn` (KOALA); see docs/losses.md.
        random_conditioning: Whether captions are swapped among the images of a step, at noisy timesteps mostly, for
            the distillation terms (CVPR 2025).
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    name: Literal["kd"] = "kd"
    loss: Loss = field(default_factory=Loss)
    sites: Sites = "block"
    random_conditioning: bool = False

    @property
    def compared(self) -> Sites | None:
        """Where features are compared; None if they are not."""
        return self.sites if self.loss.feature_kd else None

    @property
    def min_snr_gamma(self) -> float:
        """Of the task term; 0 for none."""
        return self.loss.min_snr_gamma

    @property
    def reaches_all(self) -> bool:
        """As in `Loss`."""
        return self.loss.reaches_all


@dataclass(frozen=True, kw_only=True)
class GuidedLoss:
    """The terms of guidance distillation.

    Attributes:
        output_kd: Weight of the error against the teacher's guided output.
        feature_kd: Weight of the errors against the activations of the teacher's conditional pass.
        balancing: As in `Loss`.
        weighting: `truncated-snr` weighs an error of the clean latents by max(SNR, 1) (arXiv:2202.00512).
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    output_kd: float = 1.0
    feature_kd: float = 0.0
    balancing: Balancing = "none"
    weighting: Literal["none", "truncated-snr"] = "none"


@dataclass(frozen=True, kw_only=True)
class Guided:
    """What classifier-free guidance makes of two passes of the teacher, in one pass of the student (arXiv:2210.03142).

    Attributes:
        guidance_scale: The range `[low, high]` that the student is told a scale of, by an input of its own; or one
            scale that it always has (arXiv:2312.06899), without an input.
        loss: The terms and their weights.
        sites: Where features are compared; as in `Kd`.
        prediction_type: Of the student, where it is to be another than the teacher's.
        negative_prompt: What the teacher's other pass is told; the empty prompt when not given.
        joint_teacher_passes: Whether the teacher computes both in one batch, or, with less memory, one after the other.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    name: Literal["guided"] = "guided"
    guidance_scale: float | tuple[float, float] = (1.0, 14.0)
    loss: GuidedLoss = field(default_factory=GuidedLoss)
    sites: Sites = "block"
    prediction_type: PredictionType | None = None
    negative_prompt: str = ""
    joint_teacher_passes: bool = True
    min_snr_gamma: ClassVar[float] = 0.0

    @property
    def compared(self) -> Sites | None:
        """As in `Kd`."""
        return self.sites if self.loss.feature_kd else None

    @property
    def reaches_all(self) -> bool:
        """As in `Loss`."""
        return bool(self.loss.output_kd)

    @property
    def scales(self) -> tuple[float, float]:
        """Least and greatest guidance scale."""
        if isinstance(self.guidance_scale, tuple):
            return self.guidance_scale
        return self.guidance_scale, self.guidance_scale

    @property
    def takes_scale(self) -> bool:
        """Whether the student has an input for it."""
        return isinstance(self.guidance_scale, tuple)


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Plain training on the data, without a teacher: the student learns what the images look like.

    Attributes:
        min_snr_gamma: As in `Loss`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    name: Literal["finetune"] = "finetune"
    min_snr_gamma: float = 0.0
    compared: ClassVar[None] = None
    reaches_all: ClassVar[bool] = True


def _name(method: Any) -> Any:
    return str(method.get("name", "kd")) if isinstance(method, dict) else getattr(method, "name", None)


Method = Annotated[
    Annotated[Kd, Tag("kd")] | Annotated[Guided, Tag("guided")] | Annotated[Finetune, Tag("finetune")],
    Discriminator(_name),
]
"""What a student learns; `name` says which."""


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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe, which ends in a usable student.

    Attributes:
        student: The network.
        method: What it learns.
        lora: Adapters to train in place of the network's own weights.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    student: Student = field(default_factory=Student)
    method: Method = field(default_factory=Kd)
    lora: Lora | None = None
