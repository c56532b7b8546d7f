"""Draw images with a stock pipeline so that each depends on its prompt, its number and the seed alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bkd.data.images import images_at_once, to_pixels
from bkd.errors import ModelError
from bkd.eval.drawing import Drawing
from bkd.progress import Progress, silent

MAX_BATCH = 50
BLOCK_PIXELS, MAX_BLOCK = 512 * 512, 25
"""A CPU computes so many pixels together, of so many images at most; see `draw`."""
GOLDEN_RATIO = 0x9E3779B1
"""2^32 divided by it. Its multiples modulo 2^32 lie as far apart as so many numbers can (Knuth 1973, section 6.4)."""


def generate(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int = 0,
    first: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """One image for each prompt, as many at a time as fit: for looking at.

    Two models draw from the same noise. The size of the batch shows in the last bits only.

    Args:
        pipe: Any stock text-to-image pipeline of the Stable Diffusion family.
        prompts: N texts.
        num_inference_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; 1 for none.
        seed: 0 or more.
        first: Number of the first image.
        progress: Called with (done, N).

    Returns:
        (N, 3, H, W), uint8, on the CPU.
    """
    drawing = Drawing(num_inference_steps, guidance_scale, seed)
    noise, batch, images = Noise(pipe, drawing), images_at_once(_side(pipe), MAX_BATCH), []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        images.append(_pass(pipe, chunk, range(first + start, first + start + len(chunk)), drawing, noise))
        progress(start + len(chunk), len(prompts))
    return torch.cat(images)


def draw(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    indices: Iterable[int],
    drawing: Drawing,
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Some images of a numbered list of prompts: for measuring.

    On a CPU an image is the same to the last bit whatever else is drawn, in whatever batches, by however many
    processes of as many threads: its place in a pass decides how sums are rounded, so image i always has place
    i mod B of a pass of B images, and places of images that are not wanted are drawn in vain. B depends on the image
    size alone: 25 for small images, one at 512 px. On a GPU, which has no such fixed order, results of two batch sizes
    agree to rounding.

    Args:
        pipe: Any stock text-to-image pipeline of the Stable Diffusion family.
        prompts: All of them.
        indices: Which to draw.
        drawing: How.
        batch_size: Images in one pass on a GPU; as many as fit a small one when not given.

    Yields:
        Index and image, (3, H, W), uint8, on the CPU, in ascending order.
    """
    chosen, noise = set(indices), Noise(pipe, drawing)
    wanted = sorted(chosen)
    for places in _passes(wanted, _side(pipe), pipe.device, batch_size):
        texts = [prompts[index] if index < len(prompts) else "" for index in places]
        images = _pass(pipe, texts, places, drawing, noise)
        yield from ((index, image) for index, image in zip(places, images, strict=True) if index in chosen)


def block_size(side: int) -> int:
    """How many images a CPU computes together.

    Args:
        side: Of the images, in pixels.
    """
    return max(1, min(MAX_BLOCK, BLOCK_PIXELS // side**2))


def _passes(wanted: Sequence[int], side: int, device: torch.device, batch_size: int | None) -> Iterator[Sequence[int]]:
    """The numbers of the images of each pass."""
    if device.type == "cpu":
        block = block_size(side)
        for number in sorted({index // block for index in wanted}):
            yield range(number * block, (number + 1) * block)
    else:
        batch = batch_size or images_at_once(side, MAX_BATCH)
        yield from (wanted[start : start + batch] for start in range(0, len(wanted), batch))


def _side(pipe: StableDiffusionPipeline) -> int:
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


@torch.no_grad()
def _pass(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], numbers: Sequence[int], drawing: Drawing, noise: Noise
) -> Tensor:
    latents, generators = noise.of(numbers)
    before = noise.state if drawing.rng == "bksdm" else None
    decoded = pipe(
        list(prompts),
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=drawing.guidance_scale,
        latents=latents,
        generator=generators,  # for schedulers that add noise on the way
        output_type="pt",
    ).images
    if before is not None and not torch.equal(before, noise.state):
        raise ModelError(
            "this model's sampler draws noise on the way, so that one generator makes images depend on each other",
            where="--rng bksdm",
            got=type(pipe.scheduler).__name__,
            remedy="--rng per-image",
        )
    return to_pixels(decoded.cpu() * 2 - 1)


class Noise:
    """The starting noise of numbered images.

    Args:
        pipe: Gives its shape, dtype and device.
        drawing: Seed and kind of generator.
    """

    def __init__(self, pipe: StableDiffusionPipeline, drawing: Drawing) -> None:
        side = pipe.unet.config.sample_size
        self._shape = (1, pipe.vae.config.latent_channels, side, side)
        self._dtype, self._device, self._drawing = pipe.unet.dtype, pipe.device, drawing
        self._stream, self._next = torch.Generator(self._device), 0

    def of(self, numbers: Sequence[int]) -> tuple[Tensor, torch.Generator | list[torch.Generator]]:
        """Noise (N, C, H, W) of images in ascending order, and what draws further noise of theirs."""
        if self._drawing.rng == "bksdm":
            return torch.cat([self._from_stream(number) for number in numbers]), self._stream
        generators = [image_generator(self._drawing.seed, number) for number in numbers]
        # In float32, whatever the model computes in: models of two precisions then start from the same noise.
        noise = torch.cat([torch.randn(self._shape, generator=generator) for generator in generators])
        return noise.to(self._device, self._dtype), generators

    @property
    def state(self) -> Tensor:
        """Of the one generator for all images."""
        return self._stream.get_state()

    def _from_stream(self, number: int) -> Tensor:
        if number < self._next or not self._next:
            self._stream.manual_seed(self._drawing.seed)
            self._next = 0
        while self._next <= number:
            drawn = torch.randn(self._shape, generator=self._stream, device=self._device, dtype=self._dtype)
            self._next += 1
        return drawn


def image_generator(seed: int, number: int) -> torch.Generator:
    """Of the noise of one image.

    Args:
        seed: 0 or more.
        number: The image's. CPU generators read 32 bits of a seed, so the two cannot simply stand side by side in it.
    """
    return torch.Generator().manual_seed((seed * GOLDEN_RATIO + number) % 2**32)
