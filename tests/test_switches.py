"""Every switch of a training recipe, on the embedded model."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from bkd.data.order import other_places, share
from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.errors import DataError, EnvironmentProblem, RecipeError, ShapeMismatch, TrainingError
from bkd.eval.pictures import with_unet
from bkd.losses import feature_kd_losses, task_loss
from bkd.models.load import use_channels_last
from bkd.recipe.schema import Train
from bkd.recipe.stages import Loss
from bkd.rng import StepRng
from bkd.surgery.plan import FeaturePair
from bkd.surgery.sites import check_pairs
from bkd.surgery.unet import plan_removal
from bkd.training.checkpoint import Checkpoints
from bkd.training.fit import running_out_of_memory
from tests.test_data import cached
from tests.training import fit, kd, loss_of, one_batch

TWO_LEVELS = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
}


@pytest.fixture(scope="module")
def data(teacher, teacher_folder, shards, tmp_path_factory):
    return cached(teacher, teacher_folder, shards[0].parent, tmp_path_factory.mktemp("latents"))


@pytest.fixture
def trained(teacher, teacher_folder, data, tmp_path):
    """Train with settings of the recipe and of the method: weights, reports."""

    def run(name="run", method=None, **settings):
        reports = []
        made = kd(teacher, teacher_folder, **(method or {}))
        return fit(made, data, tmp_path / name, reports.append, **settings), reports

    return run


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-8bit"])
def test_optimizers_learn_and_continue_exactly(trained, optimizer):
    lr = 0.3 if optimizer == "sgd" else 1e-3
    settings = {"optimizer": optimizer, "lr": lr, "checkpoint_every": 3, "log_every": 1}
    whole, reports = trained("whole", max_steps=6, **settings)
    assert reports[-1].total < reports[0].total
    trained("cut", max_steps=3, **settings)
    continued, later = trained("cut", max_steps=6, **settings)
    assert [report.step for report in later] == [4, 5, 6]
    assert all(torch.equal(continued[name], whole[name]) for name in whole)


def test_eight_bit_moments_say_what_is_missing(trained, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentProblem, match=r"needs bitsandbytes(.|\n)*bkd\[8bit\]"):
        trained(optimizer="adamw-8bit")


@pytest.mark.parametrize(
    "settings",
    [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}, {"channels_last": True}, {"grad_accum": 4}],
)
def test_switches_that_save_memory_or_time_train_the_same(trained, teacher, settings):
    _, reports = trained("plain", max_steps=2, log_every=1)
    found, others = trained("switched", max_steps=2, log_every=1, **settings)
    precise = "mixed_precision" not in settings
    for one, other in zip(reports, others, strict=True):
        assert other.total == pytest.approx(one.total, rel=1e-4 if precise else 0.1)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


@pytest.fixture
def traced(monkeypatch):
    """Compiled without code generation, which takes minutes: hooks and graphs are what could go wrong."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_(module, backend="aot_eager"))
    torch.compiler.reset()


def require_same_reports(plain, others, tolerance=1e-4):
    for one, other in zip(plain, others, strict=True):
        assert other.sites.keys() == one.sites.keys() and other.sites
        assert list(other.sites.values()) == pytest.approx(list(one.sites.values()), rel=tolerance)
        assert other.total == pytest.approx(one.total, rel=tolerance)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=10 * tolerance)


@pytest.mark.usefixtures("traced")
def test_compiled_networks_compute_the_same(trained):
    """Also those of a second training, with other hooks and another precision."""
    for sites, precision, tolerance in (("block", "no", 1e-4), ("self-attn", "bf16", 0.02)):
        settings = {"max_steps": 2, "log_every": 1, "batch": 2, "mixed_precision": precision}
        _, plain = trained(f"plain {sites}", {"sites": sites}, **settings)
        _, compiled = trained(f"compiled {sites}", {"sites": sites}, compile=True, **settings)
        require_same_reports(plain, compiled, tolerance)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("sites", "checkpointing"), [("layer", False), ("self-attn", True)])
def test_every_site_is_seen_in_compiled_and_recomputed_networks(
    teacher, teacher_folder, data, tmp_path, sites, checkpointing
):
    unet = UNet2DConditionModel.from_config(TWO_LEVELS).requires_grad_(False).eval()
    reports = {False: [], True: []}
    for compiled, found in reports.items():
        torch.manual_seed(0)
        method = kd(with_unet(teacher, unet), teacher_folder, "mid", sites=sites)
        settings = {"max_steps": 2, "log_every": 1, "gradient_checkpointing": checkpointing and compiled}
        fit(method, data, tmp_path / str(compiled), found.append, compile=compiled, **settings)
    require_same_reports(reports[False], reports[True])


@pytest.mark.slow
def test_compiled_networks_with_generated_code(trained):
    """And where graphs break at sites inside recomputed layers, code of modules with other hooks is not taken."""
    settings = {"max_steps": 2, "log_every": 1, "batch": 2, "gradient_checkpointing": True}
    _, plain = trained("plain", {"sites": "self-attn"}, **settings)
    _, compiled = trained("compiled", {"sites": "self-attn"}, compile=True, **settings)
    require_same_reports(plain, compiled)


def test_convolution_weights_are_laid_out_where_it_pays(teacher_folder, teacher):
    student = kd(teacher, teacher_folder).trainable
    weight = student.down_blocks[0].resnets[0].conv1.weight
    use_channels_last(student, None, torch.bfloat16, torch.device("cpu"))
    assert weight.is_contiguous()
    use_channels_last(student, True, torch.float32, torch.device("cpu"))
    assert student.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_step_without_a_finite_gradient_changes_nothing(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder)
    real, before, reports = method.loss, {}, []

    def spoilt(drawn):
        terms = real(drawn)
        step = len(before)
        before[step] = {name: p.detach().clone() for name, p in method.trainable.named_parameters()}
        return type(terms)(terms.total * math.inf, terms.parts, terms.sites) if step == 1 else terms

    method.loss = spoilt
    fit(method, data, tmp_path, reports.append, max_steps=3, log_every=1)
    assert [bool(report.trouble) for report in reports] == [False, True, False]
    assert all(torch.equal(before[2][name], before[1][name]) for name in before[1])
    assert not all(torch.equal(before[1][name], before[0][name]) for name in before[1])


def test_the_term_and_the_site_are_named_and_too_many_end_the_run(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder)
    before = method.trainable.conv_in.weight.detach().clone()
    method.trainable.up_blocks[1].register_forward_hook(lambda module, inputs, output: output * math.inf)
    with pytest.raises(TrainingError) as refused:
        fit(method, data, tmp_path, max_steps=50, max_skipped_steps=3, checkpoint_every=1)
    message = str(refused.value)
    assert "task_loss, output_kd_loss, feature_kd_loss at up_blocks.1, up_blocks.2 not finite" in message
    assert "3 steps in a row" in message and "--force" in message
    assert torch.equal(method.trainable.conv_in.weight, before)
    assert Checkpoints(tmp_path).newest() is None  # the weights may be what is wrong


def test_a_gradient_alone_that_is_not_finite_names_its_parameters(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder)
    method.trainable.conv_out.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match=r"the gradient of conv_out\.weight not finite"):
        fit(method, data, tmp_path, max_skipped_steps=1)


def test_balanced_features_weigh_by_the_teachers_power():
    teacher = [torch.full((2, 3, 4, 4), 10.0), torch.full((2, 5), 0.1)]
    student = [each * 1.5 for each in teacher]
    plain, balanced = feature_kd_losses(student, teacher), feature_kd_losses(student, teacher, balanced=True)
    assert plain[0] > 1000 * plain[1]
    assert [each.item() for each in balanced] == pytest.approx([0.25, 0.25])
    nothing = feature_kd_losses([torch.zeros(2, 5)], [teacher[1]], balanced=True)
    assert nothing[0].item() == pytest.approx(1)


def test_balancing_changes_the_feature_term_only(teacher, teacher_folder, data):
    plain = loss_of(kd(teacher, teacher_folder), data)
    balanced = loss_of(kd(teacher, teacher_folder, loss=Loss(balancing="teacher-power")), data)
    for name in ("task_loss", "output_kd_loss"):
        assert balanced.parts[name] == plain.parts[name]
    assert balanced.parts["feature_kd_loss"] < plain.parts["feature_kd_loss"]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_clean_latents(kind):
    """Whatever is predicted: min(SNR, gamma) times the squared error of x."""
    alphas_cumprod = torch.linspace(0.9999, 0.004, 100, dtype=torch.float64)
    schedule = NoiseSchedule.from_alphas_cumprod(alphas_cumprod, kind)
    timesteps = torch.arange(100)
    alpha, sigma = schedule.alphas, schedule.sigmas
    error_of_x = {"epsilon": sigma / alpha, "v_prediction": sigma, "sample": torch.ones(100)}[kind]
    expected = torch.clamp((alpha / sigma) ** 2, max=5.0) * error_of_x**2
    assert torch.allclose(schedule.min_snr_weight(timesteps, 5.0).double(), expected, rtol=1e-5)


def test_min_snr_touches_the_task_term_only(teacher, teacher_folder, data):
    plain, weighted = (loss_of(kd(teacher, teacher_folder, min_snr_gamma=g), data).parts for g in (0.0, 5.0))
    assert weighted["task_loss"] != plain["task_loss"]
    assert all(weighted[name] == plain[name] for name in ("output_kd_loss", "feature_kd_loss"))


def test_weights_of_samples_are_those_of_their_errors():
    prediction, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    weights = torch.tensor([0.0, 1.0, 2.0])
    errors = (prediction - target).square().mean((1, 2, 3))
    assert task_loss(prediction, target, weights).item() == pytest.approx(float((weights * errors).mean()))


def test_random_conditioning_swaps_captions_where_there_is_noise(teacher, teacher_folder, data):
    method = kd(teacher, teacher_folder, random_conditioning=True, prompt_dropout=0.0)
    counts = {False: [0, 0], True: [0, 0]}
    for step in range(60):
        drawn = one_batch(method, data, step)
        for own, told, t, weight in zip(
            data.gather(torch.arange(8).numpy()).captions.token_ids,
            drawn.captions.token_ids,
            drawn.timesteps,
            drawn.task_weights,
            strict=True,
        ):
            swapped = weight == 0  # the image is not what the caption asks for
            assert swapped or torch.equal(own, told)
            counts[bool(t >= 800)][0] += int(swapped)
            counts[bool(t >= 800)][1] += 1
    # p(t) averages 0.126 below 800 of 1000 and 0.632 above.
    assert counts[False][0] / counts[False][1] == pytest.approx(0.116, abs=0.07)
    assert counts[True][0] / counts[True][1] == pytest.approx(0.632, abs=0.15)


def test_other_captions_are_those_of_the_same_step_whoever_holds_them():
    positions = share(8, parts=1, part=0)
    whole = other_places(positions, 8, StepRng(0, 5, range(8)))
    halves = [other_places(share(8, parts=2, part=p), 8, StepRng(0, 5, range(4 * p, 4 * p + 4))) for p in (0, 1)]
    assert [*halves[0], *halves[1]] == list(whole) and not any(whole == positions)


def test_features_alone_leave_the_rest_of_the_student_untouched(teacher, teacher_folder, data, tmp_path):
    method = kd(teacher, teacher_folder, loss=Loss(task=0.0, output_kd=0.0))
    before = {name: p.detach().clone() for name, p in method.trainable.named_parameters()}
    after = fit(method, data, tmp_path)
    assert torch.equal(after["conv_out.weight"], before["conv_out.weight"])
    assert not torch.equal(after["conv_in.weight"], before["conv_in.weight"])


def test_pairs_that_do_not_fit_are_found_before_anything_is_loaded(teacher):
    plan = plan_removal(teacher.unet.config, "sd-tiny")
    with pytest.raises(ShapeMismatch, match=r"down_blocks\.0 \(teacher\) and down_blocks\.1 \(student\)"):
        check_pairs(teacher.unet.config, plan, [FeaturePair("down_blocks.0", "down_blocks.1")])


def test_memory_that_runs_out_becomes_advice():
    advice = r"64 images in 2 passes(.|\n)*grad_accum=4"
    with pytest.raises(TrainingError, match=advice), running_out_of_memory(Train(batch=64, grad_accum=2)):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="something else"), running_out_of_memory(Train()):
        raise RuntimeError("something else")


def test_too_few_samples_and_odd_numbers_of_processes_are_refused(teacher, teacher_folder, data, tmp_path):
    with pytest.raises(DataError, match=r"96 samples, train\.batch=128(.|\n)*train\.batch=96"):
        fit(kd(teacher, teacher_folder), data, tmp_path, batch=128)
    with pytest.raises(RecipeError, match=r"32 images for 3 parts(.|\n)*train\.batch=33"):
        share(32, parts=3, part=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.batch=4096"], "fewer samples than one step takes"),
        (["stages.0.method.random_conditioning=true", "train.batch=1"], "a batch of 1 has no other captions"),
        (["train.parallel=fsdp2", "train.optimizer=adamw-8bit"], "adamw-8bit does not know shards"),
        (["stages.0.method.sites=layers"], "should be 'block', 'bk', 'layer' or 'self-attn'"),
        (["train.optimizer=lion"], "should be 'adamw', 'adamw-8bit' or 'sgd'"),
    ],
)
def test_recipes_that_cannot_be_trained_are_refused_before_they_start(bkd_refuses, shards, settings, message):
    bkd_refuses(["train", "shapes/sd-tiny", f"data.shards={shards[0].parent}", *settings], message)


def test_a_batch_that_the_processes_cannot_share_is_refused(bkd_refuses, shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = ["train", "shapes/sd-tiny", f"data.shards={shards[0].parent}"]
    bkd_refuses(arguments, "32 images for 3 parts (processes times train.grad_accum)")
