"""An image depends on its prompt, its number and the seed alone."""

from itertools import pairwise

import pytest
import torch

from bkd.data.shapes import scenes
from bkd.errors import DataError
from bkd.eval.drawing import Drawing
from bkd.eval.generate import Noise, block_size, draw, generate, image_generator
from bkd.models.load import load_pipeline

PROMPTS = [scene.caption for scene in scenes("test", 30)]
FEW_STEPS = Drawing(num_inference_steps=2, guidance_scale=3.0)


def images(pipe, indices, drawing=FEW_STEPS, prompts=PROMPTS, **options):
    return dict(draw(pipe, prompts, indices, drawing, **options))


@pytest.fixture(scope="module")
def all_drawn(teacher):
    return images(teacher, range(30))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_changes_nothing(teacher, all_drawn, batch_size):
    drawn = images(teacher, range(30), batch_size=batch_size)
    assert list(drawn) == list(range(30))
    assert all(torch.equal(drawn[index], all_drawn[index]) for index in drawn)


@pytest.mark.parametrize("indices", [[7], [29, 3, 24, 25], range(1, 30, 2)])
def test_what_else_is_drawn_changes_nothing(teacher, all_drawn, indices):
    drawn = images(teacher, indices, prompts=[*PROMPTS[:30], "one more", "and another"])
    assert list(drawn) == sorted(indices)
    assert all(torch.equal(drawn[index], all_drawn[index]) for index in drawn)


def test_pictures_for_looking_at_differ_in_the_last_bits_only(teacher, all_drawn):
    drawn = generate(teacher, PROMPTS, num_inference_steps=2, guidance_scale=3.0)
    difference = (drawn.int() - torch.stack(list(all_drawn.values())).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_seeds_and_numbers_draw_different_noise(teacher):
    first, _ = Noise(teacher, FEW_STEPS).of([0, 1, 2])
    second, _ = Noise(teacher, Drawing(2, 3.0, seed=1)).of([0, 1, 2])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)


def test_no_two_images_of_many_seeds_share_their_noise():
    """CPU generators read the lower half of their seed; nearby seeds must stay clear of each other's images."""
    starts = sorted(image_generator(seed, 0).initial_seed() for seed in range(1000))
    assert min(after - before for before, after in pairwise(starts)) > 1_000_000


def test_two_precisions_start_from_the_same_noise(teacher, teacher_folder):
    half = load_pipeline(teacher_folder, dtype=torch.bfloat16)
    first, _ = Noise(teacher, FEW_STEPS).of([0, 5])
    second, _ = Noise(half, FEW_STEPS).of([0, 5])
    assert second.dtype == torch.bfloat16 and torch.equal(first.bfloat16(), second)


def test_one_generator_for_all_is_the_stream_of_bksdm(teacher):
    """One generator of seed 1234 that every image of a batch of one draws from, one after the other."""
    generator = torch.Generator().manual_seed(1234)
    literal = [
        teacher(p, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt").images
        for p in PROMPTS[:3]
    ]
    noise = Noise(teacher, Drawing(2, 3.0, 1234, "bksdm"))
    latents, _ = noise.of([0, 1, 2])
    ours = teacher(PROMPTS[:3], num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="pt").images
    torch.testing.assert_close(ours, torch.cat(literal), rtol=0, atol=1e-5)
    assert torch.equal(noise.of([1])[0][0], latents[1])  # backwards, too
    assert torch.equal(noise.of([2])[0][0], latents[2])


def test_blocks_hold_a_picture_of_512_pixels():
    assert [block_size(side) for side in (32, 256, 512, 1024)] == [25, 4, 1, 1]


def test_an_unknown_generator_is_refused():
    with pytest.raises(DataError, match="did you mean 'bksdm'"):
        Drawing(2, 3.0, rng="bk-sdm")
