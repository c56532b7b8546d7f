"""The whole vocabulary of a recipe, as frozen dataclasses.

A recipe file says only what differs from these defaults. Cadences (`*_every`) count optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

from pydantic import ConfigDict

from bkd.recipe.lora import FORBID_UNKNOWN
from bkd.recipe.stages import LrSchedule, Stage, StageTrain


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model to distil from.

    Attributes:
        id: `shapes` (the embedded teacher), a pipeline folder, a single .safetensors file, or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        config: For a single file: a pipeline folder or Hub id of the same architecture.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    id: str = "shapes"
    revision: str | None = None
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images and captions to train on.

    Attributes:
        shards: `shapes` (the embedded world), or tars: a file, folder, glob, brace pattern or address. A folder that
            `bkd data cache` wrote is taken as it is.
        caption: `txt` for KEY.txt, or `json:FIELD` for a field of KEY.json.
        filters: Metadata field -> what it must be, such as `aesthetic: '>= 6.5, missing drop'`; see docs/data.md.
        mirror: Whether every other draw of an image is mirrored; never where the caption says left or right.
        shuffle_shards: Shards whose samples are shuffled together.
        remote_cache_gib: Bound of the local copies of remote shards, in GiB; twice `shuffle_shards` of them should fit.
        resolution: Side of the training images in pixels; the teacher's own when not given.
        cache_dir: Where latents are kept; `$BKD_CACHE` or `~/.cache/bkd` when not given.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    shards: str = "shapes"
    caption: str = "txt"
    filters: Mapping[str, str] = field(default_factory=dict)
    mirror: bool = False
    shuffle_shards: int = 16
    remote_cache_gib: float = 50.0
    resolution: int | None = None
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class Train:
    """How to optimise.

    Attributes:
        batch: Images per optimizer step, over all processes and passes.
        grad_accum: Passes the batch is split into, to fit memory; does not change the result.
        optimizer: AdamW, AdamW with 8-bit moments (bitsandbytes), or plain stochastic gradient descent.
        lr: Peak learning rate.
        lr_schedule: After the warm-up: constant, or down to zero at `max_steps` along a cosine or a line.
        warmup_steps: Optimizer steps of linear warm-up.
        max_steps: Optimizer steps of the stage.
        weight_decay: Decoupled with AdamW, an L2 penalty with SGD.
        betas: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        ema: Decay, per step, of the averaged weights that become the student; 0 to use the last weights.
        prompt_dropout: Share of captions replaced by the empty prompt, so that guidance keeps working.
        mixed_precision: Of the forward passes; trained weights stay float32, the teacher takes this dtype.
        compile: Whether teacher and student are compiled; minutes at the start, faster steps on a GPU.
        channels_last: Memory format of the convolutions; where it pays (half precision on a GPU) when not given.
        gradient_checkpointing: Whether activations are computed twice instead of kept.
        parallel: How several processes share the work: as copies, or with both networks in shards; `auto` follows the
            configuration of `accelerate launch`.
        max_skipped_steps: So many steps in a row without a finite gradient end the run.
        checkpoint_every: Optimizer steps between checkpoints.
        keep_checkpoints: How many checkpoints to keep, the newest ones.
        log_every: Optimizer steps between lines in metrics.jsonl.
        samples_every: Optimizer steps between validation pictures; 0 for none but those at the end.
        trackers: Where metrics go besides metrics.jsonl; TensorBoard only when it is installed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    batch: int = 32
    grad_accum: int = 1
    optimizer: Literal["adamw", "adamw-8bit", "sgd"] = "adamw"
    lr: float = 5e-5
    lr_schedule: LrSchedule = "constant"
    warmup_steps: int = 0
    max_steps: int = 1000
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema: float = 0.0
    prompt_dropout: float = 0.1
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    compile: bool = False
    channels_last: bool | None = None
    gradient_checkpointing: bool = False
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    max_skipped_steps: int = 20
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    samples_every: int = 0
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Pictures drawn for people to look at, and how evaluation draws.

    Attributes:
        prompts: Validation prompts, a picture each; none are drawn without.
        num_inference_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; 1 for none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    prompts: tuple[str, ...] = ()
    num_inference_steps: int = 25
    guidance_scale: float = 7.5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a run, and a few things that do not.

    Attributes:
        seed: Of data order, noise, timesteps and dropout.
        teacher: The model to distil from, or to fine-tune.
        data: The images and captions to train on.
        train: How to optimise; a stage may have settings of its own.
        stages: What is trained, in order; the teacher of each but the first is the student of the one before.
        samples: Pictures drawn for people to look at, and how evaluation draws.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID_UNKNOWN
    seed: int = 0
    teacher: Teacher = field(default_factory=Teacher)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    stages: tuple[Stage, ...] = (Stage(),)
    samples: Samples = field(default_factory=Samples)

    def train_of(self, number: int) -> Train:
        """How stage `number` is trained."""
        return replace(self.train, **self.stages[number].train.given())

    @property
    def last_train(self) -> Train:
        """How the last stage is trained."""
        return self.train_of(len(self.stages) - 1)

    @property
    def origin(self) -> str:
        """What people are told that the model at `teacher.id` is: what is fine-tuned teaches nobody."""
        return "original" if self.stages[0].method.name == "finetune" else "teacher"


RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "data.resolution": (8, 8192),
    "data.shuffle_shards": (1, 1_000_000),
    "data.remote_cache_gib": (0.001, 1e9),
    "train.batch": (1, 1_000_000),
    "train.grad_accum": (1, 1_000_000),
    "train.lr": (0, 10),
    "train.warmup_steps": (0, 1e12),
    "train.max_steps": (1, 1e12),
    "train.weight_decay": (0, 10),
    "train.betas": (0, 0.999999),
    "train.max_grad_norm": (0, 1e12),
    "train.ema": (0, 1),
    "train.prompt_dropout": (0, 1),
    "train.checkpoint_every": (1, 1e12),
    "train.keep_checkpoints": (1, 1e6),
    "train.log_every": (1, 1e12),
    "train.samples_every": (0, 1e12),
    "stages.method.loss.task": (0, 1e6),
    "stages.method.loss.output_kd": (0, 1e6),
    "stages.method.loss.feature_kd": (0, 1e6),
    "stages.method.loss.min_snr_gamma": (0, 1e6),
    "stages.method.min_snr_gamma": (0, 1e6),
    "stages.method.guidance_scale": (1, 1000),
    "stages.method.num_inference_steps": (1, 1000),
    "stages.lora.r": (1, 1e6),
    "stages.lora.lora_alpha": (1e-6, 1e6),
    "stages.lora.lora_dropout": (0, 0.999),
    "train.max_skipped_steps": (1, 1e12),
    "samples.num_inference_steps": (1, 1000),
    "samples.guidance_scale": (1, 100),
}
"""Allowed ranges, ends included, of the numeric keys; list positions are left out."""
RANGES |= {f"stages.train.{f.name}": RANGES[key] for f in fields(StageTrain) if (key := f"train.{f.name}") in RANGES}

FREE_KEYS = (
    "data.cache_dir",
    "data.remote_cache_gib",
    "train.grad_accum",
    "stages.train.grad_accum",
    "stages.method.joint_teacher_passes",
    "train.compile",
    "train.channels_last",
    "train.gradient_checkpointing",
    "train.parallel",
    "train.max_skipped_steps",
    "train.trackers",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.samples_every",
    "samples",
)
"""Keys that may change between two calls of the same run, list positions left out: they do not affect the trained
weights."""
