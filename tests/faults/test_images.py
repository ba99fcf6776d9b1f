"""Images that vanish, and processes that read them and die."""

import os
import random
import shutil
import signal
import time

import pytest
import torch
from PIL import Image
from small_runs import assert_same_bits, go_on, make_trainer

from capszoo.command_line import StopSignal
from capszoo.data import Split, load_data
from capszoo.errors import DataError


def test_images_that_vanish(tmp_path):
    source = tmp_path / "images"
    rng = random.Random(0)
    for part, count in (("train", 20), ("test", 4)):
        for label in ("cat", "dog"):
            (source / part / label).mkdir(parents=True)
            for i in range(count):
                Image.frombytes("L", (24, 24), rng.randbytes(576)).save(source / part / label / f"{i}.png")
    # Read from disk while they are used, as those of a set too large for memory.
    data = load_data(source, max_bytes=0)
    whole = make_trainer((data.train, data.val), tmp_path / "whole")
    assert whole.fit()
    trainer = make_trainer((data.train, data.val), tmp_path / "run")
    trainer.on_epoch = lambda trainer, row: row["epoch"] == 2 and source.rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"\.png'.*No such file"):
        trainer.fit()
    (tmp_path / "away").rename(source)
    assert go_on((data.train, data.val), tmp_path / "run", whole) == (2, 0)

    # In memory, nothing is missed.
    data = load_data(source)
    trainer = make_trainer((data.train, data.val), tmp_path / "memory")
    trainer.on_step = lambda trainer: shutil.rmtree(source, ignore_errors=True)
    assert trainer.fit()
    assert_same_bits(trainer, whole)
    with pytest.raises(DataError, match=f"'{source}'"):
        load_data(source)


class DeadlyReader:
    """Images whose reading kills the process that does it, once a file is there."""

    def __init__(self, images, trap):
        self.images, self.trap, self.main = images, trap, os.getpid()
        self.image_shape = tuple(images.shape[1:])

    def __len__(self):
        return len(self.images)

    def read(self, indices):
        if self.trap.exists() and os.getpid() != self.main:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[torch.as_tensor(list(indices))]


def test_killed_process_that_reads_images(splits, whole, tmp_path):
    train, val = splits
    reader = DeadlyReader(train.images, tmp_path / "trap")
    read = Split(train.labels, reader=reader, indices=torch.arange(len(train)))
    trainer = make_trainer((read, val), tmp_path / "run", num_workers=1)
    trainer.on_epoch = lambda trainer, row: reader.trap.touch()
    with pytest.raises(DataError, match=r"a process that reads images has died .*--workers"):
        trainer.fit()
    reader.trap.unlink()
    assert go_on((read, val), tmp_path / "run", whole) == (1, 0)


class ReaderThatIsStopped(DeadlyReader):
    """The scheduler asks all processes of a job to stop, here while one of them reads."""

    def read(self, indices):
        if self.trap.exists() and os.getpid() != self.main:
            self.trap.unlink()
            for process in (os.getpid(), self.main):
                os.kill(process, signal.SIGTERM)
            time.sleep(0.2)
        return self.images[torch.as_tensor(list(indices))]


def test_signal_to_all_processes_leaves_the_reading_to_end(splits, whole, tmp_path):
    train, val = splits
    reader = ReaderThatIsStopped(train.images, tmp_path / "trap")
    read = Split(train.labels, reader=reader, indices=torch.arange(len(train)))
    with StopSignal() as stop:
        trainer = make_trainer((read, val), tmp_path / "run", num_workers=1, should_stop=stop)
        trainer.on_epoch = lambda trainer, row: reader.trap.touch()
        assert not trainer.fit() and stop.exit_code == 0
    assert go_on((read, val), tmp_path / "run", whole)[0] == 1
