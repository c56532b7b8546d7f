"""The training loop: the same result whole, resumed, or split into passes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.errors import DataError, EnvironmentProblem, TrainingError
from bkd.recipe.load import load_recipe
from bkd.recipe.schema import Train
from bkd.recipe.stages import Loss
from bkd.runs.folder import RunFolder
from bkd.runs.opening import open_run
from bkd.runs.run import _recorded_end
from bkd.training.checkpoint import Checkpoints
from bkd.training.fit import Events
from bkd.training.journal import StepReport
from bkd.training.optimizer import learning_rate
from bkd.training.stop import Interrupted, StopSignal
from bkd.training.tracking import MetricsLog, TrackedStage, Trackers, log_in, read_metrics, require_trackers
from tests.test_data import cached
from tests.training import fit, kd, loss_of, make_fit, one_batch, run


@pytest.fixture(scope="module")
def data(teacher, teacher_folder, shards, tmp_path_factory):
    return cached(teacher, teacher_folder, shards[0].parent, tmp_path_factory.mktemp("latents"))


def test_an_identical_student_has_nothing_to_learn_from_its_teacher(teacher, teacher_folder, data):
    method = kd(teacher, teacher_folder, preset="none")
    parts = loss_of(method, data).parts
    assert parts["output_kd_loss"] == parts["feature_kd_loss"] == 0 and parts["task_loss"] > 0


@pytest.mark.parametrize("sites", ["block", "bk", "layer", "self-attn"])
@pytest.mark.parametrize("preset", ["sd-small", "bk-small", "sd-tiny"])
def test_features_of_every_preset_fit_their_teachers(teacher, teacher_folder, data, preset, sites):
    terms = loss_of(kd(teacher, teacher_folder, preset, sites=sites), data)
    assert all(math.isfinite(value) and value > 0 for value in terms.parts.values())


def test_the_total_is_the_weighted_sum_of_what_is_logged(teacher, teacher_folder, data):
    loss = Loss(task=1.0, output_kd=0.5, feature_kd=0.25)
    terms = loss_of(kd(teacher, teacher_folder, loss=loss), data)
    expected = terms.parts["task_loss"] + 0.5 * terms.parts["output_kd_loss"] + 0.25 * terms.parts["feature_kd_loss"]
    assert torch.allclose(terms.total, expected)
    assert torch.allclose(torch.stack(list(terms.sites.values())).sum(), terms.parts["feature_kd_loss"])


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


def test_a_student_trained_in_bfloat16_computes_plainly_afterwards(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder)
    fit(method, data, tmp_path, mixed_precision="bf16", max_steps=1)
    student = method.trainable
    plain = type(student).from_config(student.config)
    plain.load_state_dict(student.state_dict())
    x = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 24, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(*x).sample, student(*x).sample)


def test_validation_pictures_show_the_average(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder)
    seen = []

    def look(fit, step):
        weight = method.trainable.conv_in.weight
        raw = weight.detach().clone()
        with fit.averaged():
            seen.append(not torch.equal(weight, raw))
        assert torch.equal(weight, raw)

    events = Events(samples=look)
    running = make_fit(method, data, tmp_path, events=events, max_steps=3, samples_every=1)
    run(running)
    assert seen == [True, True, True]


def test_a_request_to_stop_is_granted_after_the_step_with_a_checkpoint(teacher, teacher_folder, data, tmp_path):
    def ask(report):
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit(kd(teacher, teacher_folder), data, tmp_path, ask)
    assert Checkpoints(tmp_path).newest() == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("log_every", "done", "asked"), [(5, 3, "waiting"), (1, 3, "waiting"), (1, 0, "waiting"), (1, 2, "before")]
)
def test_a_request_to_stop_does_not_wait_for_samples_that_do_not_come(
    teacher, teacher_folder, data, tmp_path, log_every, done, asked
):
    """Whether it comes while a step waits for them, or before there is no other choice."""
    settings = {"log_every": log_every, "checkpoint_every": 100, "grad_accum": 2, "max_steps": 6}
    whole = fit(kd(teacher, teacher_folder), data, tmp_path / "whole", **settings)

    def ask(report):
        if asked == "before" and report.step == done - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    made = make_fit(kd(teacher, teacher_folder), data, tmp_path / "cut", ask, **settings)
    draw, give_up, comes, came = made._draw, made._give_up_waiting, threading.Event(), threading.Event()

    def stalls(place):
        if place == (done, 1):  # the second pass of a step
            comes.wait(60)
            came.set()
        return draw(place)

    def ask_and_give_up(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        give_up(stop)

    made._draw, made._give_up_waiting = stalls, ask_and_give_up
    with pytest.raises(Interrupted):
        run(made)
    assert not came.is_set()
    comes.set()
    assert Checkpoints(tmp_path / "cut").newest() == (done or None)
    continued = fit(kd(teacher, teacher_folder), data, tmp_path / "cut", **settings)
    assert all(torch.equal(continued[name], whole[name]) for name in whole)


@pytest.mark.parametrize("checkpoint_every", [100, 1])
@pytest.mark.parametrize("error", [DataError("gone"), OSError("no locks here")])
def test_samples_that_cannot_be_read_cost_no_step_before_them(
    teacher, teacher_folder, data, tmp_path, monkeypatch, error, checkpoint_every
):
    made = make_fit(kd(teacher, teacher_folder), data, tmp_path, checkpoint_every=checkpoint_every, max_steps=8)
    draw, drawn, saved = made._draw, [], []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, one: (saved.append(one.step), save(self, one)))

    def fails(place):
        drawn.append(place)
        if place == (3, 0):
            raise error
        return draw(place)

    made._draw = fails
    with pytest.raises(type(error), match=str(error)):
        run(made)
    assert drawn[-1] == (3, 0)  # no later sample is asked for
    assert saved == ([3] if checkpoint_every == 100 else [1, 2, 3])


HANGING = """
import sys, time
from bkd.data.ahead import read_ahead

def leave():
    sys.exit(75)

def read(item):
    print(item, flush=True)
    time.sleep(1000 * item)

for _ in read_ahead(read, range(3), ahead=2, while_waiting=leave):
    pass
"""


def test_a_process_ends_while_a_file_does_not_come():
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "0\n1\n", "")


@pytest.mark.parametrize(("seconds", "reads"), [(1e9, [1, 6, 7]), (0.0, [1, 2, 3, 4, 5, 6, 7])])
def test_numbers_are_read_together_unless_steps_are_slow(
    teacher, teacher_folder, data, tmp_path, monkeypatch, seconds, reads
):
    monkeypatch.setattr("bkd.training.fit.READ_SECONDS", seconds)
    made = make_fit(kd(teacher, teacher_folder), data, tmp_path, max_steps=7, log_every=5, checkpoint_every=100)
    pauses, pause = [], made._pause
    made._pause = lambda done, stop: (pauses.append(done), pause(done, stop))
    run(made)
    assert pauses == reads


def test_weights_of_another_student_are_refused(teacher, teacher_folder, data, tmp_path):
    fit(kd(teacher, teacher_folder), data, tmp_path, max_steps=2)
    with pytest.raises(TrainingError, match=r"do not fit this student(.|\n)*tensors differ, such as "):
        fit(kd(teacher, teacher_folder, "sd-small"), data, tmp_path, max_steps=4)


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
    method = kd(teacher, teacher_folder)
    encode = method._diffusion.captions
    drawn = [one_batch(method, data, step) for step in range(8)]
    embeds = torch.cat([encode(d.captions, d.dropped, None).prompt_embeds for d in drawn])
    with torch.no_grad():
        ids = teacher.tokenizer([""], padding="max_length", return_tensors="pt").input_ids
        empty = teacher.text_encoder(ids)[0]
    dropped = sum(torch.allclose(each, empty[0]) for each in embeds)
    assert dropped == sum(int(d.dropped.sum()) for d in drawn)
    assert 8 <= dropped <= 26  # a quarter of 64


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.1]), ("cosine", [1, 0.5, 0.0245])]
)
def test_learning_rate_schedules(schedule, expected):
    train = Train(lr=1.0, lr_schedule=schedule, warmup_steps=10, max_steps=110)
    assert learning_rate(train, 4) == 0.5
    assert [learning_rate(train, step) for step in (10, 60, 100)] == pytest.approx(expected, abs=1e-3)


def test_metrics_are_rewound_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.write(0, StepReport(step, 5, {"task_loss": 1.0}, {"mid": math.nan}, 1.0, 1e-3, 2.0, 0.1))
    with path.open("a") as stream:
        stream.write('{"stage": 0, "st')  # cut short by a crash
    log.rewind(0, 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert read_metrics(path)[0]["feature_kd_loss/mid"] is None


def test_requests_wait_for_the_end_of_a_step_and_a_second_ctrl_c_does_not():
    with StopSignal() as stop, stop.waiting(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_what_a_signal_breaks_besides_is_a_granted_request(tmp_path):
    """A compiler that the same Ctrl-C has ended, say."""
    run, _ = open_run(tmp_path / "run", load_recipe("shapes/sd-small"))
    with StopSignal() as stop, pytest.raises(Interrupted) as caught, _recorded_end(run, stop), stop.waiting():
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("g++ failed")
    assert str(caught.value.__cause__) == "g++ failed" and run.facts()["status"] == "stopped"
    with StopSignal() as stop, pytest.raises(RuntimeError), _recorded_end(run, stop):
        raise RuntimeError("x" * 100_000)
    assert run.facts()["status"] == "failed" and len(run.facts()["error"]) == 2000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_before_training_requests_are_granted_at_once(number):
    with StopSignal(), pytest.raises(Interrupted):
        os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_zero_snr_has_a_target():
    schedule = NoiseSchedule.from_alphas_cumprod(torch.tensor([0.99, 0.0]), "v_prediction")
    x, noise = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert schedule.target(x, noise, torch.tensor([1])).item() == -1


@pytest.fixture
def tracked(tmp_path):
    """Log four steps of a stage, stop, and continue after step 2."""

    def track(names, number=0):
        stage = TrackedStage(tmp_path, "0a1b", number, {"train.lr": 1e-3})
        for first, value in ((0, 1.0), (2, 7.0)):
            with Trackers(names, stage) as trackers:
                trackers.start(first)
                for step in range(first + 1, 5):
                    terms = {"task_loss": value}, {"mid": value}
                    trackers.log(StepReport(step, 5, *terms, value, 1e-3, math.nan, 0.1))
        return tmp_path

    return track


def test_trackers_get_what_is_logged_and_forget_what_is_repeated(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(("tensorboard",))
    folder = tracked(("tensorboard",), number=1) / "tensorboard"
    for stage in ("00", "01"):  # each has steps of its own
        found = EventAccumulator(str(folder / stage)).Reload()
        assert {"task_loss", "feature_kd_loss/mid", "total", "lr"} <= set(found.Tags()["scalars"])
        assert [(e.step, e.value) for e in found.Scalars("task_loss")] == [(1, 1.0), (2, 1.0), (3, 7.0), (4, 7.0)]


def test_a_run_that_goes_on_is_the_same_to_weights_and_biases(tracked, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["bkd", "data.shards=https://me:hidden-token@host/x.tar"])
    log_in(("wandb",))
    tracked(("wandb",))
    wandb.teardown()  # its process still tidied up
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in written} == {"run-0a1b-00.wandb"}
    assert all(b"feature_kd_loss/mid" in path.read_bytes() for path in written)
    assert not any(b"hidden-token" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_key_that_is_missing_is_said_before_anything_is_done(tmp_path):
    """In a process of its own: W&B reads its settings once."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    code = "from bkd.training.tracking import log_in; log_in(('tensorboard', 'wandb'))"
    asked = subprocess.run(
        [sys.executable, "-c", code],
        env={**known, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert asked.returncode and re.search(r"cannot be used(.|\n)*wandb login(.|\n)*WANDB_MODE=offline", asked.stderr)


def test_a_run_that_failed_is_not_called_finished(tmp_path, monkeypatch):
    ends = []
    run = type("Run", (), {"log": lambda *_, **__: None, "finish": lambda self, exit_code: ends.append(exit_code)})()
    monkeypatch.setattr("accelerate.tracking.WandBTracker.start", lambda self: setattr(self, "run", run))
    for error in (None, ValueError):
        with suppress(ValueError), Trackers(("wandb",), TrackedStage(tmp_path, "0a1b", 0, {})) as trackers:
            trackers.start(0)
            if error:
                raise error
    assert ends == [0, 1]


def test_runs_are_told_apart_wherever_their_folders_are(tmp_path):
    one, other = (RunFolder(tmp_path / name) for name in "ab")
    for folder in (one, other):
        folder.path.mkdir()
        folder.record(status="running")
    name = one.identity()
    assert name and name == one.identity() != other.identity()
    one.path.rename(tmp_path / "moved")
    assert RunFolder(tmp_path / "moved").identity() == name


def test_trackers_that_are_not_installed(tracked, monkeypatch):
    monkeypatch.setattr("bkd.training.tracking.installed_version", lambda name: None)
    assert not list(tracked(("tensorboard",)).iterdir())
    require_trackers(("tensorboard",))
    with pytest.raises(EnvironmentProblem, match=r"wandb is not installed(.|\n)*train\.trackers='\[tensorboard\]'"):
        require_trackers(("tensorboard", "wandb"))
