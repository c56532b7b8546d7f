"""The vocabulary of a recipe's stages: which network trains, what it learns, and whether through adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Tag

from bkd.diffusion.few_steps import FewSteps
from bkd.diffusion.terms import Direction, PredictionType, Sampler
from bkd.recipe.lora import FORBID_UNKNOWN, Lora
from bkd.surgery.plan import Sites

WHOLE = "none"
"""The preset that removes nothing."""
Balancing = Literal["none", "teacher-power"]
LrSchedule = Literal["constant", "cosine", "linear"]


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
        balancing: `teacher-power` divides each site's error by the teacher's power there (arXiv:2404.11098).
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
        sites: Where features are compared: `block`, `bk`, `layer` or `self-attn`; see docs/losses.md.
        prediction_type: What the student predicts, where that is to be something else than its teacher does.
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
        min_snr_gamma: Min-SNR weighting of the loss (arXiv:2303.09556); 0 for none, 5 in the paper.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    name: Literal["finetune"] = "finetune"
    min_snr_gamma: float = 0.0
    compared: ClassVar[None] = None
    reaches_all: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Halving:
    """One step in place of two of the teacher's, and again, until few are left (arXiv:2202.00512, arXiv:2210.03142).

    Attributes:
        num_inference_steps: `[N, M]`: of the teacher, and of the student in the end. Each halving between them is a
            stage of its own, with a student of its own, which teaches the next.
        sampler: `deterministic`: DDIM. `stochastic`: after the last halving the student also learns double steps from
            all M points, and is sampled with M steps of which each goes two ahead and, with fresh noise, one back.
        direction: `generation`, or `inversion`: from an image to the noise that it would be drawn from.
        prediction_type: What the student predicts, where that is to be something else than its teacher does.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    name: Literal["halving"] = "halving"
    num_inference_steps: tuple[int, int] = (32, 4)
    sampler: Sampler = "deterministic"
    direction: Direction = "generation"
    prediction_type: PredictionType | None = None
    min_snr_gamma: ClassVar[float] = 0.0
    compared: ClassVar[None] = None
    reaches_all: ClassVar[bool] = True

    @property
    def halves(self) -> bool:
        """Whether the number of steps can be reached: M is N / 2, N / 4 and so on, or N for a sampler that changes."""
        teacher, student = self.num_inference_steps
        if teacher < 1 or student < 1:
            return False
        ratio, rest = divmod(teacher, student)
        least = 1 if self.sampler == "stochastic" else 2
        return not rest and ratio >= least and ratio & (ratio - 1) == 0

    @property
    def few_steps(self) -> FewSteps:
        """What the student is halved to."""
        return FewSteps(self.num_inference_steps[1], self.sampler, self.direction)

    def expanded(self) -> tuple[Halving, ...]:
        """One for each halving; a stochastic sampler is learnt after the last."""
        teacher, student = self.num_inference_steps
        plain = replace(self, sampler="deterministic")
        counts = [teacher >> k for k in range((teacher // student).bit_length())]
        stages = tuple(replace(plain, num_inference_steps=pair) for pair in pairwise(counts))
        if self.sampler == "stochastic":
            stages += (replace(self, num_inference_steps=(student, student)),)
        return stages


def _name(method: Any) -> Any:
    return str(method.get("name", "kd")) if isinstance(method, dict) else getattr(method, "name", None)


Method = Annotated[
    Annotated[Kd, Tag("kd")]
    | Annotated[Guided, Tag("guided")]
    | Annotated[Halving, Tag("halving")]
    | Annotated[Finetune, Tag("finetune")],
    Discriminator(_name),
]
"""What a student learns; `name` says which."""


@dataclass(frozen=True, kw_only=True)
class StageTrain:
    """What a stage has its own of; the recipe's `train` says the rest, and explains each.

    Attributes:
        batch: Images per optimizer step.
        grad_accum: Passes the batch is split into.
        lr: Peak learning rate.
        lr_schedule: After the warm-up; it begins anew with the stage.
        warmup_steps: Optimizer steps of linear warm-up.
        max_steps: Optimizer steps of the stage; of each halving, where a stage stands for several.
        ema: Decay, per step, of the averaged weights.
        prompt_dropout: Share of captions replaced by the empty prompt.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    batch: int | None = None
    grad_accum: int | None = None
    lr: float | None = None
    lr_schedule: LrSchedule | None = None
    warmup_steps: int | None = None
    max_steps: int | None = None
    ema: float | None = None
    prompt_dropout: float | None = None

    def given(self) -> dict[str, Any]:
        """What the stage says itself."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a recipe, which ends in a usable student; the next stage's teacher is this one.

    Attributes:
        student: The network to train.
        method: What it learns: `kd`, `guided`, `halving` or `finetune`.
        lora: Adapters to train in place of the network's own weights.
        train: Where it is trained otherwise than the recipe's other stages.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    student: Student = field(default_factory=Student)
    method: Method = field(default_factory=Kd)
    lora: Lora | None = None
    train: StageTrain = field(default_factory=StageTrain)

    @property
    def title(self) -> str:
        """For people; see `numbered`, too."""
        if isinstance(self.method, Halving):
            return f"halving {self.method.num_inference_steps[0]} to {self.method.few_steps}"
        return f"{self.student.described} by {self.method.name}"

    @property
    def folder_name(self) -> str:
        """For the folder of its student."""
        steps = f"-{self.method.num_inference_steps[1]}" if isinstance(self.method, Halving) else ""
        return self.method.name + steps

    def expanded(self) -> tuple[Stage, ...]:
        """The stages that it stands for: several, where the number of steps is halved more than once.

        What the first removes of the network is gone for those after it.
        """
        if not isinstance(self.method, Halving):
            return (self,)
        first, *others = (replace(self, method=method) for method in self.method.expanded())
        return first, *(replace(stage, student=Student()) for stage in others)


def numbered(numbers: Iterable[int]) -> str:
    """Stages that are trained, for people, who count from 1.

    `stages.0` and so on are keys, of stages as they are written, which may stand for several.
    """
    found = [str(number + 1) for number in numbers]
    return f"stage{'s' * (len(found) > 1)} {', '.join(found)}"
