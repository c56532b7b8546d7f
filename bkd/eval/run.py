"""Measure models on a suite: draw, score, and write what was found with everything needed to repeat it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist

from bkd import __version__
from bkd.diffusion.few_steps import few_steps
from bkd.diffusion.guidance import passes_a_step
from bkd.environment import PACKAGES, installed_version, process_place
from bkd.errors import OutputError
from bkd.eval.candidates import Named, load_candidate, name_candidates
from bkd.eval.drawing import Drawing
from bkd.eval.generate import block_size, draw
from bkd.eval.images import IMAGE_FOLDER, ImageFolder
from bkd.eval.pictures import save_side_by_side
from bkd.eval.suites import Suite
from bkd.files import replace_file, require_writable, write_atomically
from bkd.models.folder import native_resolution, prompt_length, scheduler_config, unet_config
from bkd.models.load import describe_device
from bkd.progress import Phase, Progress
from bkd.runs.folder import SUITES, RunFolder
from bkd.surgery.cost import unet_cost
from bkd.surgery.plan import load_plan
from bkd.training.parallel import Parallel, start_parallel

NUM_PICTURED = 8
ELSEWHERE = "choose another -o, or move it away"


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how.

    Attributes:
        candidates: The models, the reference first.
        suite: Prompts and metrics.
        drawing: How images are drawn.
        dtype: What the models compute in.
        output: Folder of the report.
        batch_size: Images at a time, on a GPU.
    """

    candidates: Sequence[Named]
    suite: Suite
    drawing: Drawing
    dtype: torch.dtype
    output: Path
    batch_size: int | None = None

    @property
    def report_file(self) -> Path:
        return self.output / f"{self.suite.name}.json"

    def settings(self) -> dict[str, Any]:
        """Everything that figures depend on besides the models; as JSON gives it back."""
        prompts = self.suite.prompts()
        settings = {
            **self.suite.settings(),
            "suite": self.suite.name,
            "prompts_digest": digest_of(prompts),
            "drawing": self.drawing.facts(),
            "saving": asdict(self.suite.saving),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        found: dict[str, Any] = json.loads(json.dumps(settings))
        return found

    def images_of(self, candidate: Named, device: torch.device) -> ImageFolder:
        """Where a candidate's images are, or will be."""
        prompts = self.suite.prompts()
        identity = {
            "model": candidate.digest,
            "prompts": digest_of(prompts),
            "drawing": candidate.drawing(self.drawing).facts(),
            "saving": asdict(self.suite.saving),
            "dtype": str(self.dtype),
            "device": device.type,
            "versions": {name: installed_version(name) for name in ("torch", "diffusers", "transformers")},
        }
        return ImageFolder(self.output / "images", candidate.name, identity, self.suite.saving, len(prompts))


def plan_evaluation(
    models: Sequence[str],
    teacher: str | None,
    suite: Suite,
    drawing: Drawing,
    output: Path | None,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
) -> Evaluation:
    """Resolve models and output folder.

    Args:
        models: MODEL arguments.
        teacher: Reference, or None where runs name their own.
        suite: Prompts and metrics.
        drawing: How images are drawn.
        output: Folder of the report; `<run>/eval` for a single run, `eval` otherwise.
        dtype: What the models compute in.
        batch_size: Images at a time, on a GPU.
    """
    candidates = name_candidates(models, teacher)
    single_run = len(models) == 1 and RunFolder(Path(models[0])).facts_file.is_file()
    folder = output or (RunFolder(Path(models[0])).eval if single_run else Path("eval"))
    return Evaluation(candidates, suite, drawing, dtype, folder, batch_size)


def evaluate(evaluation: Evaluation, *, overwrite: bool, phase: Phase, progress: Progress) -> dict[str, Any]:
    """Draw the suite with every model, on the same prompts and the same noise, and measure.

    Images that an earlier call has drawn are used again; several processes share those that are left.

    Args:
        evaluation: What to measure.
        overwrite: Whether a report of other models or settings is replaced.
        phase: Told what begins.
        progress: Called with (done, total) of this process while it draws.

    Returns:
        What `<suite>.json` says; nothing on all processes but the first.

    Raises:
        BkdError: If an input does not fit, before anything is drawn.
    """
    for candidate in evaluation.candidates:
        candidate.drawing(evaluation.drawing)
    digests = {candidate.name: candidate.digest for candidate in evaluation.candidates}
    settings = evaluation.settings()
    known = _known_report(evaluation.report_file)
    # A report of an older version may lack a figure; its images are kept, and scoring them takes moments.
    same = bool(known) and (known["settings"], known["digests"]) == (settings, digests)
    if same and all("num_inference_steps" in row for row in known["models"]):
        phase("already measured")
        return known
    if known and not same and not overwrite:
        _refuse(evaluation.report_file, known, settings, digests)
    require_writable(evaluation.output)
    parallel = start_parallel("ddp")
    phase("looking at the inputs")
    # On the first process, and before anything is drawn; the others would load what they never use.
    scorer = evaluation.suite.scorer(evaluation.candidates) if parallel.is_main else None
    drawn = [_drawn(evaluation, candidate, parallel, phase, progress) for candidate in evaluation.candidates]
    if parallel.kind != "alone":
        dist.barrier()
    if scorer is None:
        return {}
    scores = scorer.score(drawn, phase)
    rows = [
        {"name": candidate.name, **_cost(candidate, evaluation.drawing), **row}
        for candidate, row in zip(evaluation.candidates, scores, strict=True)
    ]
    report = {
        "settings": settings,
        "environment": _environment(evaluation, parallel),
        "digests": digests,
        "images": [folder.path.name for folder in drawn],
        "models": rows,
    }
    _write(evaluation, report, known, drawn)
    return report


def digest_of(prompts: Sequence[str]) -> str:
    """A name for a list of prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _known_report(path: Path) -> dict[str, Any]:
    """An earlier report; empty where there is none.

    Raises:
        OutputError: If something else has the report's name, or its picture's.
    """
    if not path.is_file():
        if path.with_suffix(".png").exists() and not (path.parent / "images").is_dir():
            raise OutputError(
                "a picture of that name is there, and no report", where=path.with_suffix(".png"), remedy=ELSEWHERE
            )
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not {"settings", "digests", "models"} <= found.keys():
        raise OutputError("a file of that name is there, and it is no report", where=path, remedy=ELSEWHERE)
    return found


def _refuse(path: Path, known: Mapping[str, Any], settings: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    before, now = known["settings"], settings
    changed = [
        f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    for name in [*known["digests"], *(name for name in digests if name not in known["digests"])]:
        if name not in digests or name not in known["digests"]:
            changed.append(f"'{name}' is measured {'there' if name not in digests else 'here'} only")
        elif digests[name] != known["digests"][name]:
            changed.append(f"'{name}' is another model there")
    raise OutputError(
        "the output folder holds a report of other models or settings",
        where=path,
        got="; ".join(changed),
        remedy="choose another -o, or add --overwrite",
    )


def _drawn(
    evaluation: Evaluation, candidate: Named, parallel: Parallel, phase: Phase, progress: Progress
) -> ImageFolder:
    """A candidate's images, this process's share of them drawn where they were missing."""
    folder = evaluation.images_of(candidate, parallel.device)
    prompts, place = evaluation.suite.prompts(), process_place()
    block = block_size(native_resolution(candidate.folder))
    # Whole blocks for each process: on a CPU a block costs the same however many of its images are wanted. All take
    # them from one list, and nobody draws before it is made.
    missing = parallel.agree(folder.missing())
    mine = set(sorted({number // block for number in missing})[place.rank :: place.world_size])
    share = [number for number in missing if number // block in mine]
    if not share:
        return folder
    phase(f"drawing {len(share):,} of {len(prompts):,} prompts with {candidate.name}")
    drawing = candidate.drawing(evaluation.drawing)
    pipe = load_candidate(candidate, evaluation.dtype, parallel.device, drawing.scheduler)
    called = replace(drawing, guidance_scale=candidate.pipeline_scale(drawing.guidance_scale))
    images = draw(pipe, prompts, share, called, batch_size=evaluation.batch_size)
    for done, (number, image) in enumerate(images, 1):
        folder.add(number, image)
        progress(done, len(share))
    return folder


def _write(
    evaluation: Evaluation, report: Mapping[str, Any], known: Mapping[str, Any], drawn: Sequence[ImageFolder]
) -> None:
    """The report, a picture of the first prompts, and away with the images of the report that it replaces."""
    prompts = evaluation.suite.prompts()[:NUM_PICTURED]
    first = {
        candidate.name: folder.read(range(len(prompts)))
        for candidate, folder in zip(evaluation.candidates, drawn, strict=True)
    }
    if len({images.shape for images in first.values()}) == 1:
        with replace_file(evaluation.output / f"{evaluation.suite.name}.png") as stream:
            save_side_by_side(stream, first, prompts)
    write_atomically(evaluation.report_file, json.dumps(report, indent=2) + "\n")
    for name in set(known.get("images", ())) - set(report["images"]) - _images_of_other_reports(evaluation):
        if IMAGE_FOLDER.fullmatch(name) and (folder := evaluation.output / "images" / name).is_dir():
            rmtree(folder)


def _images_of_other_reports(evaluation: Evaluation) -> set[str]:
    """Folders that reports of other suites in the same output name."""
    others = [evaluation.output / f"{suite}.json" for suite in SUITES if suite != evaluation.suite.name]
    return {name for path in others if path.is_file() for name in _known_report(path).get("images", ())}


def _cost(candidate: Named, drawing: Drawing) -> dict[str, Any]:
    plan = load_plan(candidate.pruned_like) if candidate.pruned_like else None
    unet = unet_config(candidate.folder)
    cost = unet_cost(unet, plan, num_tokens=prompt_length(candidate.folder))
    as_drawn = unet if plan is None else {**unet, **plan.overrides}
    return {
        "unet_parameters": cost.parameters,
        "unet_macs": cost.macs,
        "passes_a_step": passes_a_step(as_drawn, candidate.pipeline_scale(drawing.guidance_scale)),
        "num_inference_steps": candidate.drawing(drawing).num_inference_steps,
        "unet_macs_without_attention": cost.macs_without_attention,
        "sampler": _sampler(candidate, drawing),
    }


def _sampler(candidate: Named, drawing: Drawing) -> dict[str, Any]:
    """What a candidate is drawn with."""
    own = scheduler_config(candidate.folder)
    chosen, few = candidate.drawing(drawing).scheduler, few_steps(candidate.folder)
    return {**own, **({"chosen": chosen} if chosen else {}), **({"few_steps": few.facts()} if few else {})}


def _environment(evaluation: Evaluation, parallel: Parallel) -> dict[str, Any]:
    return {
        "bkd": __version__,
        "device": describe_device(parallel.device),
        "versions": {name: installed_version(name) for name in (*PACKAGES, "torch-fidelity", "scipy")},
    }
