"""Filters keep what they say, give a reason for everything else, and never guess at missing values."""

import json
import math

import numpy as np
import pytest

from bkd.data.captions import CaptionSource
from bkd.data.filtering import AESTHETIC, filter_shards, survey_to_filter
from bkd.data.filters import FIELDS, field_values, parse_filter, parse_filters, parse_where, select
from bkd.data.indexing import index_shard
from bkd.data.metadata import ALIASES, number_of
from bkd.data.shards import NewSample, write_shards
from bkd.data.sources import LocalShard
from bkd.data.survey import DataWish
from bkd.errors import DataError
from tests.test_bad_samples import encoded


def shard(folder, rows, caption="a caption"):
    """A shard with this metadata; returns its index."""
    samples = [NewSample(image=encoded(), extension="png", caption=caption, metadata=row) for row in rows]
    return index_shard(write_shards(samples, folder)[0])


def kept(index, **filters):
    selection = select(index, CaptionSource(), parse_filters(filters))
    assert len(selection) + sum(selection.reasons.values()) == len(index)  # every sample counts once
    return selection.rows.tolist(), dict(selection.reasons)


@pytest.mark.parametrize(("field", "name"), [(field, name) for field, names in ALIASES.items() for name in names])
def test_every_name_of_a_field_is_known(tmp_path, field, name):
    index = shard(tmp_path, [{name: 3}, {name: 5.5}, {name: "7"}])
    assert kept(index, **{field: ">= 5"})[0] == [1, 2]


def test_the_first_name_that_has_a_value_counts():
    assert number_of({"aesthetic": None, "AESTHETIC_SCORE": 6.5}, "aesthetic") == 6.5
    assert math.isnan(number_of({"aesthetic": None}, "aesthetic"))


def test_zero_is_a_value_and_null_is_none(tmp_path):
    index = shard(
        tmp_path, [{"pwatermark": 0.0}, {"pwatermark": None}, {"pwatermark": 0.9}, {"pwatermark": float("nan")}]
    )
    assert kept(index, pwatermark="< 0.8, missing drop") == ([0], {"pwatermark missing": 2, "pwatermark not < 0.8": 1})
    assert kept(index, pwatermark="< 0.8, missing keep") == ([0, 1, 3], {"pwatermark not < 0.8": 1})
    with pytest.raises(DataError, match=r"2 of 4 samples without pwatermark \| watermark; KEY\.json has: .*pwatermark"):
        kept(index, pwatermark="< 0.8")


def test_bounds_are_compared_as_they_are_stored(tmp_path):
    index = shard(tmp_path, [{"aesthetic": 0.7}, {"aesthetic": 0.6999}])
    assert kept(index, aesthetic=">= 0.7")[0] == [0] and kept(index, aesthetic="= 0.7")[0] == [0]
    assert kept(index, aesthetic="<= 0.7")[0] == [0, 1] and kept(index, aesthetic="> 0.7")[0] == []


def test_several_comparisons_and_derived_fields(tmp_path):
    rows = [{"original_width": w, "original_height": h} for w, h in ((600, 400), (600, 700), (3000, 2500), (600, None))]
    index = shard(tmp_path, rows)
    assert kept(index, original_size=">= 512, <= 2000, missing drop") == (
        [1],
        {"original_size missing": 1, "original_size not >= 512": 1, "original_size not <= 2000": 1},
    )


def test_languages_and_caption_lengths(tmp_path):
    index = shard(tmp_path, [{"LANGUAGE": "en"}, {"LANGUAGE": "De"}, {"LANGUAGE": "fr"}, {}], caption="ten chars.")
    assert kept(index, language="= en|de, missing drop")[0] == [0, 1]
    assert kept(index, language="= en|de, missing keep")[0] == [0, 1, 3]
    assert kept(index, caption_length="= 10")[0] == [0, 1, 2, 3] and kept(index, caption_length="> 10")[0] == []
    words = field_values(index, "language", CaptionSource())
    assert words.tolist() == ["en", "de", "fr", ""]


def test_caption_lengths_follow_the_caption_source(tmp_path):
    index = shard(tmp_path, [{"long": "a much longer caption"}, {"long": 5}], caption="short")
    source = CaptionSource.parse("json:long")
    selection = select(index, source, parse_filters({"caption_length": "> 10"}))
    assert selection.rows.tolist() == [0] and selection.reasons == {"no text in json:long": 1}
    assert [source.of(sample) for sample in index.samples()] == ["a much longer caption", None]


def test_a_forgotten_column_names_what_there_is(tmp_path):
    index = shard(tmp_path, [{"aestetic": 5}])
    with pytest.raises(
        DataError, match=r"did you mean 'aestetic'\?; KEY\.json has: aestetic, caption(.|\n)*save_additional"
    ):
        kept(index, aesthetic=">= 5")


def test_filters_read_back_as_they_were_written():
    wish = parse_where("aesthetic >= 5, < 8, missing: keep")
    assert str(wish) == "aesthetic >= 5 and < 8, missing: keep"
    assert parse_filter("aesthetic", ">= 5").missing == "error" and set(FIELDS) >= {"aesthetic", "size", "language"}


class Constant:
    """A predictor that likes bright pictures."""

    version, digest = "v2", "0123"

    def score(self, images):
        return [float(np.asarray(image).mean() / 32) for image in images]


def test_missing_scores_are_computed_written_and_filtered_by(tmp_path):
    colours = [(0, 0, 0), (255, 255, 255), (255, 255, 255), (255, 255, 255)]
    metadata = [{}, {}, {"AESTHETIC_SCORE": 2.0}, {"pwatermark": 1}]
    samples = [
        NewSample(image=encoded(color=colour), extension="png", caption="x", metadata=row)
        for colour, row in zip(colours, metadata, strict=True)
    ]
    (path,) = write_shards(samples, tmp_path / "in")
    filters = (parse_where("aesthetic >= 5"), parse_where("pwatermark < 0.5, missing keep"))
    wish = DataWish(CaptionSource(), filters, tmp_path)
    surveyed = survey_to_filter([LocalShard(path)], wish, Constant(), lambda done, total: None)
    totals = filter_shards(surveyed, wish, tmp_path / "out", predictor=Constant())
    assert totals == {"kept": 1, "aesthetic not >= 5": 2, "pwatermark not < 0.5": 1}
    (sample,) = index_shard(tmp_path / "out" / "00000.tar").samples()
    found = json.loads(sample.read("json"))
    assert found[AESTHETIC] == pytest.approx(255 / 32) and found["aesthetic_predictor"] == "v2 0123"
