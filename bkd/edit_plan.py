"""What an edit is asked for, and all about it that can be wrong without loading a model.

Light, so as to refuse before anything heavy loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd.errors import DataError, ModelError
from bkd.eval.drawing import drawing_settings
from bkd.few_steps import FewSteps, few_steps, require_ode
from bkd.guidance import nearest_scale, pipeline_scale
from bkd.locate import locate
from bkd.model_folder import native_resolution, read_json
from bkd.output_folder import require_new_file


@dataclass(frozen=True)
class Half:
    """One of the two models of an edit.

    Attributes:
        model: As the user named it.
        folder: Its pipeline folder.
        guidance_scale: Of its prompt; 1 for none.
        num_inference_steps: Of a model that was not halved.
    """

    model: str
    folder: Path
    guidance_scale: float
    num_inference_steps: int = 50

    @classmethod
    def encoder(cls, model: str, guidance_scale: float | None, num_inference_steps: int) -> Half:
        """From a MODEL argument; without guidance, or with as little as the model knows, where none is given.

        Raises:
            ModelError: If there is no such model, or it cannot encode so.
        """
        folder = locate(model)
        half = cls(model, folder, guidance_scale or nearest_scale(folder, 1.0), num_inference_steps)
        half.require_encodes()
        return half

    @classmethod
    def decoder(cls, model: str, guidance_scale: float | None, num_inference_steps: int) -> Half:
        """From a MODEL argument; with the guidance that the model is usually drawn with where none is given.

        Raises:
            ModelError: If there is no such model, or it cannot draw so.
        """
        folder = locate(model)
        usual = drawing_settings(model, None, None)[1]
        half = cls(model, folder, guidance_scale or nearest_scale(folder, usual), num_inference_steps)
        half.require_draws()
        return half

    def __str__(self) -> str:
        steps = self.steps or FewSteps(self.num_inference_steps)
        return f"{self.model}: {steps}, guidance {self.guidance_scale:g}"

    @property
    def steps(self) -> FewSteps | None:
        """What it was halved to."""
        return few_steps(self.folder)

    @property
    def pipeline_scale(self) -> float:
        """The `guidance_scale` to call its pipeline with.

        Raises:
            ModelError: If it has not learnt that scale.
        """
        return pipeline_scale(self.folder, self.guidance_scale, self.model)

    def require_encodes(self) -> None:
        """Refuse a model whose steps cannot be taken backwards.

        A student that draws in few steps would be told noise levels that it never saw, and of a clean image, which
        encoding begins with, a model of prediction type `sample` says nothing.
        """
        if self.steps is not None and self.steps.direction == "generation":
            raise ModelError(
                "this student draws in few steps, and was not trained to encode",
                where=self.model,
                got=self.steps,
                remedy="an encoder (method.direction=inversion), or the model that it was halved from",
            )
        if (scheduler := self._scheduler()).get("prediction_type") == "sample":
            raise ModelError(
                "this model predicts the clean image, which says nothing of noise while there is none",
                where=self.model,
                got="prediction_type sample",
                allowed="epsilon, v_prediction",
            )
        require_ode(scheduler, self.model)
        _ = self.pipeline_scale

    def require_draws(self) -> None:
        """Refuse a student that encodes, and models that DDIM does not draw with."""
        if self.steps is not None and self.steps.direction == "inversion":
            raise ModelError(
                "this student encodes images, and does not draw",
                where=self.model,
                got=self.steps,
                remedy="--decoder MODEL: one that draws, such as its teacher or a student of few steps",
            )
        require_ode(self._scheduler(), self.model)
        _ = self.pipeline_scale

    def _scheduler(self) -> Mapping[str, Any]:
        return read_json(self.folder / "scheduler" / "scheduler_config.json")


@dataclass(frozen=True)
class Edit:
    """An image to be edited.

    Attributes:
        image: JPEG, PNG or WebP file.
        prompts: What it shows, and what it is to show.
        encoder: Finds its noise.
        decoder: Draws from that.
        output: `.png` file to write.
        seed: Of the noise that a stochastic decoder adds, 0 or more.
    """

    image: Path
    prompts: tuple[str, str]
    encoder: Half
    decoder: Half
    output: Path
    seed: int = 0

    @property
    def side(self) -> int:
        """Of the image, in pixels."""
        return native_resolution(self.encoder.folder)

    def require_possible(self, *, overwrite: bool) -> None:
        """Refuse an edit without prompts, image or place for what comes of it.

        Args:
            overwrite: Whether an earlier output may be replaced.

        Raises:
            BkdError: Naming what is wrong.
        """
        require_new_file(self.output, ".png", overwrite=overwrite)
        if not all(prompt.strip() for prompt in self.prompts):
            raise DataError("an edit needs two prompts", got=self.prompts, remedy="--from TEXT --to TEXT")
        if not self.image.is_file():
            raise DataError("no such image", where=self.image, allowed="a JPEG, PNG or WebP file")
