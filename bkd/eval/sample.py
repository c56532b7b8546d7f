"""Draw prompts to numbered PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from bkd.eval.generate import generate
from bkd.models import best_device, load_pipeline, locate
from bkd.student_folder import require_free


def sample_to_folder(
    model: str,
    prompts: Sequence[str],
    output: Path,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> list[Path]:
    """Write one PNG per prompt, 0000.png on, and prompts.txt beside them.

    Raises:
        OutputError: If the folder holds something and `overwrite` is off.
        ModelError: If there is no such model.
    """
    folder = locate(model)
    require_free(output, overwrite=overwrite)
    images = generate(
        load_pipeline(folder, device=best_device()),
        prompts,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        progress=progress,
    )
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{index:04d}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (output / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return paths
