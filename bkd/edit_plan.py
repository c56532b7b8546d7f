"""What an edit is asked for, and all about it that can be wrong without loading a model.

Light, so as to refuse before anything heavy loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bkd.diffusion.few_steps import FewSteps, few_steps
from bkd.diffusion.guidance import nearest_scale, pipeline_scale
from bkd.diffusion.scheduler_kinds import require_ode
from bkd.errors import DataError, ModelError
from bkd.eval.drawing import drawing_settings
from bkd.models.folder import native_resolution, scheduler_config
from bkd.models.locate import locate
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
            ModelError: If there is no such model.
        """
        folder = locate(model, weights=False)
        return cls(model, folder, guidance_scale or nearest_scale(folder, 1.0), num_inference_steps)

    @classmethod
    def decoder(cls, model: str, guidance_scale: float | None, num_inference_steps: int) -> Half:
        """From a MODEL argument; with the guidance that the model is usually drawn with where none is given.

        Raises:
            ModelError: If there is no such model.
        """
        folder = locate(model, weights=False)
        usual = drawing_settings(model, None, None)[1]
        return cls(model, folder, guidance_scale or nearest_scale(folder, usual), num_inference_steps)

    def __str__(self) -> str:
        return f"{self.model}: {self.steps}, guidance {self.guidance_scale:g}"

    @property
    def halved(self) -> FewSteps | None:
        """What it was halved to."""
        return few_steps(self.folder)

    @property
    def steps(self) -> FewSteps:
        """What it takes: its own, or as many as was asked for."""
        return self.halved or FewSteps(self.num_inference_steps)

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
        if self.halved is not None and self.halved.direction == "generation":
            raise ModelError(
                "this student draws in few steps, and was not trained to encode",
                where=self.model,
                got=self.halved,
                remedy="an encoder (method.direction=inversion), or the model that it was halved from",
            )
        if (scheduler := scheduler_config(self.folder)).get("prediction_type") == "sample":
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
        if self.halved is not None:
            self.halved.require(None, self.model)
        require_ode(scheduler_config(self.folder), self.model)
        _ = self.pipeline_scale


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
        """Refuse an edit that `require_editable` refuses, or by models that cannot do their part.

        Args:
            overwrite: Whether an earlier output may be replaced.

        Raises:
            BkdError: Naming what is wrong.
        """
        require_editable(self.image, self.prompts, self.output, overwrite=overwrite)
        self.encoder.require_encodes()
        self.decoder.require_draws()


def require_editable(image: Path, prompts: tuple[str, str], output: Path, *, overwrite: bool) -> None:
    """Refuse an edit without prompts, image or place for what comes of it.

    Args:
        image: As in `Edit`, and so are the others.
        prompts: See there.
        output: See there.
        overwrite: Whether an earlier output may be replaced.

    Raises:
        BkdError: Naming what is wrong.
    """
    require_new_file(output, ".png", overwrite=overwrite)
    if not all(prompt.strip() for prompt in prompts):
        raise DataError("an edit needs two prompts", got=prompts, remedy="--from TEXT --to TEXT")
    if not image.is_file():
        raise DataError("no such image", where=image, allowed="a JPEG, PNG or WebP file")
