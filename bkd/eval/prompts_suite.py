"""Suites `prompts` and `coco30k`: any prompts, compared with real images, with their prompts and with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bkd.data.prompts import require_prompts
from bkd.errors import DataError
from bkd.eval.candidates import Named
from bkd.eval.clip_score import ClipScorer, clip_digest, load_clip
from bkd.eval.closeness import closeness
from bkd.eval.fidelity import FeatureStatistics, fid, inception_score, kid
from bkd.eval.images import ImageFolder, Saving
from bkd.eval.inception import WHERE, Inception, inception_digest, load_inception
from bkd.eval.reference import Reference, find_reference, reference_digest
from bkd.eval.statistics import mean_of
from bkd.eval.suites import or_skipped, skipped
from bkd.models.folder import native_resolution
from bkd.models.load import best_device
from bkd.progress import Phase

NO_REFERENCE = "no reference images or statistics: --reference"
NUM_RESAMPLES = 20
"""For intervals of FID and IS, whose resamples take seconds each."""


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
        require_prompts(self.texts, remedy="add --prompts FILE, with one prompt a line")

    def prompts(self) -> list[str]:
        return list(self.texts)

    def settings(self) -> dict[str, Any]:
        return {
            "num_prompts": len(self.texts),
            "reference": reference_digest(self.reference) if self.reference else None,
            "inception": inception_digest(self.inception) if self.inception else None,
            "clip": clip_digest(self.clip) if self.clip else None,
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
        return PromptsScorer(
            self.texts,
            found,
            load_inception(self.inception) if self.inception else None,
            load_clip(self.clip, architecture=self.clip_architecture) if self.clip else None,
        )


@dataclass(frozen=True, eq=False)
class PromptsScorer:
    """The metrics, with everything they need loaded; it takes room on a GPU only while it measures."""

    prompts: Sequence[str]
    reference: Reference | None
    inception: Inception | None
    clip: ClipScorer | None

    def score(self, drawn: Sequence[ImageFolder], phase: Phase) -> list[dict[str, Any]]:
        device = best_device()
        placed = replace(
            self,
            inception=self.inception.to(device) if self.inception else None,
            clip=self.clip.to(device) if self.clip else None,
        )
        return placed._rows(drawn, phase)

    def _rows(self, drawn: Sequence[ImageFolder], phase: Phase) -> list[dict[str, Any]]:
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
        real = self.inception.features(self.reference.batches(), "torch-fidelity")
        if len(real) <= self.inception.num_features:
            return None, real
        return FeatureStatistics.of(self.inception.features(self.reference.batches(), "pytorch-fid")), real

    def _distances(
        self, folder: ImageFolder, statistics: FeatureStatistics | None, real: Tensor | None
    ) -> dict[str, Any]:
        inception = self.inception
        if inception is None:
            return dict.fromkeys(("fid", "kid", "inception_score"), skipped(f"no InceptionV3: --inception {WHERE}"))
        reference = self.reference.digest if self.reference else None
        depends = {"extractor": inception.name, "reference": reference}
        theirs = inception.features(folder.batches(), "torch-fidelity")
        return {
            "fid": {**self._fid(inception, folder, statistics), **depends, "resize": "pytorch-fid"},
            "kid": {**self._kid(theirs, real), **depends, "resize": "torch-fidelity"},
            "inception_score": or_skipped(lambda: self._inception_score(inception, theirs)),
        }

    def _fid(self, inception: Inception, folder: ImageFolder, statistics: FeatureStatistics | None) -> dict[str, Any]:
        if self.reference is None:
            return skipped(NO_REFERENCE)
        if statistics is None:
            return skipped(f"{len(self.reference.files):,} reference images are too few for a covariance")
        ours = inception.features(folder.batches(), "pytorch-fid")
        return or_skipped(lambda: fid(ours, statistics, num_resamples=NUM_RESAMPLES))

    def _kid(self, features: Tensor, real: Tensor | None) -> dict[str, Any]:
        if self.reference is None:
            return skipped(NO_REFERENCE)
        if real is None:
            return skipped("the reference is statistics alone, and KID compares images: give their folder")
        return or_skipped(lambda: kid(features, real))

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
    return closeness(folder.batches(), reference.batches(), best_device())
