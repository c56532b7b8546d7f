"""Which member of a sample is its caption: KEY.txt, or a field of KEY.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bkd.data.index import Sample, ShardIndex
from bkd.data.metadata import caption_of, parse_metadata
from bkd.errors import DataError

FORMS = "txt, or json:FIELD such as json:caption"


@dataclass(frozen=True)
class CaptionSource:
    """Where captions come from.

    Attributes:
        field: Of KEY.json; None for KEY.txt.
    """

    field: str | None = None

    @classmethod
    def parse(cls, text: str) -> CaptionSource:
        """Read `txt` or `json:FIELD`.

        Raises:
            DataError: For anything else.
        """
        if text == "txt":
            return cls()
        prefix, _, name = text.partition(":")
        if prefix == "json" and name:
            return cls(name)
        raise DataError("unknown caption source", where="data.caption", got=repr(text), allowed=FORMS)

    def __str__(self) -> str:
        return "txt" if self.field is None else f"json:{self.field}"

    @property
    def extension(self) -> str:
        return "txt" if self.field is None else "json"

    def of(self, sample: Sample) -> str | None:
        """A sample's caption without surrounding space; None where it is missing, empty or not UTF-8."""
        data = sample.read_if_present(self.extension)
        return caption_of(data) if self.field is None else self.in_metadata(parse_metadata(data) or {})

    def in_metadata(self, metadata: Mapping[str, Any]) -> str | None:
        value = metadata.get(self.field or "")
        return (value.strip() or None) if isinstance(value, str) else None

    def lengths(self, index: ShardIndex) -> NDArray[np.int32]:
        """(N,), int32: characters of every caption; -1 where there is none. Reads every KEY.json for `json:FIELD`."""
        if self.field is None:
            return index.caption_lengths
        return np.array([len(self.of(sample) or "") or -1 for sample in index.samples()], np.int32)
