"""From a MODEL argument to a pipeline folder on this disk.

Every model is, in the end, a stock diffusers pipeline folder: the embedded one, the user's own, the student of a run,
a snapshot of a Hub repository, or what a single file was taken apart into.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from bkd.data.shapes import EMBEDDED
from bkd.errors import ModelError
from bkd.models.folder import check_pipeline_folder, read_json

if TYPE_CHECKING:
    from bkd.recipe.schema import Teacher

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
FORMS = (
    f"'{EMBEDDED}', a pipeline folder, a run folder, a single .safetensors file with --config, "
    "or a Hub id such as owner/name"
)


def is_folder(name: str | Path) -> bool:
    """Whether a MODEL argument means a folder on this disk, with nothing to fetch or to take apart."""
    return str(name) == EMBEDDED or Path(name).expanduser().is_dir()


def refuse_unknown(name: str | Path) -> None:
    """Refuse a MODEL argument that can mean nothing, before libraries are loaded, which takes seconds.

    Runs, and what must be fetched or taken apart, are looked at later.

    Raises:
        ModelError: If it is no model folder, no file of a kind that is read, and no Hub id.
    """
    if is_folder(name):
        if not (Path(name).expanduser() / "run.json").is_file():
            locate(name)
    elif Path(name).suffix in SINGLE_FILE_SUFFIXES:
        _require_safe_file(Path(name).expanduser())
    elif not HUB_ID.fullmatch(str(name)):
        raise ModelError(f"no model '{name}'", allowed=FORMS)


def locate_teacher(teacher: Teacher, *, weights: bool = True) -> Path:
    """The pipeline folder that a recipe's teacher means; see `locate`."""
    return locate(teacher.id, revision=teacher.revision, config=teacher.config, weights=weights)


def locate(
    name: str | Path, *, revision: str | None = None, config: str | Path | None = None, weights: bool = True
) -> Path:
    """The pipeline folder that a MODEL argument means.

    Args:
        name: `shapes`, a pipeline folder, the folder of a run or of one of its stages (the student is meant), a single
            `.safetensors` file in the original layout, or a Hub id `owner/name`.
        revision: Branch, tag or commit of a Hub repository.
        config: For a single file: a pipeline folder or Hub id of the same architecture.
        weights: Whether weights are needed; configurations alone are fetched and checked otherwise.

    Raises:
        ModelError: If there is no such model, or a part of it is missing.
    """
    path = Path(name).expanduser()
    is_single_file = path.suffix in SINGLE_FILE_SUFFIXES and not is_folder(name)
    if config is not None and not is_single_file:
        raise ModelError("--config is for single files", where=path, got=config, remedy="leave it out")
    if revision is not None and (path.exists() or str(name) == EMBEDDED):
        raise ModelError("--revision is for Hub ids", where=path, got=revision, remedy="leave it out")
    if str(name) == EMBEDDED:
        return Path(str(resources.files("bkd") / "assets" / "shapes"))
    if is_single_file:
        return _single_file(path, config, weights)
    if (path / "run.json").is_file() and not (path / "model_index.json").is_file():
        path = _student_of(path)
    elif (path / "student" / "model_index.json").is_file() and not (path / "model_index.json").is_file():
        path = path / "student"  # of a stage
    elif not is_folder(name):
        refuse_unknown(name)
        # Configurations first: what is not supported is not downloaded.
        check_pipeline_folder(_download(str(name), revision, weights=False), weights=False)
        path = _download(str(name), revision, weights)
    check_pipeline_folder(path, weights=weights)
    return path


def hub_commit(folder: Path) -> str | None:
    """Of a model that `locate` fetched from the Hub; None for folders of this disk."""
    return folder.name if folder.parent.name == "snapshots" else None


def _student_of(run: Path) -> Path:
    if not (run / "student").is_dir():
        command = read_json(run / "run.json").get("command", "bkd train RECIPE -o RUN")
        raise ModelError("this run has no finished student yet", where=run, remedy=f"finish it: {command}")
    return run / "student"


def _require_safe_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError("no such file", where=path, allowed=FORMS)
    if path.suffix != ".safetensors":
        raise ModelError(
            "pickled checkpoints can run code and are not read",
            where=path,
            allowed="a .safetensors file",
            remedy="ask for the .safetensors version of this model",
        )


def _single_file(path: Path, config: str | Path | None, weights: bool) -> Path:
    _require_safe_file(path)
    if config is None:
        raise ModelError(
            "a single file does not say its architecture",
            where=path,
            remedy="--config FOLDER-OR-ID (in a recipe: teacher.config): a pipeline of the same family, "
            "for its configuration and tokenizer",
        )
    from bkd.models.single_file import check_single_file, import_single_file

    like = locate(config, weights=False)
    check_single_file(path, like)
    return import_single_file(path, like) if weights else like


def _download(name: str, revision: str | None, weights: bool) -> Path:
    try:
        return _snapshot(name, revision, weights)
    except Exception as error:  # the Hub client raises a dozen kinds; each means that there is no model to work on
        raise ModelError(
            f"cannot get '{name}' from the Hub, and there is no such folder here",
            got=(str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: "),
            remedy="give another model by folder or Hub id (a recipe's teacher: teacher.id=, make: TEACHER=); "
            "private repositories need `hf auth login`",
        ) from error


def _snapshot(name: str, revision: str | None, weights: bool) -> Path:
    if weights:
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(name, revision=revision, use_safetensors=True))
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.txt"]))
