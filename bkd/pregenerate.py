"""Shards drawn by a teacher from prompts: what a student learns from where no pictures are to be had."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bkd.data.images import images_at_once
from bkd.data.indexing import index_shard
from bkd.data.output_set import ALONE, OutputSet, open_output_set
from bkd.data.shards import NewSample, Record, to_record
from bkd.diffusion.few_steps import require_steps
from bkd.diffusion.guidance import pipeline_scale
from bkd.environment import Place
from bkd.eval.generate import MAX_BATCH, generate
from bkd.files import cache_folder
from bkd.models.folder import model_digest, native_resolution
from bkd.models.load import best_device, load_pipeline
from bkd.models.locate import locate
from bkd.progress import Progress, part_of, silent

SAMPLES_PER_SHARD = 1000
"""Fewer than a download's: a stop loses at most one shard's images."""


@dataclass(frozen=True, kw_only=True)
class ShardDrawing:
    """How images are drawn and stored.

    Attributes:
        num_inference_steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; 1 for none.
        seed: Image i starts from noise of a generator of its own, seeded by (seed, i).
        extension: `png` keeps every pixel; `jpg` (quality 95, no chroma subsampling) takes about a fourth of the space.
        per_shard: Images in a shard.
    """

    num_inference_steps: int
    guidance_scale: float
    seed: int = 0
    extension: str = "png"
    per_shard: int = SAMPLES_PER_SHARD


def generate_shards(
    model: str,
    prompts: Sequence[str],
    drawing: ShardDrawing,
    folder: Path,
    *,
    place: Place = ALONE,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Draw every prompt that has not been drawn yet, into img2dataset-like shards.

    Shard n holds prompts n * per_shard on, and is drawn in the same batches whoever draws it: the bytes do not depend
    on the number of processes, nor on stops in between.

    Args:
        model: The teacher, a MODEL argument.
        prompts: One for each image.
        drawing: See `ShardDrawing`.
        folder: Output.
        place: Of this process among those that share the work.
        overwrite: Whether a data set of other settings may be replaced.
        progress: Called with images of this process's share.

    Raises:
        BkdError: If there is no such teacher, it does not draw at that scale, or the folder holds something else.
    """
    teacher = locate(model)
    settings = {
        **asdict(drawing),
        "teacher": model_digest(teacher),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "num_prompts": len(prompts),
    }
    # A teacher that does not draw is refused before anything is made.
    pipeline_scale(teacher, drawing.guidance_scale, teacher)
    require_steps(teacher, drawing.num_inference_steps, teacher)
    pipe = load_pipeline(teacher, device=best_device())
    num_shards = -(-len(prompts) // drawing.per_shard)
    output = open_output_set(folder, "generate", num_shards, settings, place=place, overwrite=overwrite)
    sizes = [len(range(len(prompts))[_slice(n, drawing)]) for n in range(num_shards)]
    todo = output.unfinished(place)
    total = sum(sizes[number] for number in output.share(place))
    done = total - sum(sizes[number] for number in todo)
    progress(done, total)
    for number in todo:
        _generate_shard(output, number, pipe, teacher, prompts, drawing, part_of(progress, done, total))
        index_shard(output.path(number), cache_folder())
        done += sizes[number]


def _slice(number: int, drawing: ShardDrawing) -> slice:
    return slice(number * drawing.per_shard, (number + 1) * drawing.per_shard)


def _generate_shard(
    output: OutputSet,
    number: int,
    pipe: Any,
    teacher: Path,
    prompts: Sequence[str],
    drawing: ShardDrawing,
    report: Callable[[int], None],
) -> None:
    indices = range(len(prompts))[_slice(number, drawing)]
    side = native_resolution(teacher)
    batch = images_at_once(side, MAX_BATCH)

    def records() -> Iterator[Record]:
        for start in range(0, len(indices), batch):
            chunk = indices[start : start + batch]
            images = generate(
                pipe,
                [prompts[index] for index in chunk],
                num_inference_steps=drawing.num_inference_steps,
                guidance_scale=pipeline_scale(teacher, drawing.guidance_scale, teacher),
                seed=drawing.seed,
                first=chunk[0],
            )
            for index, image in zip(chunk, images, strict=True):
                yield to_record(number, index - indices[0], _sample(image, prompts[index], index, drawing))
            report(start + len(chunk))

    output.write(number, records())


def _sample(image: Tensor, prompt: str, index: int, drawing: ShardDrawing) -> NewSample:
    encoded = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    options = {"format": "PNG"} if drawing.extension == "png" else {"format": "JPEG", "quality": 95, "subsampling": 0}
    picture.save(encoded, **options)
    size = {"width": picture.width, "height": picture.height}
    original = {f"original_{name}": side for name, side in size.items()}
    drawn = {"seed": drawing.seed, "image_number": index, "guidance_scale": drawing.guidance_scale}
    return NewSample(
        image=encoded.getvalue(),
        extension=drawing.extension,
        caption=prompt,
        metadata={**size, **original, **drawn, "num_inference_steps": drawing.num_inference_steps},
    )
