"""What the training loop knows of a method, and the draw that every diffusion method starts with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bkd.data.latent_set import CachedBatch, Captions
from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.losses import LossTerms
from bkd.methods.captions import CaptionEncoder, Conditioning
from bkd.rng import StepRng

T = TypeVar("T")


class Method(Protocol):
    """What a student learns, as one object; the loop never asks which it is.

    A step has two halves. `draw` decides everything that is random, on the CPU, in a thread that runs ahead; `loss` is
    a pure function of what was drawn and of the weights, so that nothing on the way to the device has to be waited for.

    Attributes:
        trainable: The module whose parameters with `requires_grad` are optimised.
        forward: Called in place of `trainable`; the loop puts its compiled, DDP or FSDP form here.
        forward_teacher: Called in place of `teacher`.
        needs_others: Whether `draw` wants captions of other samples of the step.
        reaches_all: Whether the loss depends on every trainable parameter.
    """

    trainable: nn.Module
    forward: Callable[..., Any]
    forward_teacher: Callable[..., Any]
    needs_others: bool
    reaches_all: bool

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen module; None where nobody teaches."""
        ...

    def draw(self, batch: CachedBatch, rng: StepRng) -> Any:
        """One pass's inputs, a dataclass of tensors on the CPU; all randomness comes from `rng`."""
        ...

    def loss(self, drawn: Any) -> LossTerms:
        """The loss of what `draw` made, on the device of the networks."""
        ...

    def watching(self) -> AbstractContextManager[None]:
        """Entered for as long as losses are computed: hooks are in place."""
        ...


@contextmanager
def teaching(device: torch.device) -> Iterator[None]:
    """Around a teacher's passes: without gradients, in its own dtype."""
    # no_grad, not inference_mode: what inference_mode returns cannot enter a loss. Without autocast, which would
    # compute norms and softmax in float32 though the teacher's weights are not.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def dtype_of(network: nn.Module) -> torch.dtype:
    """Of its weights."""
    return next(network.parameters()).dtype


@dataclass(frozen=True)
class NoisyBatch:
    """A point of the forward process for each sample, and the captions that go with it.

    Attributes:
        noisy_latents: (B, C, h, w), float32.
        target: Same shape: what a perfect network would predict.
        timesteps: (B,), int64.
        captions: Those that the networks are told.
        dropped: (B,), bool: captions to be replaced by the empty prompt.
        sizes: (B, 6), float32, SDXL's size conditioning.
        task_weights: (B,), float32, of each sample's error against the target; None where all are 1.
    """

    noisy_latents: Tensor
    target: Tensor
    timesteps: Tensor
    captions: Captions
    dropped: Tensor
    sizes: Tensor | None
    task_weights: Tensor | None

    def predict(
        self,
        unet: Callable[..., Any],
        conditioning: Conditioning,
        dtype: torch.dtype,
        scale_embeds: Tensor | None = None,
    ) -> Tensor:
        """A UNet's output for this batch, of the shape of the latents.

        Args:
            unet: A UNet2DConditionModel, or what is called in its place.
            conditioning: What it is told besides: as many samples as the batch has, or twice as many for two passes
                over the batch in one.
            dtype: Of its floating-point inputs.
            scale_embeds: (B, E), the embedded guidance scales, where it takes them.
        """
        times = len(conditioning.prompt_embeds) // len(self.timesteps)
        latents, timesteps = self.noisy_latents.repeat(times, 1, 1, 1), self.timesteps.repeat(times)
        return predict(unet, latents, timesteps, conditioning, dtype, scale_embeds)


def predict(
    unet: Callable[..., Any],
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    dtype: torch.dtype,
    scale_embeds: Tensor | None = None,
) -> Tensor:
    """A UNet's output, of the shape of the latents.

    Args:
        unet: A UNet2DConditionModel, or what is called in its place.
        latents: (B, C, H, W).
        timesteps: (B,), int64.
        conditioning: Of B samples.
        dtype: Of its floating-point inputs.
        scale_embeds: (B, E), the embedded guidance scales, where it takes them.
    """
    # Sizes in pixels go into sinusoids: bfloat16 would tell a network of 1336 px in place of 1333.
    added = {name: x if name == "time_ids" else x.to(dtype) for name, x in conditioning.added.items()}
    output: Tensor = unet(
        latents.to(dtype),
        timesteps,
        conditioning.prompt_embeds.to(dtype),
        timestep_cond=None if scale_embeds is None else scale_embeds.to(dtype),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]
    return output


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """A dataclass, or a tuple, with a function applied to every tensor in it, at any depth."""
    if isinstance(value, Tensor):
        return function(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(map_tensors(item, function) for item in value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: map_tensors(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The frozen surroundings of a UNet in training: schedule, latent scale and text encoders.

    Attributes:
        schedule: Noise schedule and prediction type.
        scaling_factor: Of the autoencoder.
        captions: From token ids to conditioning.
        prompt_dropout: Share of captions replaced by the empty prompt.
        min_snr_gamma: Bound of the signal-to-noise ratio in the task term's weight; 0 for none.
        random_conditioning: Whether captions are swapped, the noisier the more often.
    """

    schedule: NoiseSchedule
    scaling_factor: float
    captions: CaptionEncoder
    prompt_dropout: float
    min_snr_gamma: float = 0.0
    random_conditioning: bool = False

    def draw(self, batch: CachedBatch, rng: StepRng) -> NoisyBatch:
        """Sample latents, captions, timesteps and noise for a batch, on the CPU."""
        latents, noise = self.draw_latents(batch, rng)
        timesteps = rng.integers("timestep", self.schedule.num_train_timesteps)
        dropped = self.draw_dropped(rng)
        captions, weights = batch.captions, None
        if self.min_snr_gamma:
            weights = self.schedule.min_snr_weight(timesteps, self.min_snr_gamma)
        if self.random_conditioning:
            assert batch.others is not None  # asked for by `needs_others`
            swapped = (rng.uniform("random_conditioning") < self._swap_probability(timesteps)) & ~dropped
            captions = _where(swapped, batch.others, captions)
            # An image is not what a swapped caption asks for: such samples teach through the teacher alone.
            weights = (~swapped).float() * (1.0 if weights is None else weights)
        return NoisyBatch(
            noisy_latents=self.schedule.add_noise(latents, noise, timesteps),
            target=self.schedule.target(latents, noise, timesteps),
            timesteps=timesteps,
            captions=captions,
            dropped=dropped,
            sizes=batch.sizes,
            task_weights=weights,
        )

    def draw_latents(self, batch: CachedBatch, rng: StepRng) -> tuple[Tensor, Tensor]:
        """Latents of a batch's images, and noise for them, both (B, C, h, w)."""
        mean, std = batch.moments.chunk(2, dim=1)
        shape = mean.shape[1:]
        latents = (mean + std * rng.normal("posterior", shape)) * self.scaling_factor
        return latents, rng.normal("noise", shape)

    def draw_dropped(self, rng: StepRng) -> Tensor:
        """(B,), bool: which captions give way to the empty prompt."""
        return rng.uniform("prompt_dropout") < self.prompt_dropout

    def _swap_probability(self, timesteps: Tensor) -> Tensor:
        """p(t) = exp(-5 (1 - t/T)): random conditioning, Kim et al., CVPR 2025."""
        return torch.exp(-5 * (1 - timesteps / self.schedule.num_train_timesteps))


def _where(swapped: Tensor, theirs: Captions, ours: Captions) -> Captions:
    first = torch.where(swapped[:, None], theirs.token_ids, ours.token_ids)
    if ours.token_ids_2 is None or theirs.token_ids_2 is None:
        return Captions(first)
    return Captions(first, torch.where(swapped[:, None], theirs.token_ids_2, ours.token_ids_2))
