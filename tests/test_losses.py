"""Loss terms, the forward process and the tap: the algebra the training rests on."""

import pytest
import torch
from torch import nn

from bkd.diffusion.noise_schedule import NoiseSchedule
from bkd.errors import ModelError, ShapeMismatch
from bkd.hooks import FeatureTap
from bkd.losses import LossTerms, feature_kd_losses, output_kd_loss, task_loss

ALPHAS_CUMPROD = torch.linspace(0.999, 0.005, 1000)


def test_equal_inputs_cost_nothing():
    x = torch.randn(2, 4, 8, 8)
    assert task_loss(x, x) == output_kd_loss(x, x) == sum(feature_kd_losses([x, x], [x, x])) == 0


def test_feature_loss_is_the_sum_over_pairs():
    a, b = torch.zeros(2, 3, 4, 4), torch.ones(2, 5, 2, 2)
    assert [each.item() for each in feature_kd_losses([a + 2, b], [a, b - 3])] == pytest.approx([4, 9])


def test_half_precision_is_reduced_in_float32():
    big = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)
    assert task_loss(big, -big).item() == pytest.approx(360_000)


def test_gradients_never_reach_the_teacher():
    student, teacher = torch.randn(1, 2, 2, 2, requires_grad=True), torch.randn(1, 2, 2, 2, requires_grad=True)
    (output_kd_loss(student, teacher) + feature_kd_losses([student], [teacher])[0]).backward()
    assert student.grad is not None and teacher.grad is None


def test_shape_mismatch_names_the_pair_and_both_shapes():
    a = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ShapeMismatch, match=r"feature KD, pair 1: shapes differ\n.*\(1, 2, 2, 2\) and \(1, 2, 4, 4\)"):
        feature_kd_losses([a, a[..., :2, :2]], [a, a])
    with pytest.raises(ShapeMismatch, match="unequal numbers of features"):
        feature_kd_losses([a], [a, a])


def test_a_term_without_weight_is_logged_and_not_trained_on():
    w = torch.ones(1, requires_grad=True)
    terms = LossTerms.weighted({"a": 2 * w.sum(), "b": 5 * w.sum()}, {"a": 0.5, "b": 0.0})
    terms.total.backward()
    assert terms.total.item() == 1 and w.grad.item() == 1 and terms.parts["b"].item() == 5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_targets_rebuild_latents_and_noise(prediction_type):
    schedule = NoiseSchedule.from_alphas_cumprod(ALPHAS_CUMPROD, prediction_type)
    x, noise = torch.randn(2, 8, 4, 4, 4, dtype=torch.float64)
    t = torch.randint(1000, (8,))
    z, target = schedule.add_noise(x, noise, t), schedule.target(x, noise, t)
    alpha, sigma = (table[t].reshape(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
    rebuilt = {
        "epsilon": (z - sigma * target) / alpha,
        "v_prediction": alpha * z - sigma * target,
        "sample": target,
    }[prediction_type]
    assert torch.allclose(rebuilt, x, atol=1e-12)


def test_schedule_agrees_with_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod, "v_prediction")
    x, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 10, 500, 999])
    assert torch.allclose(schedule.add_noise(x, noise, t), scheduler.add_noise(x, noise, t), atol=1e-6)
    assert torch.allclose(schedule.target(x, noise, t), scheduler.get_velocity(x, noise, t), atol=1e-6)


class Tupled(nn.Module):
    def forward(self, x):
        return x + 1, "residuals"


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), Tupled(), nn.Linear(3, 1))


class First(nn.Module):
    """Passes on the first element of a tuple."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model[2](self.model[1](self.model[0](x))[0])


def test_the_tap_reads_in_the_order_of_its_names_and_unpacks_tuples(model):
    net = First(model)
    with FeatureTap(net, ["model.1", "model.0"]) as tap:
        output, (second, first) = tap.run(lambda: net(torch.ones(1, 2)))
    assert torch.equal(second, first + 1) and output.shape == (1, 1)


def test_the_tap_leaves_nothing_behind(model):
    net = First(model)

    def broken():
        net(torch.ones(1, 2))
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), FeatureTap(net, ["model.0"]) as tap:
        tap.run(broken)
    assert not model[0]._forward_hooks and not tap._features


def test_the_tap_records_only_what_is_run_through_it(model):
    net = First(model)
    with FeatureTap(net, ["model.0"]) as tap:
        net(torch.ones(1, 2))  # as gradient checkpointing does in the backward pass
        assert not tap._features
        tap.run(lambda: net(torch.ones(1, 2)))
        assert not tap._features
        with pytest.raises(ModelError, match=r"modules did not run: model\.0"):
            tap.run(lambda: None)


def test_unknown_modules_name_the_nearest(teacher):
    with pytest.raises(ModelError, match=r"no module 'up_block\.3' .*did you mean 'up_blocks\.3'\?"):
        FeatureTap(teacher.unet, ["up_block.3"])
