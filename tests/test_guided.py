"""Guidance in one pass: what the student is told and taught is what a stock pipeline does with two."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from bkd.diffusion.guidance import OnePassGuidance, one_pass_guidance, pipeline_scale
from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.eval.pictures import with_unet
from bkd.methods.base import Diffusion
from bkd.methods.captions import caption_encoder
from bkd.methods.guided import GuidedDistillation, embed_guidance_scale
from bkd.models.load import load_noise_schedule, load_pipeline
from bkd.recipe.stages import Guided, GuidedLoss
from bkd.rng import StepRng
from bkd.surgery.build import build_student
from bkd.surgery.recognise import recognise
from bkd.surgery.unet import plan_removal
from tests.conftest import SMALL_SD1, SMALL_SDXL
from tests.test_data import cached
from tests.training import fit, loss_of

TYPES = ("epsilon", "v_prediction", "sample")
CAPTION = "a small blue circle at the bottom right on a gray background"


@pytest.fixture(scope="module")
def data(teacher, teacher_folder, shards, tmp_path_factory):
    return cached(teacher, teacher_folder, shards[0].parent, tmp_path_factory.mktemp("guided"))


def guided(pipe, folder, blocks="none", dropout=0.0, **settings):
    """Guidance distillation of a loaded pipeline's student."""
    settings = Guided(**{"guidance_scale": (1.0, 8.0), **settings})
    plan = plan_removal(pipe.unet.config, blocks)
    if settings.takes_scale:
        plan = plan.with_guidance_input(64)
    diffusion = Diffusion(
        schedule=load_noise_schedule(folder),
        scaling_factor=pipe.vae.config.scaling_factor,
        captions=caption_encoder(pipe),
        prompt_dropout=dropout,
    )
    return GuidedDistillation(
        teacher=pipe.unet,
        student=build_student(pipe.unet, plan),
        diffusion=diffusion,
        pairs=plan.feature_pairs[settings.sites],
        settings=settings,
    )


def drawn_by(method, data, step=0):
    return method.draw(data.gather(np.arange(8)), StepRng(0, step, range(8)))


class Spy:
    """Stands for a UNet's forward pass: remembers what it was called with, and may answer in its place."""

    def __init__(self, unet, answer=None):
        self._unet, self._answer, self.calls = unet, answer, []

    def __call__(self, sample, timestep, prompt_embeds, **more):
        self.calls.append({"sample": sample, "timestep": timestep, "prompt_embeds": prompt_embeds, **more})
        if self._answer is not None:
            return (self._answer,)
        return self._unet(sample, timestep, prompt_embeds, **more)


@pytest.mark.parametrize("config", [SMALL_SD1, SMALL_SDXL], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("blocks", ["none", "sd-small"])
def test_an_untrained_student_with_a_scale_is_its_starting_network(config, blocks):
    from diffusers import UNet2DConditionModel

    from bkd.surgery.probe import as_arguments, unet_inputs

    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
    plan = plan_removal(config, blocks)
    student_plan = plan.with_guidance_input(64)
    plain, student = build_student(teacher, plan), build_student(teacher, student_plan)
    inputs = unet_inputs(student.config, side=8, num_tokens=7)
    told = student(**as_arguments(inputs)).sample
    del inputs["timestep_cond"]
    assert torch.equal(told, plain(**as_arguments(inputs)).sample)
    found = recognise(teacher.config, student.config)
    assert found.added == plan.with_guidance_input(64).added and found.overrides == {
        **plan.overrides,
        "time_cond_proj_dim": 64,
    }


def test_the_student_is_told_what_the_pipeline_tells_it(teacher, teacher_folder, data, monkeypatch):
    method = guided(teacher, teacher_folder)
    pipe, real, told = with_unet(teacher, method.trainable), method.trainable.forward, []

    def remember(sample, *args, timestep_cond=None, **more):
        told.append((len(sample), timestep_cond))
        return real(sample, *args, timestep_cond=timestep_cond, **more)

    monkeypatch.setattr(method.trainable, "forward", remember)
    for scale in (1.0, 2.5):
        told.clear()
        pipe([CAPTION] * 2, num_inference_steps=2, guidance_scale=scale, output_type="latent")
        assert [count for count, _ in told] == [2, 2]  # one pass for each image and step
        expected = embed_guidance_scale(torch.tensor([scale, scale]), 64)
        assert all(torch.equal(cond, expected) for _, cond in told)
    no_guidance = embed_guidance_scale(torch.ones(1), 64)
    assert torch.equal(no_guidance, torch.cat([torch.zeros(1, 32), torch.ones(1, 32)], 1))  # w = 0: sines, cosines


def test_scales_are_drawn_from_the_range_by_step_and_position(teacher, teacher_folder, data):
    method = guided(teacher, teacher_folder, guidance_scale=(2.0, 5.0))
    scales = torch.cat([drawn_by(method, data, step).guidance_scale for step in range(64)]).flatten()
    assert 2 <= scales.min() < 2.1 and 4.9 < scales.max() <= 5 and abs(scales.mean() - 3.5) < 0.15
    assert torch.equal(drawn_by(method, data, 3).scale_embeds, drawn_by(method, data, 3).scale_embeds)
    fixed = drawn_by(guided(teacher, teacher_folder, guidance_scale=4.0), data)
    assert fixed.guidance_scale.unique().tolist() == [4.0] and fixed.scale_embeds is None


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("negative", ["", "a large red square at the top left on a white background"])
def test_the_target_is_the_pipelines_guided_output(teacher, teacher_folder, data, monkeypatch, joint, negative):
    """One step of the stock pipeline from a drawn sample, compared with a student that answers zero."""
    method = guided(teacher, teacher_folder, guidance_scale=3.0, joint_teacher_passes=joint, negative_prompt=negative)
    drawn = drawn_by(method, data)
    latents, timestep = drawn.noisy.noisy_latents[:1], int(drawn.noisy.timesteps[0])
    caption = teacher.tokenizer.decode(drawn.noisy.captions.token_ids[0], skip_special_tokens=True)
    asked = []
    monkeypatch.setattr(teacher.scheduler, "step", lambda output, *args, **more: asked.append(output) or (latents,))
    teacher(
        caption,
        negative_prompt=negative,
        timesteps=None,
        num_inference_steps=1,
        guidance_scale=3.0,
        latents=latents,
        output_type="latent",
    )
    monkeypatch.undo()
    zero = torch.zeros_like(drawn.noisy.noisy_latents)
    method.forward = Spy(method.trainable, zero)
    spy = method.forward_teacher = Spy(method.teacher)
    found = method.loss(drawn).parts["output_kd_loss"]
    assert [len(call["sample"]) for call in spy.calls] == ([16] if joint else [8, 8])
    # The pipeline starts at its own timestep; the same two passes at the drawn one:
    embeds = torch.cat(teacher.encode_prompt(caption, "cpu", 1, True, negative)[::-1])
    with torch.no_grad():
        both = teacher.unet(latents.repeat(2, 1, 1, 1), 999, embeds).sample
        first, second = both.chunk(2)
        assert torch.allclose(first + 3.0 * (second - first), asked[0], atol=1e-6)
        outputs = []
        for index in range(8):
            text = teacher.tokenizer.decode(drawn.noisy.captions.token_ids[index], skip_special_tokens=True)
            embeds = torch.cat(teacher.encode_prompt(text, "cpu", 1, True, negative)[::-1])
            one = drawn.noisy.noisy_latents[index : index + 1].repeat(2, 1, 1, 1)
            away, towards = teacher.unet(one, drawn.noisy.timesteps[index], embeds).sample.chunk(2)
            outputs.append(away + 3.0 * (towards - away))
    assert torch.allclose(found, torch.cat(outputs).square().mean(), rtol=1e-4)
    assert timestep == int(drawn.noisy.timesteps[0])


def test_a_student_that_answers_the_target_has_nothing_to_learn(teacher, teacher_folder, data):
    method = guided(teacher, teacher_folder, guidance_scale=1.0)
    assert loss_of(method, data).total.item() < 1e-10  # scale 1 is the conditional pass alone


@pytest.mark.parametrize("scale", [4.0, (2.0, 8.0)])
def test_what_there_is_to_learn_is_logged(teacher, teacher_folder, data, scale):
    """An untrained student is the teacher's one pass without guidance, so it has all of that to learn."""
    parts = loss_of(guided(teacher, teacher_folder, guidance_scale=scale), data).parts
    assert float(parts["unguided_loss"]) == pytest.approx(float(parts["output_kd_loss"]), rel=1e-5) != 0


def test_features_are_those_of_the_conditional_pass(teacher, teacher_folder, data):
    settings = {"guidance_scale": 5.0, "loss": GuidedLoss(output_kd=0.0, feature_kd=1.0), "blocks": "none"}
    for joint in (True, False):
        terms = loss_of(guided(teacher, teacher_folder, joint_teacher_passes=joint, **settings), data)
        assert float(terms.parts["feature_kd_loss"]) < 1e-8 < float(terms.parts["output_kd_loss"])
        assert len(terms.sites) == 9


def test_an_sdxl_teacher_is_led_away_from_a_zero_embedding(family_folders):
    pipe = load_pipeline(family_folders["sdxl"])
    encoder = caption_encoder(pipe)
    nothing, something = encoder.unconditional(""), encoder.unconditional("gray")
    assert not nothing.prompt_embeds.any() and not nothing.added["text_embeds"].any()
    _, expected, _, pooled = pipe.encode_prompt("x", negative_prompt="gray", device="cpu", num_images_per_prompt=1)
    assert torch.allclose(something.prompt_embeds, expected, atol=1e-6)
    assert torch.allclose(something.added["text_embeds"], pooled, atol=1e-6)


def test_predictions_of_every_type_say_the_same():
    schedule = NoiseSchedule.from_alphas_cumprod(DDIMScheduler().alphas_cumprod, "epsilon")
    timesteps = torch.arange(0, 1000, 37)
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(timesteps), 4, 8, 8, generator=rng, dtype=torch.float64)
    alpha, sigma = (table[timesteps].reshape(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
    noisy = alpha * latents + sigma * noise
    for ours, other in itertools.product(TYPES, TYPES):
        factor, offset = schedule.predicting(ours).conversion(timesteps, other)
        prediction = schedule.predicting(ours).target(latents, noise, timesteps)
        expected = schedule.predicting(other).target(latents, noise, timesteps)
        assert torch.allclose(factor.double() * prediction + offset.double() * noisy, expected, atol=2e-5), (
            ours,
            other,
        )


@pytest.mark.parametrize("kind", TYPES)
def test_truncated_snr_weighs_an_error_of_the_clean_latents(kind):
    schedule = NoiseSchedule.from_alphas_cumprod(DDIMScheduler().alphas_cumprod, kind)
    timesteps = torch.tensor([0, 300, 600, 999])
    alpha, sigma = schedule.alphas[timesteps], schedule.sigmas[timesteps]
    of_x = {"epsilon": sigma / alpha, "v_prediction": sigma, "sample": torch.ones_like(alpha)}[kind]
    snr = (alpha / sigma) ** 2
    expected = torch.maximum(snr, torch.ones_like(snr)) * of_x**2
    assert torch.allclose(schedule.truncated_snr_weight(timesteps).double(), expected, rtol=1e-6)


def test_a_student_of_another_prediction_type_learns_the_same_target(teacher, teacher_folder, data):
    """With weights that make an error of each type one of the clean latents, the loss does not depend on the type."""
    losses = []
    for kind in TYPES:
        settings = {"guidance_scale": 3.0, "prediction_type": kind, "loss": GuidedLoss(weighting="truncated-snr")}
        method = guided(teacher, teacher_folder, **settings)
        drawn = drawn_by(method, data)
        schedule, noisy = load_noise_schedule(teacher_folder), drawn.noisy
        # A student that says "the latents are zero", in its own way.
        factor, offset = schedule.predicting("sample").conversion(noisy.timesteps, kind)
        method.forward = Spy(method.trainable, offset * noisy.noisy_latents + 0 * factor)
        losses.append(float(method.loss(drawn).total))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) == pytest.approx(losses[2], rel=1e-3)


def test_training_learns_and_leaves_the_teacher_alone(teacher, teacher_folder, data, tmp_path):
    before = {name: tensor.clone() for name, tensor in teacher.unet.state_dict().items()}
    method, losses = guided(teacher, teacher_folder, "sd-tiny", guidance_scale=3.0), []
    fit(method, data, tmp_path, lambda report: losses.append(report.total), max_steps=12, lr=2e-3)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.unet.state_dict().items())


def test_what_a_student_has_learnt_decides_how_its_pipeline_is_called(teacher_folder, tmp_path):
    fixed, told = OnePassGuidance(3, 3, takes_scale=False), OnePassGuidance(1, 8, takes_scale=True)
    assert fixed.pipeline_scale(3.0, "m") == 1.0 and told.pipeline_scale(3.0, "m") == 3.0
    for guidance, asked in ((fixed, 4.0), (told, 8.5)):
        with pytest.raises(Exception, match="has not learnt that guidance scale"):
            guidance.pipeline_scale(asked, "m")
    assert pipeline_scale(teacher_folder, 5.0, "teacher") == 5.0 and one_pass_guidance(teacher_folder) is None
