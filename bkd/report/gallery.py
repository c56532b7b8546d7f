"""Pictures of a run: one model's beside another's, and how they change over training, stages or models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bkd.eval.sheet import Sheet, read_picture, read_sheet
from bkd.report.embedded import LOSSLESS_SIDE, Embedded
from bkd.report.words import every
from bkd.runs.folder import RunFolder

MAX_FRAMES = 24
"""Of a slider; of more pictures every so many are taken, the last always."""
MAX_ABREAST = 3
"""Models that are shown beside each other; of more, a slider chooses which is beside the first."""
END = float("inf")
"""Step of a stage's final picture."""
SAMPLE = re.compile(r"(\d+)-(?:step-(\d+)|final)\.png")


@dataclass(frozen=True)
class Tile:
    """A picture of one model.

    Attributes:
        model: Its name.
        picture: Digest of the picture, as `Embedded` knows it.
        size: Width and height in pixels, as drawn.
    """

    model: str
    picture: str
    size: tuple[int, int]

    @property
    def small(self) -> bool:
        """Whether its pixels are to be seen, enlarged."""
        return max(self.size) <= LOSSLESS_SIDE


@dataclass(frozen=True)
class Frame:
    """What is seen at one place of the slider.

    Attributes:
        label: Which place that is.
        tiles: For each prompt, one of each model.
    """

    label: str
    tiles: tuple[tuple[Tile, ...], ...]


@dataclass(frozen=True)
class Gallery:
    """Pictures of the same prompts.

    Attributes:
        title: What they are.
        over: What the slider goes over.
        prompts: Beneath the pictures; an empty one where a picture shows several prompts itself.
        frames: At least one; the last is shown first.
    """

    title: str
    over: str
    prompts: tuple[str, ...]
    frames: tuple[Frame, ...]

    @property
    def last(self) -> Frame:
        return self.frames[-1]

    @property
    def data(self) -> list[dict[str, object]]:
        """All frames, for the page's script."""
        return [
            {"label": frame.label, "tiles": [[(tile.picture, tile.model) for tile in tiles] for tiles in frame.tiles]}
            for frame in self.frames
        ]


@dataclass(frozen=True)
class Shot:
    """A comparison picture on disk.

    Attributes:
        path: The file.
        label: Its place on the slider.
        sheet: Where its tiles lie, if it says so.
    """

    path: Path
    label: str
    sheet: Sheet | None

    @property
    def num_pictures(self) -> int:
        return len(self.sheet.models) * len(self.sheet.prompts) if self.sheet else 1

    def frame(self, embedded: Embedded) -> Frame:
        """Its tiles, or where they are not known, all of it as one."""
        whole, sheet = read_picture(self.path), self.sheet
        if sheet is None:
            return Frame(self.label, ((Tile("", embedded.add(whole), whole.size),),))
        return Frame(
            self.label,
            tuple(
                tuple(
                    Tile(model, embedded.add(sheet.take(whole, row, column)), (sheet.side, sheet.side))
                    for row, model in enumerate(sheet.models)
                )
                for column in range(len(sheet.prompts))
            ),
        )


def sample_shots(run: RunFolder, titles: Sequence[str], limit: int = MAX_FRAMES) -> tuple[Shot, ...]:
    """The validation pictures, by stage and step.

    A final picture that is older than others of its stage is of a training that went on since, and left out.

    Args:
        run: Whose.
        titles: Of its stages.
        limit: How many at most.
    """
    named = ((path, SAMPLE.fullmatch(path.name)) for path in run.samples.glob("*.png"))
    found = sorted((int(name[1]), float(name[2] or END), path) for path, name in named if name)
    newest: dict[int, int] = {}
    for stage, _, path in found:
        newest[stage] = max(newest.get(stage, 0), path.stat().st_mtime_ns)
    kept = [
        (stage, step, path)
        for stage, step, path in found
        if stage < len(titles) and (step < END or path.stat().st_mtime_ns == newest[stage])
    ]
    return tuple(Shot(path, _label(stage, step, titles), read_sheet(path)) for stage, step, path in every(kept, limit))


def _label(stage: int, step: float, titles: Sequence[str]) -> str:
    moment = f"step {step:,.0f}" if step < END else "the end"
    return moment if len(titles) == 1 else f"stage {stage + 1} of {len(titles)}, {titles[stage]}: {moment}"


def sample_gallery(shots: Sequence[Shot], embedded: Embedded, *, stages: int) -> Gallery | None:
    """Teacher | student over training; None where there are no pictures.

    Pictures that differ in prompts or models from the last one do not fit into one slider and are left out.
    """
    if not shots:
        return None
    sheet = shots[-1].sheet
    alike = [shot for shot in shots if _shape(shot.sheet) == _shape(sheet)]
    return Gallery(
        "Validation pictures",
        "stages and training steps" if stages > 1 else "training steps",
        sheet.prompts if sheet else ("",),
        tuple(shot.frame(embedded) for shot in alike),
    )


def _shape(sheet: Sheet | None) -> object:
    return (sheet.models, sheet.prompts) if sheet else None


def evaluation_gallery(title: str, shot: Shot, embedded: Embedded, calls: Mapping[str, str]) -> Gallery:
    """The first prompts of an evaluation, of all its models; with many models, of the first and one other.

    Args:
        title: Of the suite.
        shot: Its picture.
        embedded: The page's pictures.
        calls: UNet calls an image of each model, in words.
    """
    frame = shot.frame(embedded)
    prompts = shot.sheet.prompts if shot.sheet else ("",)
    models = shot.sheet.models if shot.sheet else ("",)
    if len(models) <= MAX_ABREAST:
        return Gallery(title, "", prompts, (frame,))
    frames = tuple(
        Frame(_called(model, calls), tuple((tiles[0], tiles[row]) for tiles in frame.tiles))
        for row, model in enumerate(models)
        if row
    )
    return Gallery(title, "models and their sampling steps", prompts, frames)


def _called(model: str, calls: Mapping[str, str]) -> str:
    return f"{model}: {calls[model]} UNet calls an image" if model in calls else model


def strip(shots: Sequence[tuple[str, Shot]], embedded: Embedded) -> Gallery | None:
    """The last model of each of several runs beside their teacher; None where they share no prompts.

    Args:
        shots: Label of each run, and its picture of the same suite.
        embedded: The page's pictures.
    """
    sheets = [(label, shot, shot.sheet) for label, shot in shots if shot.sheet]
    # Noise belongs to a prompt's place in the list: another place is another noise.
    columns = [
        column
        for column, prompts in enumerate(zip(*(sheet.prompts for _, _, sheet in sheets), strict=False))
        if len(set(prompts)) == 1
    ]
    if len(sheets) < 2 or not columns:
        return None
    beside: dict[int, list[Tile]] = {column: [] for column in columns}
    for label, shot, sheet in sheets:
        whole = read_picture(shot.path)
        for column, tiles in beside.items():
            for row, name in ((0, sheet.models[0]), (len(sheet.models) - 1, label)):
                picture = embedded.add(sheet.take(whole, row, column))
                if row or picture not in [tile.picture for tile in tiles]:
                    of = f" of {label}" if not row and tiles else ""
                    tiles.append(Tile(name + of, picture, (sheet.side, sheet.side)))
    shared = tuple(sheets[0][2].prompts[column] for column in columns)
    return Gallery("Last model of each run", "", shared, (Frame("", tuple(map(tuple, beside.values()))),))
