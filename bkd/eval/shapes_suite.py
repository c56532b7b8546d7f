"""Suite `shapes`: does an image of the embedded world show what its caption says, and are the images like renders?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor

from bkd.data.shapes import SIDE, SPLITS, WORLD_VERSION, Split, scene, scenes
from bkd.data.shapes_checker import ATTRIBUTES, Verdict, check, rendered
from bkd.errors import DataError, one_of
from bkd.eval.candidates import Named
from bkd.eval.fidelity import FeatureStatistics, fid
from bkd.eval.images import ImageFolder, Saving
from bkd.eval.shapes_features import NAME, load_shapes_features, shapes_features
from bkd.eval.statistics import mcnemar_p, proportion
from bkd.eval.suites import or_skipped
from bkd.models.folder import native_resolution
from bkd.progress import Phase

NUM_REFERENCE = 5000
REFERENCE_SEED = 1
"""Renders of another world of the same kind: no drawn caption is among them on purpose."""
NUM_RESAMPLES = 200


@dataclass(frozen=True)
class ShapesSuite:
    """Captions of the embedded world.

    Attributes:
        num_prompts: Of each split, from its first scene on.
        splits: `test` captions never occur in training; `novel` has unseen combinations of shape, colour and place.
    """

    num_prompts: int = 200
    splits: tuple[str, ...] = ("test", "novel")
    name = "shapes"
    saving = Saving()

    def __post_init__(self) -> None:
        for split in self.splits:
            one_of(split, SPLITS, kind="split", error=DataError)

    def prompts(self) -> list[str]:
        return [s.caption for split in self.splits for s in scenes(cast(Split, split), self.num_prompts)]

    def settings(self) -> dict[str, Any]:
        reference = {"renders": NUM_REFERENCE, "seed": REFERENCE_SEED, "of": "the same split"}
        return {**asdict(self), "world_version": WORLD_VERSION, "extractor": NAME, "reference": reference}

    def scorer(self, candidates: Sequence[Named]) -> ShapesScorer:
        for candidate in candidates:
            if (side := native_resolution(candidate.folder)) != SIDE:
                raise DataError(
                    "suite shapes measures models of the embedded world",
                    where=candidate.name,
                    got=f"a model that draws {side} px",
                    allowed=f"{SIDE} px",
                    remedy="add --suite prompts --prompts FILE",
                )
        return ShapesScorer(self)


class ShapesScorer:
    """Caption accuracy and shapes-FID, split by split.

    Args:
        suite: Whose prompts were drawn.
    """

    def __init__(self, suite: ShapesSuite) -> None:
        self._suite, self._features = suite, load_shapes_features()

    def score(self, drawn: Sequence[ImageFolder], phase: Phase) -> list[dict[str, Any]]:
        phase("reading the images back")
        images, prompts = [folder.read() for folder in drawn], self._suite.prompts()
        rows: list[dict[str, Any]] = [{"splits": {}} for _ in drawn]
        for number, split in enumerate(self._suite.splits):
            part = slice(number * self._suite.num_prompts, (number + 1) * self._suite.num_prompts)
            reference = self.reference(split)
            verdicts = [check(found[part], prompts[part]) for found in images]
            for row, found, seen in zip(rows, images, verdicts, strict=True):
                distance = or_skipped(lambda: self.shapes_fid(found[part], reference))  # noqa: B023 - called at once
                row["splits"][split] = {**accuracies(seen, prompts[part], verdicts[0]), "shapes_fid": distance}
        return rows

    def reference(self, split: str) -> FeatureStatistics:
        """Features of renders."""
        drawn = (scene(cast(Split, split), index, seed=REFERENCE_SEED) for index in range(NUM_REFERENCE))
        return FeatureStatistics.of(shapes_features(self._features, rendered(drawn)))

    def shapes_fid(self, pixels: Tensor, reference: FeatureStatistics) -> dict[str, Any]:
        """Frechet distance of images, (N, 3, 32, 32), uint8, by the embedded features."""
        return fid(shapes_features(self._features, pixels), reference, num_resamples=NUM_RESAMPLES)


def accuracies(seen: Sequence[Verdict], prompts: Sequence[str], reference: Sequence[Verdict]) -> dict[str, Any]:
    """How many captions are right, as a whole and in parts, with Wilson intervals, and compared with the reference.

    Args:
        seen: One model's verdicts.
        prompts: The captions.
        reference: The reference model's verdicts on the same captions.
    """
    correct, theirs = ([verdict.correct for verdict in found] for found in (seen, reference))

    def share(outcome: Callable[[Verdict], bool], objects: int | None = None) -> dict[str, Any] | None:
        kept = [objects in (None, 1 + (" and " in prompt)) for prompt in prompts]
        outcomes = [outcome(verdict) for verdict, keep in zip(seen, kept, strict=True) if keep]
        return asdict(proportion(outcomes)) if outcomes else None

    return {
        "accuracy": share(lambda verdict: verdict.correct),
        "attributes": {name: share(lambda verdict, name=name: verdict.attributes[name]) for name in ATTRIBUTES},  # type: ignore[misc]
        "by_objects": {
            name: share(lambda verdict: verdict.correct, number) for number, name in ((1, "one"), (2, "two"))
        },
        "relative": sum(correct) / sum(theirs) if any(theirs) else None,
        "mcnemar_p": mcnemar_p(theirs, correct),
    }
