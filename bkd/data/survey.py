"""Look at all shards of a data set before work begins: are they whole, and which samples will be used?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bkd.data.captions import CaptionSource
from bkd.data.filters import Filter, Selection, is_about_captions, num_bad, select
from bkd.data.indexing import index_shard
from bkd.data.latent_shards import SourceShard, identity_of
from bkd.data.reading import MAX_BAD_FRACTION
from bkd.data.sources import REMOTE_CACHE_GIB, Source
from bkd.errors import DataError
from bkd.progress import Progress, silent


@dataclass(frozen=True)
class DataWish:
    """Which samples of some shards are wanted.

    Attributes:
        caption: Where captions come from.
        filters: What a sample must pass.
        cache: Folder for things that can be made again.
        remote_cache_gib: Bound of the copies of remote shards in it.
    """

    caption: CaptionSource
    filters: tuple[Filter, ...]
    cache: Path
    remote_cache_gib: float = REMOTE_CACHE_GIB

    def select(self, shard: Path) -> Selection:
        """The wanted samples of a shard on this machine."""
        return select(index_shard(shard, self.cache), self.caption, self.filters)


@dataclass(frozen=True)
class SurveyedShard:
    """What is known of a shard before it is read.

    Attributes:
        source: Where it is.
        identity: Changes with its contents.
        num_samples: In it; None for a remote shard, which is fetched only when its turn comes.
        num_selected: That are wanted.
        reasons: Why the others are not.
    """

    source: Source
    identity: str
    num_samples: int | None
    num_selected: int | None
    reasons: Counter[str]

    def described(self) -> SourceShard:
        return SourceShard(self.source.name, self.identity)


def survey(sources: Sequence[Source], wish: DataWish, progress: Progress = silent) -> tuple[SurveyedShard, ...]:
    """Index every local shard and apply the filters; remote shards are only asked for their size.

    Raises:
        DataError: If a shard cannot be used, a filter meets missing values, or nothing is left.
    """
    found: list[SurveyedShard] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for shard in pool.map(lambda source: _survey(source, wish), sources):
            found.append(shard)
            progress(len(found), len(sources))
    if all(shard.num_selected == 0 for shard in found):
        raise _nothing_left(found, wish)
    if not any(each.field == "caption_length" and each.missing == "drop" for each in wish.filters):
        _check_lacking(found, wish)
    return tuple(found)


def _check_lacking(found: Sequence[SurveyedShard], wish: DataWish) -> None:
    """Refuse data of which a good part is not what it was taken for, unless a filter says that this part may go."""
    total = sum(shard.num_samples or 0 for shard in found)
    reasons = sum((shard.reasons for shard in found), Counter[str]())
    if num_bad(reasons) > MAX_BAD_FRACTION * total:
        raise DataError(
            "too many samples lack an image or a caption",
            where=found[0].source.name if len(found) == 1 else f"{len(found)} shards",
            got=f"{num_bad(reasons):,} of {total:,}: "
            + "; ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()),
            allowed=f"at most {MAX_BAD_FRACTION:.0%}, with captions from {wish.caption}",
            remedy="take captions from elsewhere (data.caption=json:FIELD), or say that these samples may go: "
            "data.filters.caption_length='>= 1, missing drop'",
        )


def _survey(source: Source, wish: DataWish) -> SurveyedShard:
    if source.is_remote:
        return SurveyedShard(source, source.identity(), None, None, Counter())
    with source.hold() as path:
        selection = wish.select(path)
    index = selection.index
    return SurveyedShard(source, identity_of(index), len(index), len(selection), Counter(selection.reasons))


def _nothing_left(found: Sequence[SurveyedShard], wish: DataWish) -> DataError:
    total = sum(shard.num_samples or 0 for shard in found)
    reasons = sum((shard.reasons for shard in found), Counter[str]())
    listed = "; ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    if not total:
        return DataError(
            "the shards hold no samples",
            where=found[0].source.name,
            allowed="KEY.jpg|jpeg|png|webp with KEY.txt and KEY.json, as img2dataset writes them",
            remedy="look at them with `bkd data check`",
        )
    return DataError(
        "no sample of these shards can be used",
        where=found[0].source.name if len(found) == 1 else f"{len(found)} shards",
        got=f"{total:,} samples: {listed}",
        allowed=f"an image with a caption ({wish.caption}); filters: {'; '.join(map(str, wish.filters)) or 'none'}",
        remedy="take captions from KEY.json: data.caption=json:FIELD"
        if is_about_captions(reasons)
        else "loosen the filters; `bkd data check` shows the values",
    )
