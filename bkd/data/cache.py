"""Latents and token ids of a data set, computed once.

The autoencoder costs about a third of a distillation step at 512 px, so its output is stored: mean and
deviation, not a sample, so that every epoch can draw a fresh one. Text encoding is cheap and stays in the loop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bkd.data.images import decode_image, images_at_once, to_model_range
from bkd.data.index import Sample
from bkd.errors import DataError
from bkd.files import write_atomically

CACHE_VERSION = 2
MAX_BAD_FRACTION = 0.1
MAX_BATCH = 64
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class LatentSet:
    """A cached data set, memory-mapped when it is read.

    Attributes:
        parts: Per shard, the stem of its files: `<stem>.moments.npy`, (N_s, 2C, h, w), float16, posterior mean, then
            deviation, before the scaling factor; `<stem>.ids.npy`, (N_s, L), int32, token ids.
        counts: Per shard, N_s.
        fingerprint: Changes with the shards, the autoencoder, the tokenizer or the resolution.
        num_skipped: Samples left out because their image could not be decoded.
    """

    parts: tuple[Path, ...]
    counts: tuple[int, ...]
    fingerprint: str
    num_skipped: int

    def __len__(self) -> int:
        return sum(self.counts)

    def gather(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Moments (B, 2C, h, w), float32, and token ids (B, L), int64, of the samples with these numbers."""
        starts = np.cumsum([0, *self.counts])
        shards = np.searchsorted(starts, indices, side="right") - 1
        rows = [_open(self.parts[shard]) for shard in shards], indices - starts[shards]
        moments = np.stack([part[0][row] for part, row in zip(*rows, strict=True)])
        ids = np.stack([part[1][row] for part, row in zip(*rows, strict=True)])
        return torch.from_numpy(moments).float(), torch.from_numpy(ids).long()


@lru_cache(maxsize=64)  # every open map holds a file descriptor, of which a process has few
def _open(stem: Path) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    return np.load(f"{stem}.moments.npy", mmap_mode="r"), np.load(f"{stem}.ids.npy", mmap_mode="r")


def cache_latents(
    shards: Sequence[Sequence[Sample]],
    *,
    vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerBase,
    model_digest: str,
    resolution: int,
    cache: Path,
    progress: Progress = lambda done, total: None,
) -> LatentSet:
    """Encode every usable sample, or find that it was done before.

    One output file per shard: an interrupted pass continues.

    Args:
        shards: The samples of each, as `index_shard` gives them.
        vae: Frozen, in eval mode; runs on its own device in its own dtype.
        tokenizer: Pads to its `model_max_length`.
        model_digest: Names autoencoder and tokenizer; part of the fingerprint.
        resolution: Side of the images, in pixels.
        cache: Folder for things that can be made again.

    Raises:
        DataError: If more than a tenth of a shard's images cannot be decoded.
    """
    fingerprint = _fingerprint(shards, model_digest, resolution)
    folder = cache / "latents" / fingerprint[:16]
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(samples) for samples in shards)
    parts = [folder / f"{number:05d}" for number in range(len(shards))]
    done = 0
    for stem, samples in zip(parts, shards, strict=True):
        if not stem.with_suffix(".json").is_file():
            _encode_shard(stem, samples, vae, tokenizer, resolution, partial(_ahead, progress, done, total))
        done += len(samples)
        progress(done, total)
    facts = [json.loads(stem.with_suffix(".json").read_text()) for stem in parts]
    return LatentSet(
        tuple(parts), tuple(f["count"] for f in facts), fingerprint, num_skipped=sum(f["skipped"] for f in facts)
    )


def _ahead(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _fingerprint(shards: Sequence[Sequence[Sample]], model_digest: str, resolution: int) -> str:
    digest = hashlib.sha256(f"{CACHE_VERSION}/{model_digest}/{resolution}".encode())
    for samples in shards:
        # Every member's name and size, not its bytes: hashing a terabyte would take longer than encoding it.
        digest.update(repr([(s.key, sorted(s.members.items())) for s in samples]).encode())
        digest.update(samples[0].read("txt") + samples[-1].read("txt"))
    return digest.hexdigest()


def _encode_shard(
    stem: Path,
    samples: Sequence[Sample],
    vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerBase,
    resolution: int,
    progress: Callable[[int], None],
) -> None:
    moments: list[NDArray[np.float16]] = []
    captions: list[str] = []
    bad: list[str] = []
    decoded = decoded_samples(samples, resolution, bad)
    batch = images_at_once(resolution, MAX_BATCH)
    while chunk := list(islice(decoded, batch)):
        moments.append(_encode(torch.stack([pixels for pixels, _ in chunk]), vae))
        captions += [caption for _, caption in chunk]
        progress(len(captions) + len(bad))
    if len(bad) > MAX_BAD_FRACTION * len(samples):
        raise DataError(
            "too many images cannot be decoded",
            where=samples[0].shard,
            got=f"{len(bad)} of {len(samples)}, the first: {bad[0]}",
            allowed=f"at most {MAX_BAD_FRACTION:.0%}",
            remedy="download the shard again",
        )
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np").input_ids
    np.save(f"{stem}.moments.npy", np.concatenate(moments))
    np.save(f"{stem}.ids.npy", ids.astype(np.int32))
    # Written last: it marks the shard as done.
    facts = {"shard": samples[0].shard.name, "count": len(captions), "skipped": len(bad)}
    write_atomically(stem.with_suffix(".json"), json.dumps(facts))


def decoded_samples(samples: Iterable[Sample], resolution: int, bad: list[str]) -> Iterator[tuple[Tensor, str]]:
    """Pixels (3, resolution, resolution), uint8, and caption of every sample whose image can be decoded.

    Args:
        samples: As `index_shard` gives them.
        resolution: Side of the images.
        bad: Gets a line for each of the others.
    """
    for sample in samples:
        assert sample.image_extension is not None  # index_shard keeps only such samples
        try:
            pixels = decode_image(sample.read(sample.image_extension), resolution)
        except DataError as error:
            bad.append(f"{sample.key}: {error.got}")
            continue
        yield pixels, sample.read("txt").decode("utf-8", errors="replace")


@torch.no_grad()
def _encode(pixels: Tensor, vae: AutoencoderKL) -> NDArray[np.float16]:
    posterior = vae.encode(to_model_range(pixels).to(vae.device, vae.dtype)).latent_dist
    encoded = torch.cat([posterior.mean, posterior.std], dim=1).float().cpu()
    if not torch.isfinite(encoded).all():
        raise DataError(
            "the autoencoder returned values that are not finite", remedy="use float32 for this autoencoder"
        )
    return encoded.numpy().astype(np.float16)
