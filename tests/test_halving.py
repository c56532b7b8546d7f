"""Progressive halving: its algebra, in float64, and what samplers and a training make of it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import bkd.diffusion.sampling
from bkd.diffusion.few_steps import FewSteps
from bkd.diffusion.grid import Grid, is_grid, nests, rotation, trailing_timesteps
from bkd.diffusion.guidance import OnePassGuidance
from bkd.diffusion.halving import DoubleSteps, crossing
from bkd.diffusion.noise_schedule import NoiseSchedule, conversion_at
from bkd.diffusion.sampling import InversionScheduler, StochasticScheduler
from bkd.diffusion.schedulers import TRAINED, stock_scheduler
from bkd.methods.base import Diffusion
from bkd.methods.captions import caption_encoder
from bkd.methods.guided import embed_guidance_scale
from bkd.methods.halving import HalvingDistillation
from bkd.models.load import load_noise_schedule
from bkd.recipe.stages import Halving
from bkd.rng import StepRng
from bkd.surgery.build import build_student
from bkd.surgery.unet import plan_removal
from tests.test_data import cached
from tests.training import fit, loss_of

TYPES = ("epsilon", "v_prediction", "sample")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
COUNTS = (64, 32, 16, 8, 4, 2, 1)
MEAN, DEVIATION = 0.3, 0.7
"""Of Gaussian data, whose exact denoiser is known."""


def schedule(predicts="v_prediction", zero_snr=False):
    table = DDIMScheduler(**SD, rescale_betas_zero_snr=zero_snr).alphas_cumprod
    return NoiseSchedule.from_alphas_cumprod(table, predicts)


def ddim(z, p, start, end, predicts):
    """One step of a model of one type from (alpha, sigma) to (alpha, sigma), by the textbook."""
    (a, s), (a1, s1) = start, end
    of_p, of_z = conversion_at(a, s, predicts, "v_prediction")
    v = of_p * p + of_z * z
    x, eps = a * z - s * v, s * z + a * v
    return a1 * x + s1 * eps


def applied(factors, *tensors):
    return sum(factor * tensor for factor, tensor in zip(factors, tensors, strict=True))


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero-snr"])
@pytest.mark.parametrize("direction", ["generation", "inversion"])
@pytest.mark.parametrize("student", TYPES)
@pytest.mark.parametrize("teacher", TYPES)
def test_one_step_of_the_target_is_two_steps_of_the_teacher(teacher, student, direction, zero_snr):
    if zero_snr and "epsilon" in (teacher, student):
        return  # says nothing about the clean latents at the end
    if direction == "inversion" and "sample" in (teacher, student):
        return  # nor this about the noise at the start
    torch.manual_seed(0)
    for count in (64, 32, 16, 8, 4, 2):
        steps = DoubleSteps.of(schedule(zero_snr=zero_snr), count, direction=direction)
        factors = crossing(steps, teacher, student)
        z, p, p1 = torch.randn(3, len(steps), dtype=torch.float64)
        points = list(zip(steps.alphas.unbind(1), steps.sigmas.unbind(1), strict=True))
        halfway = ddim(z, p, points[0], points[1], teacher)
        twice = ddim(halfway, p1, points[1], points[2], teacher)
        assert torch.allclose(applied(factors.halfway, z, p), halfway, atol=1e-12, rtol=1e-12)
        target = applied(factors.target, z, p, halfway, p1)
        assert torch.allclose(ddim(z, target, points[0], points[2], student), twice, atol=1e-10, rtol=1e-11)
        once = ddim(z, p, points[0], points[2], teacher)
        assert torch.allclose(ddim(z, applied(factors.single, z, p), points[0], points[2], student), once, atol=1e-10)


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero-snr"])
def test_errors_weigh_the_same_in_all_predictions(zero_snr):
    """max(SNR, 1) on the clean latents' error, whatever the network says."""
    steps = DoubleSteps.of(schedule(zero_snr=zero_snr), 8)
    alpha, sigma = steps.alphas[:, 0], steps.sigmas[:, 0]
    error = torch.full_like(alpha, 0.1)
    same_error = {"v_prediction": error, "sample": sigma * error, "epsilon": alpha * error}  # with z given
    expected = torch.maximum(alpha**2, sigma**2) * error**2
    for predicts in TYPES[1:] if zero_snr else TYPES:
        weight = crossing(steps, "v_prediction", predicts).weight
        assert torch.allclose(weight * same_error[predicts] ** 2, expected)


def gaussian(known, index_of):
    """The exact denoiser of N(MEAN, DEVIATION^2) data, called as a network is: with latents and a timestep."""

    def model(z, timestep, alpha, sigma):
        x = MEAN + DEVIATION**2 * alpha / (alpha**2 * DEVIATION**2 + sigma**2) * (z - alpha * MEAN)
        eps = (z - alpha * x) / sigma if sigma > 0 else (MEAN - z) * 0 + _score(z, alpha, sigma)
        return {"epsilon": eps, "sample": x, "v_prediction": alpha * eps - sigma * x}[known]

    return model


def _score(z, alpha, sigma):
    """eps of clean latents: sigma times the score, which vanishes with sigma."""
    return -sigma * (z - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)


def halved(model, steps, predicts):
    """The function that the loss is least for: by timestep, what the target says."""
    rows = {int(t): number for number, t in enumerate(steps.timesteps)}

    def student(z, timestep, alpha, sigma):
        one = steps.take(torch.tensor([rows[int(timestep)]]))
        factors = crossing(one, predicts, predicts)
        (a, a1, _), (s, s1, _) = one.alphas[0], one.sigmas[0]
        assert (a, s) == (alpha, sigma)
        first = model(z, one.first_timesteps[0], a, s)
        halfway = applied(factors.halfway, z, first)
        return applied(factors.target, z, first, halfway, model(halfway, one.second_timesteps[0], a1, s1))

    return student


def walked(model, grid, z, predicts, direction="generation"):
    """All latents on the way from one end of a grid to the other."""
    points = range(len(grid)) if direction == "generation" else range(len(grid) - 1, -1, -1)
    for index in points:
        start, end = (index, index + 1) if direction == "generation" else (index + 1, index)
        levels = [(grid.alphas[k], grid.sigmas[k]) for k in (start, end)]
        z = ddim(z, model(z, grid.timesteps[index], *levels[0]), *levels, predicts)
        yield z


@pytest.mark.parametrize("direction", ["generation", "inversion"])
@pytest.mark.parametrize("predicts", TYPES)
def test_the_halved_optimum_reproduces_its_first_teacher(predicts, direction):
    """Six halvings of the exact denoiser of Gaussian data: one step ends where 64 do."""
    if direction == "inversion" and predicts == "sample":
        return
    torch.manual_seed(0)
    known, z = schedule(predicts), torch.randn(16, dtype=torch.float64)
    model = gaussian(predicts, None)
    expected = list(walked(model, Grid.of(known, 64), z, predicts, direction))
    for count in COUNTS[:-1]:
        model = halved(model, DoubleSteps.of(known, count, direction=direction), predicts)
        found = list(walked(model, Grid.of(known, count // 2), z, predicts, direction))
        every = 64 // (count // 2)
        assert torch.allclose(torch.stack(found), torch.stack(expected[every - 1 :: every]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("predicts", TYPES)
@pytest.mark.parametrize("count", [8, 4, 2])
def test_the_stochastic_samplers_marginals_are_the_exact_ones(count, predicts, monkeypatch):
    """With double steps along the exact solution, every point of the grid has the forward process's distribution."""
    known = schedule(predicts)
    scheduler = StochasticScheduler(**SD, prediction_type=predicts)
    scheduler.set_timesteps(count)
    steps = DoubleSteps.of(known, count, sampler="stochastic")
    grid = Grid.of(known, count)

    def deviation(alpha, sigma):
        return (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5

    def after(z, timestep, noise):
        row = int((steps.timesteps == timestep).nonzero())
        (a, _, a2), (s, _, s2) = steps.alphas[row], steps.sigmas[row]
        exact = a2 * MEAN + deviation(a2, s2) / deviation(a, s) * (z - a * MEAN)  # the probability flow of Gaussians
        cos, sin = rotation(a, s, a2, s2)
        of_v, of_z = conversion_at(a, s, "v_prediction", predicts)
        output = of_v * (exact - cos * z) / sin + of_z * z
        monkeypatch.setattr(bkd.diffusion.sampling, "randn_tensor", lambda *args, **more: torch.full_like(z, noise))
        return scheduler.step(output, timestep, z).prev_sample

    mean, variance = grid.alphas[0] * MEAN, deviation(grid.alphas[0], grid.sigmas[0]) ** 2
    for index, timestep in enumerate(scheduler.timesteps):
        at_zero, at_one = after(torch.tensor([0.0, 1.0], dtype=torch.float64), timestep, 0.0)
        fresh = after(torch.zeros(1, dtype=torch.float64), timestep, 1.0)[0] - at_zero
        slope = at_one - at_zero  # z' = at_zero + slope z + fresh n
        mean, variance = at_zero + slope * mean, slope**2 * variance + fresh**2
        alpha, sigma = grid.alphas[index + 1], grid.sigmas[index + 1]
        assert torch.isclose(mean, alpha * MEAN, atol=1e-10) and torch.isclose(variance, deviation(alpha, sigma) ** 2)


def test_grids_are_those_of_stock_schedulers():
    for count in range(1, 501):
        stock = DDIMScheduler(**SD, timestep_spacing="trailing")
        stock.set_timesteps(count)
        assert torch.equal(trailing_timesteps(1000, count), stock.timesteps)
        assert is_grid(1000, count) == (len(stock.timesteps) == count)
    assert not any(nests(1000, count) for count in (96, 192, 224, 7, 122))
    assert all(nests(1000, count) for count in (2, 4, 8, 16, 32, 64, 128, 256, 512, 48, 50, 100, 20, 40))


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero-snr"])
@pytest.mark.parametrize("predicts", TYPES)
@pytest.mark.parametrize("count", [*COUNTS, 50, 25, 5])
def test_the_exported_scheduler_walks_the_trained_trajectory(count, predicts, zero_snr):
    if zero_snr and predicts == "epsilon":
        return
    known = {**SD, "prediction_type": predicts, "rescale_betas_zero_snr": zero_snr}
    stock = stock_scheduler({**known, "steps_offset": 1, "skip_prk_steps": True}, FewSteps(count))
    stock.set_timesteps(count)
    grid = Grid.of(schedule(predicts, zero_snr), count)
    assert torch.equal(stock.timesteps, grid.timesteps)
    torch.manual_seed(count)
    outputs, z = torch.randn(count, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    expected = list(walked(lambda z, timestep, *level: outputs[index_of(grid, timestep)], grid, z, predicts))
    exact = 1e-5 if not zero_snr or 1000 % count == 0 else 2e-3  # where a square of alpha is 2^-24 in place of 0
    for output, timestep, reference in zip(outputs, stock.timesteps, expected, strict=True):
        z = stock.step(output, timestep, z, return_dict=False)[0]
        assert (z - reference).norm() <= exact * reference.norm()


def index_of(grid, timestep):
    return int((grid.timesteps == timestep).nonzero())


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("count", [*COUNTS, 50])
def test_inversion_walks_the_same_grid_back(count, predicts):
    ours = InversionScheduler(**SD, prediction_type=predicts)
    ours.set_timesteps(count)
    stock = stock_scheduler({**SD, "prediction_type": predicts}, FewSteps(count, direction="inversion"))
    stock.set_timesteps(count)
    grid = Grid.of(schedule(predicts), count)
    torch.manual_seed(count)
    outputs, z = torch.randn(count, 64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    answer = lambda z, timestep, *level: outputs[index_of(grid, timestep)]  # noqa: E731
    assert torch.equal(ours.timesteps, grid.timesteps.flip(0)) and torch.equal(stock.timesteps, ours.timesteps)
    theirs = z
    for timestep, reference in zip(ours.timesteps, walked(answer, grid, z, predicts, "inversion"), strict=True):
        output = answer(z, timestep)
        z = ours.step(output, timestep, z).prev_sample
        theirs = stock.step(output, timestep, theirs).prev_sample
        assert torch.allclose(z, reference, atol=1e-10)
        if 1000 % count == 0:
            assert (theirs - reference).norm() <= 1e-5 * reference.norm()


@pytest.fixture(scope="module")
def data(teacher, teacher_folder, shards, tmp_path_factory):
    return cached(teacher, teacher_folder, shards[0].parent, tmp_path_factory.mktemp("halving"))


def halving(pipe, folder, guidance=None, blocks="none", unet=None, **settings):
    """Halving of a loaded pipeline's student."""
    teacher = unet or pipe.unet
    return HalvingDistillation(
        teacher=teacher,
        student=build_student(teacher, plan_removal(teacher.config, blocks)),
        diffusion=Diffusion(
            schedule=load_noise_schedule(folder),
            scaling_factor=pipe.vae.config.scaling_factor,
            captions=caption_encoder(pipe),
            prompt_dropout=0.0,
        ),
        settings=Halving(**{"num_inference_steps": (8, 4), **settings}),
        guidance=guidance,
    )


def drawn_by(method, data, step=0):
    return method.draw(data.gather(np.arange(8)), StepRng(0, step, range(8)))


def test_the_target_is_two_steps_of_the_stock_scheduler(teacher, teacher_folder, data, monkeypatch):
    """A student's answer that makes the loss zero takes the stock scheduler where two answers of the teacher do."""
    method = halving(teacher, teacher_folder)
    drawn = drawn_by(method, data)
    targets = []
    monkeypatch.setattr("bkd.methods.halving.output_kd_loss", lambda p, target, w: targets.append(target) or p.mean())
    method.loss(drawn)
    conditioning = caption_encoder(teacher)(drawn.captions, drawn.dropped, None)
    fine, coarse = (DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing") for _ in "ab")
    fine.set_timesteps(8)
    coarse.set_timesteps(4)
    for k in range(8):
        z = drawn.noisy_latents[k : k + 1]
        once = coarse.step(targets[0][k : k + 1], drawn.timesteps[k], z).prev_sample
        for timestep in (drawn.timesteps[k], drawn.second_timesteps[k]):
            with torch.no_grad():
                output = teacher.unet(z, timestep, conditioning.prompt_embeds[k : k + 1]).sample
            z = fine.step(output, timestep, z).prev_sample
        assert torch.allclose(once, z, atol=2e-5)


def test_steps_are_drawn_from_the_students_grid(teacher, teacher_folder, data):
    seen = {
        name: {
            int(t)
            for step in range(16)
            for t in drawn_by(halving(teacher, teacher_folder, **how), data, step).timesteps
        }
        for name, how in {
            "deterministic": {},
            "stochastic": {"num_inference_steps": (4, 4), "sampler": "stochastic"},
            "inversion": {"direction": "inversion"},
        }.items()
    }
    assert all(timesteps == {999, 749, 499, 249} for timesteps in seen.values())


def test_an_inversion_begins_with_the_image(teacher, teacher_folder, data):
    method = halving(teacher, teacher_folder, direction="inversion")
    drawn = [drawn_by(method, data, step) for step in range(8)]
    noisy = torch.cat([each.noisy_latents[each.timesteps == 249] for each in drawn])
    assert noisy.flatten(1).std(1).mean() < 2  # latents, at a scale of about 1, without noise
    for each in drawn:
        assert (each.first_timesteps < each.second_timesteps).all()
        assert torch.equal(each.timesteps, each.second_timesteps)  # the noisier end's, as the last step's


def test_scales_are_told_to_both(teacher, teacher_folder, data, monkeypatch):
    plan = plan_removal(teacher.unet.config, "none").with_guidance_input(64)
    told = build_student(teacher.unet, plan).requires_grad_(False)
    method = halving(teacher, teacher_folder, OnePassGuidance(2.0, 5.0, True), unet=told)
    drawn = drawn_by(method, data)
    assert drawn.scale_embeds.shape == (8, 64)
    low, high = (embed_guidance_scale(torch.tensor([s]), 64) for s in (2.0, 5.0))
    assert not torch.equal(drawn.scale_embeds[:1], low) and not torch.equal(drawn.scale_embeds[:1], high)
    heard = []
    for unet in (told, method.trainable):
        real = unet.forward
        monkeypatch.setattr(
            unet, "forward", lambda *a, real=real, **k: heard.append(k["timestep_cond"]) or real(*a, **k)
        )
    method.loss(drawn)
    assert len(heard) == 3 and all(torch.equal(each, drawn.scale_embeds) for each in heard)
    one_scale = halving(teacher, teacher_folder, OnePassGuidance(3.0, 3.0, False))
    assert drawn_by(one_scale, data).scale_embeds is None


@pytest.mark.parametrize(
    "how",
    [
        {"num_inference_steps": (2, 1)},
        {"num_inference_steps": (2, 2), "sampler": "stochastic"},
        {"num_inference_steps": (2, 1), "direction": "inversion"},
        {"blocks": "sd-tiny"},
    ],
    ids=["deterministic", "stochastic", "inversion", "pruned"],
)
def test_training_learns(teacher, teacher_folder, data, tmp_path, how):
    make = partial(halving, teacher, teacher_folder, **how)
    method = make()
    before = loss_of(method, data)
    parts = before.parts
    if not {"blocks", "direction"} & how.keys():  # it starts as its teacher, which takes one step in place of two
        assert torch.allclose(parts["halving_loss"], parts["single_step_loss"])
    frozen = {name: p.clone() for name, p in teacher.unet.named_parameters()}
    fit(method, data, tmp_path, max_steps=20, lr=1e-4, ema=0.0)
    assert loss_of(method, data).total < 0.9 * before.total
    assert all(torch.equal(p, frozen[name]) for name, p in teacher.unet.named_parameters())


def test_a_student_may_predict_something_else(teacher, teacher_folder, data, tmp_path):
    """In v, epsilon or x the targets mean the same step."""
    found = {}
    for predicts in TYPES:
        method = halving(teacher, teacher_folder, prediction_type=predicts)
        drawn = drawn_by(method, data)
        steps = DoubleSteps.of(load_noise_schedule(teacher_folder), 8)
        rows = [int((steps.timesteps == t).nonzero()) for t in drawn.timesteps]
        taken = steps.take(torch.tensor(rows))
        z, p, p1 = (
            drawn.noisy_latents,
            *torch.randn(2, *drawn.noisy_latents.shape, generator=torch.Generator().manual_seed(0)),
        )
        target = applied(drawn.crossing.target, z, p, applied(drawn.crossing.halfway, z, p), p1)
        levels = [(taken.alphas[:, k].reshape(-1, 1, 1, 1), taken.sigmas[:, k].reshape(-1, 1, 1, 1)) for k in (0, 2)]
        found[predicts] = ddim(z, target, *levels, predicts)
    assert torch.allclose(found["epsilon"], found["v_prediction"], atol=1e-4)
    assert torch.allclose(found["sample"], found["v_prediction"], atol=1e-4)


def test_samplers_refuse_counts_without_a_grid():
    for kind in (StochasticScheduler, InversionScheduler):
        with pytest.raises(bkd.diffusion.sampling.ModelError, match="no grid"):
            kind(**SD).set_timesteps(61)
    assert set(TRAINED) <= set(StochasticScheduler(**SD).config)
    assert replace(FewSteps(4), sampler="stochastic").stock_steps == 2
