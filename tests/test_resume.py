"""A run that is stopped, at any moment and in any way, goes on as if nothing had happened."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from minimistral.train import TrainConfig, join_documents, train
from training_script import DOCUMENTS, new_model, weights_hash

TOKENS = join_documents(DOCUMENTS)
SCRIPT = Path(__file__).with_name("training_script.py")
STEPS = 12


def settings(folder, **more) -> TrainConfig:
    return TrainConfig(**{"steps": STEPS, "batch_size": 6, "seq_len": 16, "warmup_steps": 3,
                          "save_every": 2, "folder": str(folder) if folder else None} | more)


class Stopped(Exception):
    pass


def stop_at(model, call, action):
    """Do something in the middle of the model's n-th forward pass."""
    calls = iter(range(10 ** 9))

    def hook(*_):
        if next(calls) == call:
            action()
    return model.layers[1].register_forward_hook(hook)


def fail():
    raise Stopped


def run(folder, experts=False, **more):
    model = new_model(experts)
    record = train(model, TOKENS, settings(folder, **more), progress=False)
    return weights_hash(model), record.losses


def saved(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("more", [
    {}, {"optimizer": "muon"}, {"experts": True, "balance": 0.1, "accumulation": 3},
    {"at_starts": True, "dtype": "bfloat16"}], ids=str)
def test_a_run_stopped_again_and_again_ends_with_the_same_bits(tmp_path, more):
    whole = run(None, **more)
    parts = more.get("accumulation", 1)
    for step in (4, 0, 5, 1):                   # after each new beginning: in its last part
        model = new_model(more.get("experts", False))
        stop_at(model, step * parts + parts - 1, fail)
        with pytest.raises(Stopped):
            train(model, TOKENS, settings(tmp_path, **{k: v for k, v in more.items()
                                                       if k != "experts"}), progress=False)
    assert saved(tmp_path)
    assert run(tmp_path, **more) == whole
    assert saved(tmp_path) == [f"step-{n:08d}.safetensors" for n in (STEPS - 2, STEPS)]
    assert run(tmp_path, **more) == whole       # finished: loaded, nothing trained


def test_a_process_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    start = lambda folder: subprocess.Popen(                           # noqa: E731
        [sys.executable, str(SCRIPT), json.dumps([{"steps": 150, "folder": str(folder)}])],
        stdout=subprocess.PIPE, text=True)
    whole = start(tmp_path / "whole").communicate()[0]
    random.seed(0)
    folder, kills = tmp_path / "killed", 0
    while kills < 3:
        before = saved(folder) if folder.exists() else []
        process = start(folder)
        while process.poll() is None and (saved(folder) if folder.exists() else []) == before:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))      # somewhere in a step, or in a save
        process.kill()
        process.communicate()
        kills += 1
    newest = max(name for name in saved(folder) if name.endswith(".safetensors"))
    assert newest < "step-00000150", "the run ended before it was killed: nothing was tested"
    last = start(folder).communicate()[0]
    assert last == whole and json.loads(last)["weights"]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-40], lambda data: b"", lambda data: data[:5],
    lambda data: b"\xff" * 8 + data[8:]], ids=["cut", "empty", "head only", "nonsense"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    whole = run(tmp_path)
    newest = max(tmp_path.iterdir())
    newest.write_bytes(damage(newest.read_bytes()))
    assert run(tmp_path) == whole


def test_what_a_killed_save_left_behind_is_not_a_checkpoint(tmp_path):
    whole = run(tmp_path / "one")
    folder = tmp_path / "two"
    folder.mkdir()
    newest = max((tmp_path / "one").iterdir())
    shutil.copy(newest, folder / f".{newest.name}.1.part")
    assert run(folder) == whole
    assert saved(folder) == saved(tmp_path / "one")                # and does not stay for ever


@pytest.mark.parametrize("more, message", [
    ({"lr": 1e-4}, r"training's lr is 0.0001 here and 0.003 there"),
    ({"steps": 13}, r"training's steps is 13 here and 12 there"),
    ({"betas": (0.9, 0.99)}, r"training's betas"), ({"experts": True}, r"model's moe")])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, more, message):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **more)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_checkpoint_on_another_text_is_refused_and_the_model_left_alone(tmp_path):
    run(tmp_path)
    model = new_model()
    fresh = weights_hash(model)
    with pytest.raises(ValueError, match="another text"):
        train(model, join_documents(DOCUMENTS[1:]), settings(tmp_path), progress=False)
    assert weights_hash(model) == fresh


def test_how_often_to_save_may_change(tmp_path):
    whole = run(None)
    model = new_model()
    stop_at(model, 7, fail)
    with pytest.raises(Stopped):
        train(model, TOKENS, settings(tmp_path, save_every=3), progress=False)
    assert run(tmp_path, save_every=5, eval_every=1) == whole


@pytest.fixture
def interruptible():
    """Python's own answer to an interrupt; a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, interruptible):
    whole = run(None)
    model = new_model()
    stop_at(model, 6, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 7 of 12.*resumes from"):
        train(model, TOKENS, settings(tmp_path, save_every=100), progress=False)
    assert saved(tmp_path) == ["step-00000007.safetensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.isfinite(model(torch.tensor([[1, 20]]))).all()
    assert run(tmp_path, save_every=100) == whole


def test_a_second_interrupt_does_not_wait(tmp_path, interruptible):
    model = new_model()

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    stop_at(model, 6, twice)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(model, TOKENS, settings(tmp_path), progress=False)
    assert not str(stopped.value)
    assert run(tmp_path) == run(None)


@contextmanager
def files_of_at_most(n_bytes):
    """Let this process write no file longer than this, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_saved_and_the_run_goes_on_later(tmp_path):
    whole = run(None)
    model = new_model()
    stop_at(model, 4, fail)
    with pytest.raises(Stopped):
        train(model, TOKENS, settings(tmp_path), progress=False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with files_of_at_most(20_000), pytest.raises(OSError, match="free some disk space"):
        run(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(tmp_path) == whole
