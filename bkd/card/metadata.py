"""The head of a card: what the Hub files a model under, and its figures as the Hub reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bkd.card.files import DIGEST_KEY
from bkd.card.subject import Subject
from bkd.diffusion.guidance import StudentKind
from bkd.eval.shown import METRIC_TITLES, SUITE_TITLES
from bkd.models.folder import is_inpainting, unet_config
from bkd.runs.measuring import draws

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def metadata(subject: Subject) -> str:
    """YAML between two lines of dashes, those included."""
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        license=subject.license.id,
        license_name=subject.license.name,
        license_link=subject.license.link,
        base_model=subject.base_model,
        datasets=subject.datasets or None,
        library_name="diffusers",
        pipeline_tag=_pipeline_tag(subject),
        tags=["stable-diffusion", "bkd", *_tags(subject)],
        model_name=subject.name,
        eval_results=[result for report in subject.evaluations for result in _results(report)] or None,
    )
    head[DIGEST_KEY] = subject.digest
    return f"---\n{head.to_yaml()}\n---\n"


def _pipeline_tag(subject: Subject) -> str | None:
    """The Hub's word for what it does; none for one that encodes."""
    if not draws(subject.run):
        return None
    return "image-to-image" if is_inpainting(unet_config(subject.student)) else "text-to-image"


def _tags(subject: Subject) -> Iterator[str]:
    kind = StudentKind.of(subject.student)
    yield "knowledge-distillation" if subject.distilled else "fine-tuned"
    if subject.built.removed:
        yield "pruned"
    if kind.guidance is not None:
        yield "guidance-distilled"
    if kind.few_steps is not None:
        yield "few-step"


def _results(report: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Every figure of the student, with the conditions it holds under."""
    from huggingface_hub import EvalResult

    settings, student = report["settings"], report["models"][-1]
    drawing = settings["drawing"]
    conditions = {
        "num_prompts": settings["num_prompts"],
        "num_inference_steps": student["num_inference_steps"],
        "guidance_scale": drawing["guidance_scale"],
        "seed": drawing["seed"],
    }
    for split, kind, title, value in _figures(settings, student):
        yield EvalResult(
            task_type="text-to-image",
            dataset_type="custom",  # the Hub takes other words for the id of a data set
            dataset_name=SUITE_TITLES[settings["suite"]],
            dataset_split=split,
            dataset_args=conditions,
            metric_type=kind,
            metric_name=title,
            metric_value=value,
        )


def _figures(settings: Mapping[str, Any], student: Mapping[str, Any]) -> Iterator[tuple[str | None, str, str, float]]:
    """Split, identifier, title and value."""
    if settings["suite"] != "shapes":
        for key, title in METRIC_TITLES.items():
            if "value" in student[key]:
                yield None, key, title, student[key]["value"]
        return
    for split in settings["splits"]:
        found = student["splits"][split]
        yield split, "accuracy", "Caption accuracy", found["accuracy"]["successes"] / found["accuracy"]["total"]
        if "value" in found["shapes_fid"]:
            yield split, "shapes-fid", "shapes-FID", found["shapes_fid"]["value"]
