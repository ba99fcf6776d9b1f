"""Disks that are full, read-only or gone, and checkpoints that are damaged."""

import errno
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import assert_same_bits, go_on, make_trainer

from capszoo import checkpoint
from capszoo.engine.options import options_from
from capszoo.engine.run import create_optimizer
from capszoo.engine.run_folder import STATE_FILES
from capszoo.engine.run_state import load_state
from capszoo.errors import CheckpointError, UnreadableError, WriteError

ROOT = Path(__file__).parents[2]


def test_disk_that_is_full(splits, whole, tmp_path):
    """A real one where that is possible: a file system in memory with room for some checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode
    if mounted != 0:
        pytest.skip("cannot mount a small disk here")
    try:
        ballast = disk / "ballast"

        def fill(trainer):
            if trainer.position.epoch == 1 and not ballast.exists():
                with open(ballast, "wb") as file, pytest.raises(OSError, match="No space left"):
                    while True:
                        os.write(file.fileno(), bytes(1000))

        with pytest.raises(WriteError, match=r"cannot be written \(.*No space left.*there before is kept"):
            make_trainer(splits, disk / "run", on_step=fill).fit()
        assert not list((disk / "run").glob(".*")), "nothing half-written is left"
        assert load_state(disk / "run" / STATE_FILES[0])["position"]["epoch"] == 1
        ballast.unlink()
        assert go_on(splits, disk / "run", whole) == (1, 0)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_file_that_grows_too_large(splits, whole, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_trainer(splits, tmp_path / "run")
    trainer.on_epoch = lambda trainer, row: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(WriteError, match=r"safetensors' cannot be written \(.*File too large"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "run").glob(".*"))
    assert go_on(splits, tmp_path / "run", whole) == (1, 0)


def test_run_folder_that_vanishes(splits, tmp_path):
    trainer = make_trainer(splits, tmp_path / "run")
    trainer.on_epoch = lambda trainer, row: shutil.rmtree(tmp_path / "run")
    with pytest.raises(WriteError, match=r"run/\S+' cannot be written \(No such file or directory\)"):
        trainer.fit()


def test_folder_that_is_read_only(tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    command = [sys.executable, str(ROOT / "recipes/train.py"), "--output", str(folder / "run")]
    if os.geteuid() == 0:  # who may write anywhere, but for this
        if shutil.which("setpriv") is None:
            pytest.skip("root may write into read-only folders")
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    expected = rf"error: run folder '{folder}/run' cannot be made \(Permission denied\): choose another --output\n"
    assert re.fullmatch(expected, done.stderr), done.stderr
    assert list(folder.iterdir()) == []


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "other bits in the length of the header": lambda path: flip(path, 0.0),
    "other bits in the header": lambda path: flip(path, 0.01),
    "other bits in a tensor": lambda path: flip(path, 0.7),
    "other bits at the end": lambda path: flip(path, 0.99999),
    "something else": lambda path: path.write_bytes(b"\x80\x04\x95 a pickle"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint(kind, splits, whole, tmp_path, caplog):
    trainer = make_trainer(splits, tmp_path / "run", save_every=3)
    trainer.should_stop = lambda: trainer.position.epoch == 2 and trainer.position.step == 2
    assert not trainer.fit()
    DAMAGE[kind](tmp_path / "run" / STATE_FILES[0])
    with caplog.at_level(logging.WARNING, "capszoo"):
        assert go_on(splits, tmp_path / "run", whole) == (2, 0)
    assert "going on from the checkpoint before the last" in caplog.text and STATE_FILES[0] in caplog.text

    for name in STATE_FILES:
        DAMAGE[kind](tmp_path / "run" / name)
    with pytest.raises(CheckpointError, match=rf"{STATE_FILES[0]}'.*use another checkpoint"):
        make_trainer(splits, tmp_path / "run").resume()


def test_checkpoint_that_cannot_be_read_for_now(splits, tmp_path, monkeypatch):
    """The one before must not take its place: it may be whole."""
    folder = tmp_path / "run"
    trainer = make_trainer(splits, folder)
    assert trainer.fit()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(path, *args, **kwargs):
        if Path(path).name == STATE_FILES[0]:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "open", fail, raising=False)
    with pytest.raises(UnreadableError, match=r"'.*/resume.safetensors' cannot be read \(Input/output error\)"):
        make_trainer(splits, folder).resume()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "opt", ["adam", "sgd", "adafactorbv", "lamb", "muon", pytest.param("kron", marks=pytest.mark.slow)]
)
def test_every_kind_of_optimizer_goes_on(opt, splits, tmp_path):
    def make(folder, **kwargs):
        trainer = make_trainer(splits, folder, **kwargs)
        trainer.optimizer = create_optimizer(options_from({"opt": opt, "lr": 1e-3}), trainer.task.model)
        return trainer

    one = make(tmp_path / "one")
    assert one.fit()
    other = make(tmp_path / "other")
    other.should_stop = lambda: other.position.epoch == 1 and other.position.step == 2
    assert not other.fit()
    other = make(tmp_path / "other")
    torch.manual_seed(7)
    assert other.resume() and other.fit()
    assert_same_bits(one, other)


def test_best_weights_and_state_that_do_not_agree(splits, whole, tmp_path):
    """A run can end after the state of an epoch and before its best weights, or go back behind them."""
    folder = tmp_path / "run"
    trainer = make_trainer(splits, folder)
    trainer.on_epoch = lambda trainer, row: shutil.copytree(folder, tmp_path / str(row["epoch"]))
    assert trainer.fit()
    best = whole.position.best_epoch
    assert best > 1, "this test needs a second epoch that is better than the first"
    shutil.copy(tmp_path / str(best - 1) / "best.safetensors", tmp_path / str(best) / "best.safetensors")
    go_on(splits, tmp_path / str(best), whole)
    shutil.copy(tmp_path / str(best) / "best.safetensors", tmp_path / "1/best.safetensors")
    go_on(splits, tmp_path / "1", whole)
