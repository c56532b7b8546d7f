"""Suites `prompts` and `coco30k`: any prompts, compared with real images, with their prompts and with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bkd.errors import DataError
from bkd.eval.candidates import Named
from bkd.eval.clip_score import ClipScorer, load_clip
from bkd.eval.closeness import closeness
from bkd.eval.fidelity import FeatureStatistics, fid, inception_score, kid
from bkd.eval.images import ImageFolder, Saving
from bkd.eval.inception import WHERE, Inception, load_inception
from bkd.eval.reference import Reference, find_reference
from bkd.eval.statistics import mean_of
from bkd.eval.suites import Phase, or_skipped, require_prompts, skipped
from bkd.files import file_digest
from bkd.model_folder import native_resolution
from bkd.models import best_device

NUM_RESAMPLES = 20
"""For intervals of FID, KID and IS, whose resamples take seconds each."""


@dataclass(frozen=True)
class PromptsSuite:
    """Prompts of the user's, and what their images are measured by; what is not given is skipped.

    Attributes:
        name: `prompts` or `coco30k`.
        texts: In order.
        saving: What becomes of an image before it is measured.
        reference: Folder of real images, or an `.npz` of pytorch-fid.
        inception: Weight file of FID's InceptionV3.
        clip: Folder or weight file of an open_clip model.
        clip_architecture: Of a weight file.
    """

    name: str
    texts: tuple[str, ...]
    saving: Saving
    reference: Path | None = None
    inception: Path | None = None
    clip: Path | None = None
    clip_architecture: str | None = None

    def __post_init__(self) -> None:
        require_prompts(self.texts)

    def prompts(self) -> list[str]:
        return list(self.texts)

    def settings(self) -> dict[str, Any]:
        return {
            "num_prompts": len(self.texts),
            "reference": str(self.reference) if self.reference else None,
            "inception": _digest(self.inception),
            "clip": _digest(self.clip),
            "clip_architecture": self.clip_architecture,
            "num_resamples": NUM_RESAMPLES,
        }

    def scorer(self, candidates: Sequence[Named]) -> PromptsScorer:
        sides = {self.saving.side or native_resolution(candidate.folder) for candidate in candidates}
        if self.reference is not None and len(sides) > 1:
            raise DataError(
                "models that draw different sizes are compared with one reference",
                got=", ".join(f"{native_resolution(c.folder)} px ({c.name})" for c in candidates),
                remedy="--resize 256 brings all of them to one size",
            )
        if self.reference is not None and self.inception is None:
            raise DataError(
                "a reference is compared by InceptionV3's features", got="no --inception", remedy=f"--inception {WHERE}"
            )
        resized = self.saving.side is not None
        found = find_reference(self.reference, side=min(sides), resized=resized) if self.reference else None
        device = best_device()
        return PromptsScorer(
            self.texts,
            found,
            load_inception(self.inception, device) if self.inception else None,
            load_clip(self.clip, architecture=self.clip_architecture, device=device) if self.clip else None,
        )


def _digest(path: Path | None) -> str | None:
    """What a path to weights stands for, so that others under the same path are noticed."""
    if path is None or path.is_dir():
        return str(path) if path else None
    return file_digest(path) if path.is_file() else None


@dataclass(frozen=True, eq=False)
class PromptsScorer:
    """The metrics, with everything they need loaded."""

    prompts: Sequence[str]
    reference: Reference | None
    inception: Inception | None
    clip: ClipScorer | None

    def score(self, drawn: Sequence[ImageFolder], phase: Phase) -> list[dict[str, Any]]:
        statistics, real = self._reference(phase)
        rows = []
        for number, folder in enumerate(drawn, 1):
            phase(f"measuring the images of model {number} of {len(drawn)}")
            rows.append(
                {
                    **self._distances(folder, statistics, real),
                    "clip_score": self._clip_score(folder),
                    "closeness": _closeness(folder, drawn[0]),
                }
            )
        return rows

    def _reference(self, phase: Phase) -> tuple[FeatureStatistics | None, Tensor | None]:
        """What FID compares with, and the features that KID compares with; None where there are none."""
        if self.reference is None or self.inception is None:
            return None, None
        if (published := self.reference.statistics) is not None:
            return published, None
        phase(f"features of {len(self.reference.files):,} reference images")
        statistics = FeatureStatistics.of(self.inception.features(self.reference.batches(), "pytorch-fid"))
        return statistics, self.inception.features(self.reference.batches(), "torch-fidelity")

    def _distances(
        self, folder: ImageFolder, statistics: FeatureStatistics | None, real: Tensor | None
    ) -> dict[str, Any]:
        inception = self.inception
        if inception is None:
            return dict.fromkeys(("fid", "kid", "inception_score"), skipped(f"no InceptionV3: --inception {WHERE}"))
        reference = self.reference.digest if self.reference else None
        depends = {"extractor": inception.name, "reference": reference}
        theirs = inception.features(folder.batches(), "torch-fidelity")
        found = {"inception_score": or_skipped(lambda: self._inception_score(inception, theirs))}
        if statistics is None:
            return {**dict.fromkeys(("fid", "kid"), skipped("no reference images or statistics: --reference")), **found}
        ours = inception.features(folder.batches(), "pytorch-fid")
        found["fid"] = {
            **or_skipped(lambda: fid(ours, statistics, num_resamples=NUM_RESAMPLES)),
            **depends,
            "resize": "pytorch-fid",
        }
        if real is None:
            found["kid"] = skipped("the reference is statistics alone, and KID compares images: give their folder")
        else:
            found["kid"] = {
                **or_skipped(lambda: kid(theirs, real, num_resamples=NUM_RESAMPLES)),
                **depends,
                "resize": "torch-fidelity",
            }
        return found

    def _inception_score(self, inception: Inception, features: Tensor) -> dict[str, Any]:
        found = inception_score(inception.logits(features), num_resamples=NUM_RESAMPLES)
        return {**found, "extractor": inception.name, "resize": "torch-fidelity"}

    def _clip_score(self, folder: ImageFolder) -> dict[str, Any]:
        if self.clip is None:
            return skipped("no CLIP: --clip FOLDER")
        scores = self.clip.scores((image for batch in folder.batches() for image in batch), self.prompts)
        found = mean_of(scores)
        return {**vars(found), "extractor": self.clip.name, "weights": self.clip.digest, "of": "cosine, -1..1"}


def _closeness(folder: ImageFolder, reference: ImageFolder) -> dict[str, Any]:
    if folder is reference:
        return skipped("this is the model that the others are compared with")
    if next(folder.batches([0])).shape != next(reference.batches([0])).shape:
        return skipped("the two draw images of different sizes")
    return closeness(folder.batches(), reference.batches())
