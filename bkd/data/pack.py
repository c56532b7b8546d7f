"""A folder of pictures with captions, as people keep them, made into shards.

Captions lie beside the pictures, or in a metadata file as in the Hugging Face imagefolder. What is left out is counted.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from bkd.data.ahead import map_ahead
from bkd.data.images import FORMATS, open_image
from bkd.data.index import IMAGE_EXTENSIONS
from bkd.data.indexing import index_shard
from bkd.data.metadata import parse_metadata
from bkd.data.output_set import open_output_set
from bkd.data.picture_metadata import METADATA_FILES, Row, metadata_rows
from bkd.data.shards import SAMPLES_PER_SHARD, NewSample, Record, to_record
from bkd.data.stats import shard_stats
from bkd.errors import DataError
from bkd.progress import Progress, silent

OTHER_FORMATS = ("avif", "bmp", "gif", "heic", "heif", "ico", "jfif", "jp2", "jxl", "psd", "svg", "tga", "tif", "tiff")
STORED_AS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's names of formats; MPO is a JPEG with a second picture behind it, as many telephones write."""
DAMAGE: dict[type[BaseException | None], str] = {
    UnidentifiedImageError: "not a JPEG, PNG or WebP, whatever its name says",
    Image.DecompressionBombError: "more pixels than are safe to decode",
}
READ_AHEAD = 16


@dataclass(frozen=True)
class CaptionedFile:
    """A picture's path below the folder (with `/`), its caption, and what else its row of the metadata file says."""

    source: str
    caption: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Packing:
    """What a folder gives.

    Attributes:
        folder: Where the pictures are.
        files: Pictures with captions, in the order of their relative paths.
        left_out: Relative path of everything else -> why; `samples` adds pictures that turn out to be damaged.
    """

    folder: Path
    files: tuple[CaptionedFile, ...]
    left_out: dict[str, str]

    @property
    def reasons(self) -> dict[str, int]:
        """Why files were left out, and how many for each reason, the most frequent first."""
        return dict(sorted(Counter(self.left_out.values()).items(), key=lambda item: (-item[1], item[0])))

    def samples(self) -> Iterator[NewSample]:
        """Every picture that is whole, its file's bytes unchanged.

        KEY.json gets what NAME.json and the picture's row say, and in their stead where the names meet `width` and
        `height` (pixels, as displayed: after EXIF orientation, where img2dataset has the size before it), `sha256` of
        the stored bytes, and `source`, the relative path; `original_width` and `original_height` where nobody said.
        """
        results = map_ahead(self._sample, self.files, workers=os.cpu_count() or 1, ahead=READ_AHEAD)
        for file, sample in zip(self.files, results, strict=True):
            if isinstance(sample, NewSample):
                yield sample
            else:
                self.left_out[file.source] = sample

    def _sample(self, file: CaptionedFile) -> NewSample | str:
        """The sample, or why there is none."""
        try:
            encoded = (self.folder / file.source).read_bytes()
            width, height = open_image(encoded).size
        except OSError:
            return "cannot be read"
        except DataError as error:
            return DAMAGE.get(type(error.__cause__), "damaged") if encoded else "empty file"
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            extension = STORED_AS[str(opened.format)]
            if extension != "jpg" and getattr(opened, "is_animated", False):
                return "animated: save one frame as PNG"
        original = {"original_width": width, "original_height": height}
        facts = {"width": width, "height": height, "sha256": hashlib.sha256(encoded).hexdigest(), "source": file.source}
        metadata = {**original, **file.columns, **facts}
        return NewSample(image=encoded, extension=extension, caption=file.caption, metadata=metadata)


def pack_folder(folder: Path, *, caption_field: str | None = None) -> Packing:
    """Find the pictures of a folder and their captions, without opening a picture.

    Pictures are .jpg, .jpeg, .png and .webp in any case, in the folder and below. Hidden files are left out, and links
    are not followed. A picture's caption is NAME.txt, NAME.caption, or its row in a metadata.jsonl or metadata.csv,
    which may lie in any folder and names files relative to its own. Cells of a csv stay text; empty ones become null,
    as do NaN and infinity in a jsonl.

    Args:
        folder: Where to look.
        caption_field: Column with the captions; the first of `CAPTION_COLUMNS` when not said.

    Raises:
        DataError: If a picture has two different captions, a metadata file cannot be read, has no such column or names
            a file outside, or not one picture has a caption.
    """
    found = _look(folder)
    rows = metadata_rows(folder, found.metadata, caption_field)
    files = []
    for source in sorted(found.pictures):
        file = _captioned(folder, source, found.captions.get(_stem(source), []), rows.pop(source, None))
        if isinstance(file, CaptionedFile):
            said = found.beside.get(_stem(source))
            files.append(replace(file, columns={**_said_beside(folder, said), **file.columns}))
        else:
            found.left_out[source] = file
    for stem, names in found.captions.items():
        if stem not in found.stems:
            found.left_out |= dict.fromkeys(names, "caption without a picture")
    for stem, name in found.beside.items():
        if stem not in found.stems:
            found.left_out[name] = "neither picture nor caption"
    for source in rows:
        found.left_out.setdefault(source, "in the metadata, but there is no such file")
    packing = Packing(folder, tuple(files), dict(sorted(found.left_out.items())))
    if not files:
        raise _nothing_to_pack(packing, packing.reasons)
    return packing


def write_packing(
    packing: Packing,
    folder: Path,
    *,
    cache: Path,
    per_shard: int = SAMPLES_PER_SHARD,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Counter[str]:
    """Write the pictures into shards; finished ones are left alone.

    Args:
        packing: What to write.
        folder: Output.
        cache: Folder for indexes that cannot lie beside their shard.
        per_shard: Pictures for each shard; damaged ones make it smaller.
        overwrite: Whether a data set of other pictures may be replaced.
        progress: Called with (done, total) pictures.

    Returns:
        Reason -> files left out for it; `kept` is the number of samples.

    Raises:
        DataError: If not one picture is whole; nothing is left in the folder then.
        OutputError: If the folder holds something else.
    """
    starts = range(0, len(packing.files), per_shard)
    contents = [
        (f.source, (packing.folder / f.source).stat().st_size, f.caption, dict(f.columns)) for f in packing.files
    ]
    settings = {"pictures": hashlib.sha256(repr(contents).encode()).hexdigest(), "per_shard": per_shard}
    output = open_output_set(folder, "pack", len(starts), settings, overwrite=overwrite)
    totals: Counter[str] = Counter(packing.left_out.values())
    for number, start in enumerate(starts):
        part = replace(packing, files=packing.files[start : start + per_shard], left_out={})
        if not output.is_finished(number):
            records = (to_record(number, row, sample) for row, sample in enumerate(part.samples()))
            output.write(number, _counted(records, progress, start, len(packing.files)), left_out=part.left_out)
            index_shard(output.path(number), cache)
        stats = shard_stats(output.path(number))
        totals.update({"kept": stats["successes"]})
        totals.update(stats["left_out"].values())
        progress(min(start + per_shard, len(packing.files)), len(packing.files))
    if not totals["kept"]:
        shutil.rmtree(folder)
        raise _nothing_to_pack(packing, totals)
    return totals


def _counted(records: Iterator[Record], progress: Progress, before: int, total: int) -> Iterator[Record]:
    for done, record in enumerate(records, start=before + 1):
        progress(done, total)
        yield record


def _nothing_to_pack(packing: Packing, reasons: Mapping[str, int]) -> DataError:
    return DataError(
        "not one picture can be packed",
        where=packing.folder,
        got="; ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count) or "an empty folder",
        allowed=f"{', '.join(IMAGE_EXTENSIONS)} files with captions",
        remedy="put NAME.txt beside each NAME.jpg, or a metadata.csv with columns file_name and text into the folder",
    )


@dataclass
class _Found:
    """Relative paths by kind; `captions` and `beside` (JSON files) by path without suffix, `stems` those paths of
    pictures of any format."""

    folder: Path
    pictures: list[str] = field(default_factory=list)
    captions: dict[str, list[str]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    stems: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)

    def admits(self, path: PurePosixPath) -> bool:
        """Whether to look at a file or into a folder; if not, it is recorded why."""
        there = self.folder / path
        if path.name.startswith("."):
            self.left_out[str(path)] = "hidden"
        elif there.is_symlink():
            self.left_out[str(path)] = "a link, not followed"
        elif not there.is_file() and not there.is_dir():
            self.left_out[str(path)] = "not a regular file"
        return str(path) not in self.left_out

    def add(self, path: PurePosixPath) -> None:
        source, stem, suffix = str(path), _stem(str(path)), path.suffix[1:].lower()
        if path.name.lower() in METADATA_FILES:
            self.metadata.append(source)
        elif suffix in ("txt", "caption"):
            self.captions.setdefault(stem, []).append(source)
        elif suffix == "json":
            self.beside[stem] = source
        elif suffix in IMAGE_EXTENSIONS:
            self.pictures.append(source)
            self.stems.add(stem)
        elif suffix in OTHER_FORMATS:
            self.left_out[source] = "format not supported: convert to PNG"
            self.stems.add(stem)
        else:
            self.left_out[source] = "neither picture nor caption"


def _stem(source: str) -> str:
    return str(PurePosixPath(source).with_suffix(""))


def _look(folder: Path) -> _Found:
    def refuse(error: OSError) -> None:
        raise error  # which `walk` would leave out

    found = _Found(folder)
    try:
        for place, folders, names in os.walk(folder, onerror=refuse):
            above = PurePosixPath(Path(place).relative_to(folder))
            folders[:] = [name for name in folders if found.admits(above / name)]
            for path in filter(found.admits, (above / name for name in names)):
                found.add(path)
    except OSError as error:
        raise DataError("folder cannot be read", where=error.filename, got=error.strerror) from error
    return found


def _captioned(folder: Path, source: str, beside: Sequence[str], row: Row | None) -> CaptionedFile | str:
    """The picture with its caption, or why it has none."""
    said = [(name, *_usable(folder / name)) for name in sorted(beside)]
    if row:
        said.append((row[0], *_usable(row[1])))
    places = {text: place for place, text, _ in said if text}
    if len(places) > 1:
        raise DataError(
            "a picture has two different captions",
            where=folder / source,
            got="; ".join(f"{text[:60]!r} in {place}" for text, place in places.items()),
            remedy="keep one of them",
        )
    for caption in places:
        return CaptionedFile(source, caption, row[2] if row else {})
    return said[0][2] if said else "no caption"


def _said_beside(folder: Path, name: str | None) -> dict[str, Any]:
    """What a NAME.json beside a picture says of it, as img2dataset writes one; nothing where it cannot be read."""
    said = parse_metadata((folder / name).read_bytes()) or {} if name else {}
    return {key: value for key, value in said.items() if value == value}  # JSON knows no NaN


def _usable(said: object) -> tuple[str, str]:
    """The caption that a file or a cell holds and "", or "" and why there is none."""
    try:
        text = said.read_bytes().decode("utf-8-sig") if isinstance(said, Path) else said or ""
        if not isinstance(text, str):
            return "", "caption is not text"
        text.encode()  # not possible for halves of characters, which JSON can hold
    except (OSError, UnicodeError):
        return "", "caption cannot be read as UTF-8"
    return text.strip(), "" if text.strip() else "caption empty"
