"""Draw prompts to numbered PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from bkd.data.shapes import EMBEDDED
from bkd.errors import ModelError
from bkd.eval.generate import Drawing, generate
from bkd.few_steps import few_steps, require_steps
from bkd.guidance import nearest_scale, pipeline_scale
from bkd.locate import is_folder, locate
from bkd.models import best_device, load_pipeline
from bkd.output_folder import require_free
from bkd.run_folder import RunFolder
from bkd.schedulers import chosen_scheduler

EMBEDDED_DRAWING = (20, 3.0)
USUAL_DRAWING = (25, 7.5)


def drawing_settings(
    model: str, steps: int | None, guidance: float | None, *, suite: str = "prompts", alone: bool = False
) -> tuple[int, float]:
    """Denoising steps and guidance scale: as asked, else the run's own, else what the kind of model is used with.

    Args:
        model: A MODEL argument.
        steps: As asked.
        guidance: As asked.
        suite: What is drawn for.
        alone: Whether no other model is drawn with, so that what it knows itself comes before what its run says.
    """
    run = RunFolder(Path(model))
    if run.facts_file.is_file():
        samples = run.recipe().samples
        usual = (samples.num_inference_steps, samples.guidance_scale)
        own = alone
    else:
        usual = EMBEDDED_DRAWING if EMBEDDED in (model, suite) else USUAL_DRAWING
        own = is_folder(model)
    if own:
        folder = locate(model, weights=False)
        guidance = guidance or nearest_scale(folder, usual[1])
        if alone and steps is None and (few := few_steps(folder)):
            steps = few.num_inference_steps
    return steps or usual[0], guidance or usual[1]


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
        ModelError: If there is no such model, or it has not learnt that guidance scale, or so many steps.
    """
    folder = locate(model)
    scale = pipeline_scale(folder, drawing.guidance_scale, model)
    require_steps(folder, drawing.num_inference_steps, model)
    if drawing.scheduler is not None and few_steps(folder) is not None:
        raise ModelError(
            "this student was trained for one sampler", where=model, got=drawing.scheduler, remedy="no --scheduler"
        )
    require_free(output, overwrite=overwrite, marker="prompts.txt")
    pipe = load_pipeline(folder, device=best_device())
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
