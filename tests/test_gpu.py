"""What only a CUDA device can show."""

from dataclasses import replace

import pytest
import torch

from bkd.models.load import load_pipeline, place_encoders, training_dtype, use_channels_last
from bkd.models.locate import locate
from tests.test_data import cached
from tests.training import ALONE, kd, make_fit, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def training(teacher, teacher_folder, shards, tmp_path):
    """A training on the device."""
    data = cached(teacher, teacher_folder, shards[0].parent, tmp_path / "latents")
    cuda = torch.device("cuda", 0)

    def make(reports, **settings):
        pipe, dtype = load_pipeline(locate("shapes")), training_dtype(settings["mixed_precision"])
        place_encoders(pipe, dtype, cuda)
        method = kd(pipe, teacher_folder)
        pipe.unet.to(cuda, dtype)
        method.trainable.to(cuda)
        for unet in (method.trainable, method.teacher):
            use_channels_last(unet, None, dtype, cuda)
        return make_fit(
            method, data, tmp_path / "run", reports.append, parallel=replace(ALONE, device=cuda), **settings
        )

    return make


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_learns_in_every_precision(training, precision, compiled):
    reports = []
    run(training(reports, mixed_precision=precision, compile=compiled, max_steps=60))
    good = [report.total for report in reports if not report.trouble]
    assert len(good) > 40 and good[-1] < 0.7 * good[0]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_step_waits_for_nothing(training, precision):
    fit = training([], mixed_precision=precision, max_steps=10)
    with fit._method.watching():
        batches = fit.batches(0)
        for step in range(3):
            fit.update(step, batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(3, 10):
                fit.update(step, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            batches.close()
