"""A small training of the embedded teacher, for tests."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from bkd.cli.app import main
from bkd.environment import process_place
from bkd.methods.base import Diffusion
from bkd.methods.captions import caption_encoder
from bkd.methods.kd import KnowledgeDistillation
from bkd.models.load import load_noise_schedule
from bkd.recipe.schema import Train
from bkd.recipe.stages import Loss
from bkd.rng import StepRng
from bkd.surgery.build import build_student
from bkd.surgery.unet import plan_removal
from bkd.training.checkpoint import Checkpoints
from bkd.training.fit import Events, Fit
from bkd.training.parallel import Parallel
from bkd.training.stop import StopSignal

ALONE = Parallel("alone", process_place(), torch.device("cpu"))


def kd(pipe, folder, preset="sd-tiny", loss=None, sites="block", student=None, **diffusion):
    """Distillation of a preset, or of a student of that preset, from a loaded pipeline."""
    plan = plan_removal(pipe.unet.config, preset)
    known = Diffusion(
        schedule=load_noise_schedule(folder),
        scaling_factor=pipe.vae.config.scaling_factor,
        captions=caption_encoder(pipe),
        prompt_dropout=0.25,
    )
    return KnowledgeDistillation(
        teacher=pipe.unet,
        student=student or build_student(pipe.unet, plan),
        diffusion=replace(known, **diffusion),
        pairs=plan.feature_pairs[sites],
        loss=loss or Loss(),
    )


def make_fit(method, data, folder, on_step=lambda report: None, *, parallel=ALONE, events=None, **settings):
    """Four steps of eight images."""
    train = Train(**{"batch": 8, "lr": 1e-3, "max_steps": 4, "checkpoint_every": 2, "ema": 0.9, **settings})
    return Fit(
        method,
        data,
        train,
        checkpoints=Checkpoints(folder, keep=train.keep_checkpoints),
        parallel=parallel,
        seed=3,
        events=events or Events(step=on_step),
    )


def fit(method, data, folder, on_step=lambda report: None, **settings):
    """Train, and return the weights by name."""
    run(make_fit(method, data, folder, on_step, **settings))
    return {name: p.detach().clone() for name, p in method.trainable.named_parameters()}


def run(made):
    """Train to the end, or until a signal."""
    with StopSignal() as stop:
        made.run(stop)


def one_batch(method, data, step=0):
    """Eight samples, drawn."""
    others = np.arange(8, 16) if method.needs_others else None
    return method.draw(data.gather(np.arange(8), others=others), StepRng(0, step, range(8)))


def loss_of(method, data):
    """The loss of one batch."""
    with method.watching():
        return method.loss(one_batch(method, data))


def train_here(*arguments, code=0):
    """`bkd train` in this process; it must end with that exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bkd", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code
