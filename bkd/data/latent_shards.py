"""Cached shards: latents and token ids instead of images and captions, in tars like the ones they were made from.

    KEY.moments.npy    (2C, h, w), float16: posterior mean, then deviation, before the scaling factor
    KEY.mirrored.npy   the same of the mirrored image; absent where the caption says left or right
    KEY.ids.npy        (L,), int32: token ids; ids_2.npy of SDXL's second tokenizer
    KEY.sizes.npy      (6,), int32: original height and width, crop top and left, target height and width (SDXL)
    KEY.json           the source sample's metadata

`bkd_dataset.json` beside them says what they depend on; training refuses latents of another autoencoder.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bkd.data.index import ShardIndex
from bkd.data.output_set import FORMAT, dataset_description, dataset_facts
from bkd.errors import DataError

MADE_BY = "cache"
OPTIONS = {
    "vae": "--teacher …",
    "vae_dtype": "--teacher …",
    "tokenizers": "--teacher …",
    "resolution": "--resolution …",
    "crop": "",
    "dtype": "",
    "mirrored": "--mirrored",
    "caption": "--caption …",
    "filters": "--where …",
}
"""Which option of `bkd data cache` decides a setting."""
SIDES = re.compile(
    r"\b(left|right|leftmost|rightmost|clockwise|links|rechts|linke\w?|rechte\w?|gauche|droite|izquierd[ao]|derech[ao]"
    r"|sinistr[ao]|destr[ao]|esquerd[ao]|direit[ao])\b|[左右]",
    re.IGNORECASE,
)
"""Words that a mirrored image would turn into a lie."""


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Everything that cached latents depend on besides the samples.

    Attributes:
        vae: Digest of the autoencoder's weights and configuration.
        vae_dtype: In which it computed.
        tokenizers: Digest of each tokenizer: one, or two for SDXL.
        resolution: Side of the images, in pixels.
        crop: How they were made square.
        dtype: Of the stored moments.
        mirrored: Whether mirrored images were encoded, too.
        caption: Where captions came from.
        filters: What samples had to pass.
    """

    vae: str
    vae_dtype: str = "float32"
    tokenizers: tuple[str, ...]
    resolution: int
    crop: str = "centre"
    dtype: str = "float16"
    mirrored: bool = False
    caption: str = "txt"
    filters: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceShard:
    """A shard that latents are made from.

    Attributes:
        name: Without its folder.
        identity: Changes with its contents.
    """

    name: str
    identity: str


@dataclass(frozen=True)
class LatentDescription:
    """What a folder of cached latents was made from and with.

    Attributes:
        settings: Of the latents.
        sources: In order; the n-th became shard n.
    """

    settings: LatentSettings
    sources: tuple[SourceShard, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that changes a latent or a token id, or their order."""
        return str(dataset_description(MADE_BY, len(self.sources), self.facts())["fingerprint"])

    def facts(self) -> dict[str, Any]:
        return {**asdict(self.settings), "sources": [asdict(source) for source in self.sources]}

    @classmethod
    def of(cls, described: Mapping[str, Any], where: object) -> LatentDescription:
        """Read what a `bkd_dataset.json` says.

        Raises:
            DataError: If it is damaged, or of another version of bkd.
        """
        try:
            if described["format"] != FORMAT:
                raise ValueError(f"format {described['format']}, not {FORMAT}")
            values: dict[str, Any] = {field.name: described[field.name] for field in fields(LatentSettings)}
            settings = LatentSettings(**{k: _hashable(value) for k, value in values.items()})
            found = cls(settings, tuple(SourceShard(**source) for source in described["sources"]))
            if found.fingerprint != described["fingerprint"]:
                raise ValueError("its fingerprint does not fit")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "the description of cached latents is damaged or of another version of bkd",
                where=where,
                got=error,
                remedy="cache the shards again: bkd data cache",
            ) from None
        return found


def holds_latents(folder: Path) -> bool:
    """Whether `bkd data cache` wrote a folder."""
    return (dataset_facts(folder) or {}).get("made_by") == MADE_BY


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def identity_of(index: ShardIndex) -> str:
    """Digest of a shard's keys and checksums: of everything in it that can be read."""
    digest = hashlib.sha256(b"\0".join(index.keys.tolist()))
    for extension, places in sorted(index.members.items()):
        digest.update(extension.encode() + places.sizes.tobytes() + places.checksums.tobytes())
    return digest.hexdigest()


def require_same_settings(found: LatentSettings, wanted: LatentSettings, where: object) -> None:
    """Refuse latents that were made with other settings.

    Raises:
        DataError: Naming every setting that differs.
    """
    differing = [name for name, value in asdict(wanted).items() if asdict(found)[name] != value]
    if differing:
        raise DataError(
            "these latents were cached with other settings",
            where=where,
            got="; ".join(f"{name}: {_brief(asdict(found)[name])}" for name in differing),
            allowed="; ".join(f"{name}: {_brief(asdict(wanted)[name])}" for name in differing),
            remedy="change the recipe, or cache the shards again: bkd data cache SHARDS -o DIR "
            + " ".join(dict.fromkeys(OPTIONS[name] for name in differing)),
        )


def _brief(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_brief, value)) or "none"
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def may_be_mirrored(caption: str) -> bool:
    """Whether a caption stays true when its image is mirrored."""
    return SIDES.search(caption) is None


def npy_bytes(array: NDArray[Any]) -> bytes:
    """A .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def npy_array(data: bytes) -> NDArray[Any]:
    """The array of a .npy file, not copied; objects are refused.

    Raises:
        ValueError: If the bytes are no such file.
    """
    end = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape = _npy_layout(data[:end])
    return np.frombuffer(data, dtype, offset=end).reshape(shape)


@lru_cache(maxsize=64)  # all samples of a data set have the same few headers, and parsing one takes 50 us
def _npy_layout(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not a .npy file of version 1")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran_order or dtype.hasobject:
        raise ValueError("not a plain array")
    return dtype, shape


Arrays = Mapping[str, NDArray[Any]]
"""A cached sample: member name without `.npy` -> array."""


def to_record(key: str, arrays: Arrays, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A cached sample for `bkd.data.shards.write_shard`."""
    members = {f"{name}.npy": npy_bytes(array) for name, array in arrays.items()}
    return {"__key__": key, **members, "json": json.dumps(metadata, sort_keys=True).encode()}
