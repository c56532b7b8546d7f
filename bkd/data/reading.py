"""Read samples for a pass over a shard: decoded ahead in threads, in order, the bad ones counted by reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from bkd.data.ahead import map_ahead
from bkd.data.captions import CaptionSource
from bkd.data.images import UPRIGHT, DecodedImage, decode_image
from bkd.data.index import Sample
from bkd.data.metadata import orientation_of, parse_metadata
from bkd.errors import DataError

MAX_BAD_FRACTION = 0.1
DECODED_AHEAD = 64


@dataclass(frozen=True)
class DecodedSample:
    """A sample whose image and caption could be read."""

    sample: Sample
    image: DecodedImage
    caption: str


def decoded_samples(
    samples: Iterable[Sample], resolution: int, caption: CaptionSource, bad: Counter[str]
) -> Iterator[DecodedSample]:
    """Every sample that can be used, in order.

    Args:
        samples: Captioned images.
        resolution: Side of the images, in pixels.
        caption: Where captions come from.
        bad: Counts the others, by reason.
    """
    workers = os.cpu_count() or 1
    decode = partial(_decode, resolution=resolution, caption=caption)
    for decoded in map_ahead(decode, samples, workers=workers, ahead=DECODED_AHEAD):
        if isinstance(decoded, DecodedSample):
            yield decoded
        else:
            bad[decoded] += 1


def _decode(sample: Sample, resolution: int, caption: CaptionSource) -> DecodedSample | str:
    """The decoded sample, or why there is none."""
    try:
        text = caption.of(sample)
        if text is None or sample.image_extension is None:
            return "no image" if sample.image_extension is None else "caption empty or not UTF-8"
        metadata = sample.read_if_present("json")
        orientation = UPRIGHT
        if metadata is not None and b"Orientation" in metadata:
            orientation = orientation_of(parse_metadata(metadata) or {})
        image = decode_image(sample.read(sample.image_extension), resolution, orientation)
        return DecodedSample(sample, image, text)
    except DataError as error:
        return error.what


def check_bad_fraction(bad: Counter[str], total: int, where: object) -> None:
    """Refuse to go on when too many samples are bad.

    Raises:
        DataError: If more than a tenth are; with the reasons.
    """
    if bad.total() > MAX_BAD_FRACTION * total:
        raise DataError(
            "too many samples cannot be used",
            where=where,
            got=f"{bad.total():,} of {total:,}: " + "; ".join(f"{count:,} {reason}" for reason, count in bad.items()),
            allowed=f"at most {MAX_BAD_FRACTION:.0%}",
            remedy="look at them with `bkd data check`, and make or download the shard again",
        )
