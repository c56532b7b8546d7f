"""The training loop: the same result whole, resumed, or split into passes."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from bkd.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from bkd.diffusion import NoiseSchedule
from bkd.errors import TrainingError
from bkd.methods.base import Diffusion
from bkd.methods.captions import caption_encoder
from bkd.methods.kd import KnowledgeDistillation
from bkd.models import load_noise_schedule
from bkd.recipe.schema import LossWeights, Train
from bkd.rng import StepRng
from bkd.surgery.build import build_student
from bkd.surgery.unet import plan_removal
from bkd.tracking import MetricsLog, read_metrics
from bkd.train import Fit, Interrupted, StopSignal, learning_rate
from tests.test_data import cached


@pytest.fixture(scope="module")
def data(teacher, teacher_folder, shards, tmp_path_factory):
    return cached(teacher, teacher_folder, shards[0].parent, tmp_path_factory.mktemp("latents"))


def kd(teacher, teacher_folder, preset="sd-tiny", weights=None, sites="block"):
    plan = plan_removal(teacher.unet.config, preset)
    diffusion = Diffusion(
        schedule=load_noise_schedule(teacher_folder),
        scaling_factor=teacher.vae.config.scaling_factor,
        captions=caption_encoder(teacher),
        prompt_dropout=0.25,
    )
    return KnowledgeDistillation(
        teacher=teacher.unet,
        student=build_student(teacher.unet, plan),
        diffusion=diffusion,
        pairs=plan.feature_pairs[sites],
        weights=weights or LossWeights(),
    )


def fit(method, data, folder, on_step=lambda report: None, **settings):
    train = Train(**{"batch": 8, "lr": 1e-3, "max_steps": 4, "checkpoint_every": 2, "ema": 0.9, **settings})
    Fit(method, data, train, seed=3, checkpoints=folder, on_step=on_step).run()
    return {name: p.detach().clone() for name, p in method.trainable.named_parameters()}


def one_batch(data, step=0):
    return data.gather(np.arange(8)), StepRng(0, step, range(8))


def test_an_identical_student_has_nothing_to_learn_from_its_teacher(teacher, teacher_folder, data):
    method = kd(teacher, teacher_folder, preset="none")
    parts = method.loss(*one_batch(data)).parts
    assert parts["output_kd_loss"] == parts["feature_kd_loss"] == 0 and parts["task_loss"] > 0


@pytest.mark.parametrize("sites", ["block", "bk"])
@pytest.mark.parametrize("preset", ["sd-small", "bk-small", "sd-tiny"])
def test_features_of_every_preset_fit_their_teachers(teacher, teacher_folder, data, preset, sites):
    terms = kd(teacher, teacher_folder, preset, sites=sites).loss(*one_batch(data))
    assert all(math.isfinite(value) and value > 0 for value in terms.parts.values())


def test_the_total_is_the_weighted_sum_of_what_is_logged(teacher, teacher_folder, data):
    weights = LossWeights(task=1.0, output_kd=0.5, feature_kd=0.25)
    terms = kd(teacher, teacher_folder, weights=weights).loss(*one_batch(data))
    expected = terms.parts["task_loss"] + 0.5 * terms.parts["output_kd_loss"] + 0.25 * terms.parts["feature_kd_loss"]
    assert torch.allclose(terms.total, expected)


def test_training_learns_and_leaves_the_teacher_alone(teacher, teacher_folder, data, tmp_path):
    before = {name: tensor.clone() for name, tensor in teacher.unet.state_dict().items()}
    reports = []
    fit(kd(teacher, teacher_folder), data, tmp_path, reports.append, max_steps=8)
    assert reports[-1].total < 0.7 * reports[0].total
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.unet.state_dict().items())
    assert not any(module._forward_hooks for module in teacher.unet.modules())


def test_resuming_gives_the_same_weights_bit_for_bit(teacher, teacher_folder, data, tmp_path):
    whole = fit(kd(teacher, teacher_folder), data, tmp_path / "whole")

    def stop_after_first(report):
        if report.step == 3:
            raise KeyboardInterrupt  # as hard as a kill: the checkpoint of step 2 is the newest

    with pytest.raises(KeyboardInterrupt):
        fit(kd(teacher, teacher_folder), data, tmp_path / "cut", stop_after_first)
    resumed = fit(kd(teacher, teacher_folder), data, tmp_path / "cut")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.fixture
def another_precision():
    """accelerate allows one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("another_precision")
def test_a_student_trained_in_bfloat16_computes_plainly_afterwards(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder)
    fit(method, data, tmp_path, mixed_precision="bf16", max_steps=1)
    student = method.trainable
    plain = type(student).from_config(student.config)
    plain.load_state_dict(student.state_dict())
    x = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 24, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(*x).sample, student(*x).sample)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder)
    before = method.trainable.conv_in.weight.detach().clone()
    real = method.loss
    method.loss = lambda batch, rng: (lambda t: type(t)(t.total * math.nan, t.parts))(real(batch, rng))
    with pytest.raises(TrainingError, match=r"step 1: training diverged(.|\n)*lower train\.lr"):
        fit(method, data, tmp_path)
    assert torch.equal(method.trainable.conv_in.weight, before)


def test_validation_pictures_show_the_average(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder)
    runs = []

    def look(report):
        weight = method.trainable.conv_in.weight
        raw = weight.detach().clone()
        with runs[0].averaged():
            assert report.step == 1 or not torch.equal(weight, raw)
        assert torch.equal(weight, raw)

    runs.append(
        Fit(method, data, Train(batch=8, lr=1e-3, max_steps=3, ema=0.9), seed=0, checkpoints=tmp_path, on_step=look)
    )
    runs[0].run()


def test_a_request_to_stop_is_granted_after_the_step_with_a_checkpoint(teacher, teacher_folder, data, tmp_path):
    import os
    import signal

    def ask(report):
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit(kd(teacher, teacher_folder), data, tmp_path, ask)
    assert load_newest_checkpoint(tmp_path, torch.device("cpu")).step == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_passes_do_not_change_the_result(teacher, teacher_folder, data, tmp_path):
    # One step: AdamW turns rounding of tiny gradients into visible differences later on.
    losses = {}
    for passes in (1, 2, 4):
        reports = []
        fit(kd(teacher, teacher_folder), data, tmp_path / str(passes), reports.append, grad_accum=passes, max_steps=1)
        losses[passes] = reports[0]
    for passes in (2, 4):
        assert losses[passes].total == pytest.approx(losses[1].total, rel=1e-5)
        assert losses[passes].grad_norm == pytest.approx(losses[1].grad_norm, rel=1e-3)


def test_the_student_is_the_average_of_its_past(teacher, teacher_folder, data, tmp_path):
    averaged = fit(kd(teacher, teacher_folder), data, tmp_path)
    newest = tmp_path / "00000004"
    last, ema = load_file(newest / "trainable.safetensors"), load_file(newest / "ema.safetensors")
    name = "conv_in.weight"
    assert torch.equal(averaged[name], ema[name]) and not torch.equal(averaged[name], last[name])


def test_prompt_dropout_replaces_captions_by_the_empty_prompt(teacher, teacher_folder, data):
    diffusion = kd(teacher, teacher_folder)._diffusion
    batch, _ = one_batch(data)
    drawn = [diffusion.draw(batch, StepRng(0, step, range(8))) for step in range(8)]
    with torch.no_grad():
        ids = teacher.tokenizer([""], padding="max_length", return_tensors="pt").input_ids
        empty = teacher.text_encoder(ids)[0]
    dropped = sum(torch.allclose(e, empty[0]) for d in drawn for e in d.conditioning.prompt_embeds)
    assert 8 <= dropped <= 26  # a quarter of 64


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.1]), ("cosine", [1, 0.5, 0.0245])]
)
def test_learning_rate_schedules(schedule, expected):
    train = Train(lr=1.0, lr_schedule=schedule, warmup_steps=10, max_steps=110)
    assert learning_rate(train, 4) == 0.5
    assert [learning_rate(train, step) for step in (10, 60, 100)] == pytest.approx(expected, abs=1e-3)


def test_checkpoints_are_whole_and_few(tmp_path):
    for step in (1, 2, 3):
        state = Checkpoint(step, {"w": torch.full((2,), float(step))}, {}, {"state": {}, "param_groups": []}, {})
        save_checkpoint(tmp_path, state, keep=2)
    (tmp_path / "00000009").mkdir()  # what a crash while writing could have left
    (tmp_path / "00000009.tmp").mkdir()
    assert load_newest_checkpoint(tmp_path, torch.device("cpu")).step == 3
    assert sorted(p.name for p in tmp_path.iterdir() if (p / "state.json").exists()) == ["00000002", "00000003"]


def test_metrics_are_rewound_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write({"stage": 0, "step": step})
    with path.open("a") as stream:
        stream.write('{"stage": 0, "st')  # cut short by a crash
    log.rewind(0, 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_second_request_stops_at_once():
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        stop._request(2, None)
        stop._request(2, None)


def test_zero_snr_has_a_target():
    schedule = NoiseSchedule.from_alphas_cumprod(torch.tensor([0.99, 0.0]), "v_prediction")
    x, noise = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert schedule.target(x, noise, torch.tensor([1])).item() == -1
