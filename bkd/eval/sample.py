"""Draw prompts to numbered PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from bkd.diffusion.schedulers import chosen_scheduler
from bkd.eval.drawing import Drawing, require_drawable
from bkd.eval.generate import generate
from bkd.models.load import best_device, load_pipeline
from bkd.models.locate import locate
from bkd.output_folder import require_free


def sample_to_folder(
    model: str,
    prompts: Sequence[str],
    output: Path,
    drawing: Drawing,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> list[Path]:
    """Write one PNG per prompt, 0000.png on, and prompts.txt beside them.

    Raises:
        OutputError: If the folder holds something and `overwrite` is off.
        ModelError: If there is no such model, or it does not draw so; see `require_drawable`.
    """
    scale = require_drawable(model, drawing)
    require_free(output, overwrite=overwrite, marker="prompts.txt")
    pipe = load_pipeline(locate(model), device=best_device())
    if drawing.scheduler is not None:
        pipe.scheduler = chosen_scheduler(drawing.scheduler, pipe.scheduler)
    images = generate(
        pipe,
        prompts,
        num_inference_steps=drawing.num_inference_steps,
        guidance_scale=scale,
        seed=drawing.seed,
        progress=progress,
    )
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("[0-9][0-9][0-9][0-9].png"):
        old.unlink()
    paths = [output / f"{index:04d}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (output / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return paths
