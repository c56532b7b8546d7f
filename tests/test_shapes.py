"""The embedded world and its checker: purity, held-out splits, and no mistake in either direction."""

import dataclasses
import hashlib
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bkd.data.shapes import HELD_OUT, POSITIONS, SPLITS, THEME_SHAPE, render, scene, scenes
from bkd.data.shapes_checker import check, parse_caption, rendered
from bkd.errors import DataError
from tools.check_shapes_gates import one_attribute_wrong

GOLDEN_THEME = "2fc76aedc106d32171b4e3c04029085315c315c472b72b10de70143bb10477e9"
GOLDEN = "91a32e7ece35fb2373e84fe83344c682df7379c4cbe66f8751f9b2e3048a1fa1"


@pytest.mark.parametrize(
    ("splits", "golden"), [(("train", "val", "test", "novel"), GOLDEN), (("theme", "theme-test"), GOLDEN_THEME)]
)
def test_the_world_never_changes(splits, golden):
    digest = hashlib.sha256()
    for split in splits:
        for drawn in scenes(split, 50):
            digest.update(drawn.caption.encode() + render(drawn).tobytes())
    assert digest.hexdigest() == golden


def test_the_theme_is_in_every_scene_of_its_splits_and_in_no_other():
    for split in SPLITS:
        themed = [any(o.shape == THEME_SHAPE for o in s.objects) for s in scenes(split, 300)]
        assert all(themed) if split.startswith("theme") else not any(themed)
    train = {s.described for s in scenes("theme", 2000)}
    assert not train & {s.described for s in scenes("theme-test", 500)}


def test_only_captions_that_speak_of_the_theme_are_read_with_it():
    """The verdict on every other caption is what it was before there was a theme."""
    drawn = next(s for s in scenes("theme", 50) if len(s.objects) == 1)
    (diamond,) = drawn.objects
    circle = replace(drawn, objects=(replace(diamond, shape="circle"),))
    themed, plain = (check(rendered([drawn]), [s.caption])[0].seen.objects[0].shape for s in (drawn, circle))
    assert themed == THEME_SHAPE and plain != THEME_SHAPE


def test_a_scene_is_a_function_of_its_index():
    assert scene("train", 7) == scene("train", 7)
    assert scene("train", 7) != scene("train", 8)
    assert scene("train", 7, seed=1) != scene("train", 7)


def test_held_out_captions_never_occur_in_training():
    train = {s.described for s in scenes("train", 3000)}
    for split in ("val", "test", "novel"):
        assert not train & {s.described for s in scenes(split, 500)}


def test_novel_combinations_occur_only_in_novel_but_every_pair_is_seen():
    seen = {(o.shape, o.color, o.position) for s in scenes("train", 3000) for o in s.objects}
    assert not seen & HELD_OUT
    assert all(s.is_novel for s in scenes("novel", 200))
    for shape, color, position in HELD_OUT:
        assert any(t[:2] == (shape, color) for t in seen)
        assert any((t[0], t[2]) == (shape, position) for t in seen)
        assert any(t[1:] == (color, position) for t in seen)


def test_objects_stay_in_their_quadrants_and_differ_in_position():
    for drawn in scenes("train", 300):
        assert len({o.position for o in drawn.objects}) == len(drawn.objects) <= 2


def test_clean_renders_are_read_perfectly():
    drawn = list(scenes("train", 300)) + list(scenes("novel", 100))
    verdicts = check(rendered(drawn), [s.caption for s in drawn])
    assert all(v.correct for v in verdicts)


def test_a_caption_with_one_wrong_attribute_is_never_accepted():
    rng = random.Random(0)
    drawn = list(scenes("test", 300))
    wrong = [one_attribute_wrong(s, rng).caption for s in drawn]
    assert not any(v.correct for v in check(rendered(drawn), wrong))


def test_the_wrong_attribute_is_named():
    drawn = scene("test", 0)
    recolored = dataclasses.replace(drawn.objects[0], color="red" if drawn.objects[0].color != "red" else "blue")
    wrong = dataclasses.replace(drawn, objects=(recolored, *drawn.objects[1:]))
    (verdict,) = check(rendered([drawn]), [wrong.caption])
    assert [name for name, agrees in verdict.attributes.items() if not agrees] == ["color"]


def test_blur_is_tolerated_and_blobs_are_not():
    drawn = list(scenes("test", 200))
    captions = [s.caption for s in drawn]
    box = torch.full((3, 1, 3, 3), 1 / 9)
    blurred = F.conv2d(F.pad(rendered(drawn).float(), (1,) * 4, mode="replicate"), box, groups=3).round().byte()
    assert sum(v.correct for v in check(blurred, captions)) >= 198
    blobs = rendered(drawn)
    blobs[:, :, 12:20, 12:20] = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8)
    assert sum(v.correct for v in check(blobs, captions)) <= 20


def test_an_additional_object_is_noticed():
    single = next(s for s in scenes("test", 100) if len(s.objects) == 1)
    free = next(p for p in POSITIONS if p != single.objects[0].position)
    double = dataclasses.replace(
        single, objects=(*single.objects, dataclasses.replace(single.objects[0], position=free))
    )
    (verdict,) = check(rendered([double]), [single.caption])
    assert not verdict.attributes["count"] and not verdict.correct


@pytest.mark.parametrize("split", SPLITS)
def test_captions_read_back_as_their_scenes(split):
    for drawn in scenes(split, 100):
        assert parse_caption(drawn.caption).described == drawn.described


@pytest.mark.parametrize(
    "caption",
    ["", "a dog", "a huge red circle at the top left on a gray background", "a small red circle on a gray background"],
)
def test_foreign_captions_are_refused(caption):
    with pytest.raises(DataError, match="not a caption of the embedded shapes world"):
        parse_caption(caption)
