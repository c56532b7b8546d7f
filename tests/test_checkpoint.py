"""Runs that are killed, disks that fill up, bytes that change: a run continues to the same weights or says why not."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bkd.errors import OutputError
from bkd.training.checkpoint import MANIFEST, UNFINISHED, Checkpoint, Checkpoints
from tests.test_data import cached
from tests.training import fit, kd

STEPS, KILLS = 50, 20
SETTINGS = {"max_steps": STEPS, "batch": 2, "checkpoint_every": 1}


def state(step, value=1.0, scaler=None):
    weights = {"w": torch.full((4, 3), value), "b": torch.full((2,), value)}
    optimizer = {"w": {"step": torch.tensor(float(step)), "exp_avg": weights["w"] / 2}}
    return Checkpoint(step, weights, {"w": weights["w"]}, optimizer, scaler or {})


def saved(folder, steps=(1, 2, 3), **settings):
    checkpoints = Checkpoints(folder, **settings)
    for step in steps:
        checkpoints.save(state(step, float(step)))
    return checkpoints


def test_what_is_saved_is_loaded_and_only_the_newest_are_kept(tmp_path):
    checkpoints = saved(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003"]
    assert checkpoints.newest() == 3
    found = checkpoints.load(3)
    assert (
        found.trainable["w"][0, 0] == 3 and found.optimizer["w"]["exp_avg"][0, 0] == 1.5 and found.ema.keys() == {"w"}
    )


@pytest.mark.parametrize("name", ["trainable.safetensors", "ema.safetensors", "optimizer.pt", MANIFEST])
def test_a_changed_byte_anywhere_sends_a_run_back_to_the_checkpoint_before(tmp_path, name):
    saved(tmp_path)
    path = tmp_path / "00000003" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    said = []
    assert Checkpoints(tmp_path, on_damaged=said.append).newest() == 2
    assert len(said) == 1 and said[0].startswith("checkpoint 00000003 is damaged and is left out: ")


def test_a_missing_file_is_damage_and_what_a_crash_left_is_nothing(tmp_path):
    saved(tmp_path)
    (tmp_path / "00000003" / "ema.safetensors").unlink()
    (tmp_path / f"00000004{UNFINISHED}").mkdir()
    (tmp_path / "00000005").mkdir()
    assert Checkpoints(tmp_path).newest() == 2
    saved(tmp_path, steps=(5,))
    assert Checkpoints(tmp_path).newest() == 5 and not list(tmp_path.glob(f"*{UNFINISHED}"))


def test_where_no_checkpoint_is_valid_nothing_starts_over_by_itself(tmp_path):
    saved(tmp_path, steps=(1,))
    (tmp_path / "00000001" / MANIFEST).write_text("{}")
    with pytest.raises(OutputError, match=r"no checkpoint of this run is valid(.|\n)*--overwrite"):
        Checkpoints(tmp_path).newest()


@pytest.mark.parametrize("name", ["plan", "teacher", "data"])
def test_a_checkpoint_of_something_else_is_refused_unless_forced(tmp_path, name):
    identity = {"plan": "a", "teacher": "b", "data": "c"}
    saved(tmp_path, identity=identity)
    other = {**identity, name: "z"}
    with pytest.raises(OutputError, match=rf"made with another {name}(.|\n)*--force"):
        Checkpoints(tmp_path, other).newest()
    assert Checkpoints(tmp_path, other, force=True).newest() == 3
    assert Checkpoints(tmp_path, identity).newest() == 3


@pytest.fixture(scope="module")
def lives():
    """Starts processes that need not import anything, since their parent has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bkd.models.load", "bkd.training.fit", "tests.training", "tests.test_checkpoint"])
    return context


def fill_the_disk(folder, connection):
    """A file-size limit fails as a full disk does: in the middle of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    big = Checkpoint(4, {"w": torch.zeros(100_000)}, {}, {}, {})
    try:
        Checkpoints(folder).save(big)
    except OutputError as error:
        connection.send(str(error))
    except BaseException as error:
        connection.send(repr(error))


def test_a_full_disk_leaves_the_checkpoint_before_usable(lives, tmp_path):
    saved(tmp_path)
    ours, theirs = lives.Pipe()
    process = lives.Process(target=fill_the_disk, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(120)
    message = ours.recv()
    process.join()
    assert "the checkpoint could not be written" in message and "continues after step 3" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003"]
    assert Checkpoints(tmp_path).newest() == 3


def train(latents, folder, connection: Connection):
    """One life of a run."""
    from bkd.data.latent_folder import open_latents
    from bkd.data.latent_set import LatentSet
    from bkd.models.load import load_pipeline
    from bkd.models.locate import locate

    torch.set_num_threads(1)
    pipe = load_pipeline(locate("shapes"))
    data = LatentSet(open_latents(latents), folder)
    connection.send("ready")
    weights = fit(kd(pipe, locate("shapes")), data, folder, **SETTINGS)
    torch.save(weights, folder / "weights.pt")
    connection.send("done")


def live(lives, latents, folder):
    ours, theirs = lives.Pipe()
    process = lives.Process(target=train, args=(latents, folder, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    return process, ours


def test_twenty_kills_change_nothing(teacher, teacher_folder, shards, lives, tmp_path):
    latents = Path(cached(teacher, teacher_folder, shards[0].parent, tmp_path / "latents").name)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    process, connection = live(lives, latents, whole)
    assert connection.recv() == "done"
    process.join()
    rng, during_saves = random.Random(0), 0
    for number in range(KILLS):
        process, connection = live(lives, latents, cut)
        until = time.monotonic() + rng.uniform(0.0, 0.8)
        while time.monotonic() < until:
            time.sleep(0.001)
        while number % 2 and not list(cut.glob(f"*{UNFINISHED}")):  # every other time: in the middle of a save
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        during_saves += bool(list(cut.glob(f"*{UNFINISHED}")))
        assert not (cut / "weights.pt").exists(), "finished too early to be killed twenty times"
    process, connection = live(lives, latents, cut)
    assert connection.recv() == "done"
    process.join()
    expected = torch.load(whole / "weights.pt")
    found = torch.load(cut / "weights.pt")
    assert during_saves >= 5 and all(torch.equal(found[name], expected[name]) for name in expected)
    newest = [load_file(folder / f"{STEPS:08d}" / "trainable.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(newest[0][name], newest[1][name]) for name in newest[0])
    assert json.loads((cut / f"{STEPS:08d}" / MANIFEST).read_text())["step"] == STEPS
    shutil.rmtree(cut)
