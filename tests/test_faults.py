"""What machines do to a training run. docs/faults.md has a table of these faults; each row names a test."""

import errno
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import capszoo
from capszoo import checkpoint
from capszoo.checkpoint import load_tensors
from capszoo.command_line import StopSignal
from capszoo.data import Split, load_data, seeded_generator
from capszoo.engine import Trainer, watch
from capszoo.engine.options import options_from
from capszoo.engine.run import create_optimizer
from capszoo.engine.run_folder import STATE_FILES
from capszoo.engine.run_state import load_state
from capszoo.engine.task import CapsuleTask
from capszoo.errors import CheckpointError, DataError, TrainingError, UnreadableError, UsageError, WriteError
from capszoo.losses import MarginLoss
from capszoo.policies import create_policy

ROOT = Path(__file__).parents[1]
EPOCHS, STEPS = 3, 4  # of 16 images, 50 in all


@pytest.fixture(scope="module")
def splits():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (70, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (70,), generator=generator)
    return Split(labels[:50], images[:50]), Split(labels[50:], images[50:])


class PoisonedLoss(nn.Module):
    """The margin loss, but for some forward passes of a training, counted from 1."""

    def __init__(self, bad=(), value=float("nan"), gradient_only=False):
        super().__init__()
        self.bad, self.value, self.gradient_only, self.calls = set(bad), value, gradient_only, 0
        self.loss = MarginLoss()

    def forward(self, lengths, target):
        if not torch.is_grad_enabled():  # an evaluation
            return self.loss(lengths, target)
        self.calls += 1
        loss = self.loss(lengths, target)
        if self.calls not in self.bad:
            return loss
        if self.gradient_only:
            lengths.register_hook(lambda gradient: gradient * self.value)
            return loss
        return loss * self.value


def make_trainer(splits, folder, criterion=None, **kwargs):
    train, val = splits
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, img_size=train.image_shape[1:], drop_rate=0.2)
    policy = create_policy("one_cycle", lr=1e-3, batch_size=16, epochs=EPOCHS, num_images=len(train))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    task = CapsuleTask(model, criterion, verbose=False)
    folder.mkdir(exist_ok=True)
    return Trainer(task, optimizer, policy, train, val, folder=folder, translate=2, eval_batch_size=8, **kwargs)


def assert_same_bits(one, other):
    one, other = one.task.model.state_dict(), other.task.model.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory):
    """A run that nothing happened to."""
    trainer = make_trainer(splits, tmp_path_factory.mktemp("whole"))
    assert trainer.fit()
    return trainer


def go_on(splits, folder, whole, **kwargs):
    """Resume, and end with the bits of a run that nothing happened to."""
    trainer = make_trainer(splits, folder, **kwargs)
    assert trainer.resume()
    position = trainer.position.epoch, trainer.position.step
    assert trainer.fit()
    assert_same_bits(trainer, whole)
    assert trainer.position.best_epoch == whole.position.best_epoch
    best, expected = (load_tensors(t.folder / "best.safetensors")[0] for t in (trainer, whole))
    assert all(torch.equal(best[key], expected[key]) for key in expected)
    return position


# SIGKILL

KILLS = textwrap.dedent("""
    # Forks processes that train, kills each at a random moment, and looks at what it left. Prints facts as JSON.
    import json, os, random, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from test_faults import EPOCHS, make_trainer
    from capszoo.checkpoint import load_tensors
    from capszoo.data import Split

    root, kills, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (70, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (70,), generator=generator)
    splits = Split(labels[:50], images[:50]), Split(labels[50:], images[50:])
    begin = time.monotonic()
    whole = make_trainer(splits, root / "whole", save_every=1)
    whole.fit()
    longest = 1.2 * (time.monotonic() - begin)
    expected = load_tensors(root / "whole/last.safetensors")[0]
    facts = {"killed": 0, "finished": 0, "previous": 0, "between": 0}
    run, saved = 0, (0, 0)
    while facts["killed"] < kills:
        folder = root / f"run{run}"
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            trainer = make_trainer(splits, folder, save_every=1)
            trainer.resume()
            save = trainer.save
            def save_and_tell():
                save()
                os.write(writing, b"%d %d\\n" % (trainer.position.epoch, trainer.position.step))
            trainer.save = save_and_tell
            trainer.fit()
            os._exit(0)
        os.close(writing)
        time.sleep(longest * rng.random())
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        lines = b"".join(iter(lambda: os.read(reading, 65536), b"")).decode().split("\\n")[:-1]
        os.close(reading)
        saved = max([saved, *(tuple(map(int, line.split())) for line in lines)])
        for path in folder.glob("[!.]*.safetensors"):
            load_tensors(path)  # what has its own name is whole
        trainer = make_trainer(splits, folder)
        path, state = trainer.run_folder.find_state()
        found = (0, 0) if state is None else (state["position"]["epoch"], state["position"]["step"])
        assert found >= saved, f"{saved} was saved, {found} is found"
        if os.WIFSIGNALED(status):
            facts["killed"] += 1
            facts["previous"] += path is not None and "previous" in path.name
            facts["between"] += bool(list(folder.glob(".*.tmp")))
            continue
        assert status == 0
        trainer.resume()
        last = load_tensors(folder / "last.safetensors")[0]
        assert trainer.position.epoch == EPOCHS and all(torch.equal(last[key], expected[key]) for key in expected)
        facts["finished"] += 1
        run, saved = run + 1, (0, 0)
    print(json.dumps(facts))
""")


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment(kills, tmp_path):
    seed = random.randrange(2**32)
    (tmp_path / "kills.py").write_text(KILLS)
    command = [sys.executable, tmp_path / "kills.py", ROOT / "tests", tmp_path, kills, seed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    facts = json.loads(done.stdout)
    assert facts["killed"] == kills and facts["finished"] > 0, facts
    assert kills < 100 or facts["between"] > 0, "none was killed while it wrote"


# Signals (recipes/train.py receives them in tests/recipes/test_train.py)


def test_asked_to_stop_at_any_moment(splits, whole, tmp_path):
    asked = 0
    while True:
        asked += 1
        calls = iter(range(1, 10_000))
        trainer = make_trainer(splits, tmp_path / str(asked), should_stop=lambda: next(calls) >= asked)  # noqa: B023
        if trainer.fit():
            break
        # After each step and each of the three batches of an evaluation, which is then done anew.
        epochs, asked_in_epoch = divmod(asked - 1, STEPS + 3)
        assert go_on(splits, tmp_path / str(asked), whole) == (epochs, min(STEPS, asked_in_epoch + 1))
    assert asked == EPOCHS * (STEPS + 3) + 1


# Disks


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


# Checkpoints that are damaged


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


# Data


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


# Losses


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_loss_that_is_not_finite(value, splits, whole, tmp_path):
    folder = tmp_path / "run"
    trainer = make_trainer(splits, folder, PoisonedLoss({STEPS + 2}, value))  # evaluations do not count
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    facts = json.loads((folder / "nonfinite.json").read_text())
    assert (facts["epoch"], facts["step"], facts["loss"]) == (2, 2, str(value))
    order = torch.randperm(50, generator=seeded_generator(0, 1, 0))
    assert facts["images"] == order[16:32].tolist()
    first = ", ".join(map(str, facts["images"][:4]))
    assert f"the loss is {value} at step 2 of epoch 2 (lr=" in str(caught.value)
    assert f"training images {first}, ..., see {folder}/nonfinite.json" in str(caught.value)
    assert "the last good checkpoint is that of epoch 2, step 0" in str(caught.value)
    assert "--nonfinite skip" in str(caught.value) and "\n" not in str(caught.value)
    assert go_on(splits, folder, whole) == (1, 0)


def test_gradient_that_is_not_finite_is_never_saved(splits, tmp_path):
    trainer = make_trainer(splits, tmp_path / "run", PoisonedLoss({2}, gradient_only=True), save_every=2)
    with pytest.raises(TrainingError, match="the weights are not finite at step 2 of epoch 1 .*there is no checkpoint"):
        trainer.fit()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["nonfinite.json"]


@pytest.mark.parametrize("gradient_only", [False, True])
def test_steps_that_are_not_finite_can_be_left_out(gradient_only, splits, tmp_path):
    bad = {2, 3, STEPS + 1}
    loss = PoisonedLoss(bad, gradient_only=gradient_only)
    trainer = make_trainer(splits, tmp_path / "run", loss, nonfinite="skip")
    updates = []
    trainer.optimizer.register_step_post_hook(lambda *_: updates.append(loss.calls))
    assert trainer.fit()
    assert updates == [call for call in range(1, EPOCHS * STEPS + 1) if call not in bad]
    assert [row["skipped_steps"] for row in trainer.history] == [2, 1, 0]
    assert all(0 < row["train_loss"] < 10 for row in trainer.history)
    assert "skipped_steps" in (tmp_path / "run/summary.csv").read_text().splitlines()[0]


def test_leaving_out_changes_nothing_else(splits, whole, tmp_path):
    trainer = make_trainer(splits, tmp_path / "run", nonfinite="skip")
    assert trainer.fit()
    assert_same_bits(trainer, whole)


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_steps_in_float16_can_be_left_out(clip_grad, splits, tmp_path):
    trainer = make_trainer(
        splits, tmp_path / "run", PoisonedLoss({2, 3}), amp=torch.float16, nonfinite="skip", clip_grad=clip_grad
    )
    assert trainer.fit()
    assert [row["skipped_steps"] for row in trainer.history] == [2, 0, 0]
    assert trainer.step.scaler.get_scale() == 65536  # the data were at fault


def test_steps_are_not_left_out_for_ever(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_MOST_SKIPPED_IN_A_ROW", 5)
    trainer = make_trainer(splits, tmp_path / "run", PoisonedLoss(range(3, 100)), nonfinite="skip")
    with pytest.raises(TrainingError, match="5 steps one after the other were .*, the last at step 3 of epoch 2"):
        trainer.fit()


def test_float16_that_cannot_hold_the_gradients(splits, tmp_path):
    loss = PoisonedLoss(range(1, 1000), float("inf"), gradient_only=True)
    trainer = make_trainer(splits, tmp_path / "run", loss, amp=torch.float16)
    trainer.policy = create_policy("fixed", lr=1e-3, batch_size=16, epochs=20, num_images=50)
    with pytest.raises(TrainingError, match=r"their scale has fallen to 0.000488281 in epoch 7.*--amp bf16 or none"):
        trainer.fit()


# Clocks


def test_clock_that_jumps(splits, whole, tmp_path, monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 4e9))
    begin = time.perf_counter()
    trainer = make_trainer(splits, tmp_path / "run")
    assert trainer.fit()
    total = time.perf_counter() - begin
    assert all(0 < row["epoch_seconds"] < total for row in trainer.history)
    assert trainer.position.total_seconds < total
    assert_same_bits(trainer, whole)


# Processes of torchrun


def processes_of(parent):
    """Process ids of the ranks that a torchrun has started, by rank."""
    ranks = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                variables = dict(v.partition("=")[::2] for v in (entry / "environ").read_text().split("\0"))
                ranks[int(variables["RANK"])] = int(entry.name)
        except (OSError, KeyError, ValueError):
            continue
    return ranks


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_killed_process_of_torchrun(tmp_path):
    folder = tmp_path / "run"
    options = "--policy fixed --batch-size 64 --amp none --device cpu --epochs 500 --save-every 10".split()
    options += ["--model-kwargs", "conv_dim=8", "num_types=2", "--output", str(folder)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, str(ROOT / "recipes/train.py"), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            wait_for((folder / STATE_FILES[1]).exists, process)
            first = processes_of(process.pid)
            assert sorted(first) == [0, 1]
            os.kill(first[1], signal.SIGKILL)
            wait_for(lambda: "resumed at epoch" in log.read_text(), process)  # both were started again
            before = load_state(folder / STATE_FILES[1])["position"]
            wait_for(lambda: load_state(folder / STATE_FILES[1])["position"] != before, process)
            os.kill(processes_of(process.pid)[1], signal.SIGKILL)
            assert process.wait(120) != 0, "no restart is left"
        finally:
            process.kill()
    assert "another process of this run has died or cannot be reached" in log.read_text()
    assert not list(folder.glob(".*.tmp"))
    state = load_state(folder / STATE_FILES[0])["position"]
    rows = (folder / "summary.csv").read_text().splitlines()[1:]
    assert [row.partition(",")[0] for row in rows] == [str(epoch + 1) for epoch in range(state["epoch"])]
    # One process can take it up.
    text = (folder / "args.yaml").read_text()
    (folder / "args.yaml").write_text(text.replace("epochs: 500", f"epochs: {state['epoch'] + 1}"))
    command = [sys.executable, str(ROOT / "recipes/train.py"), "--resume", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"resumed at epoch {state['epoch'] + 1}" in done.stdout, done.stderr


def stop_processes_of_torchrun(tmp_path, *options, restarts, choose):
    """Start two ranks, send SIGTERM to one of the processes, and return exit code, output and run folder."""
    folder, log = tmp_path / "run", tmp_path / "log"
    options = [*"--policy fixed --amp none --device cpu --model-kwargs conv_dim=8 num_types=2".split(), *options]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(ROOT / "recipes/train.py"), *options, "--output", str(folder)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            wait_for((folder / STATE_FILES[1]).exists, process)
            os.kill(choose(process.pid), signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
    return process.returncode, log.read_text(), folder


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_one_process_of_torchrun_is_asked_to_stop(tmp_path):
    """All stop with it, save, and torchrun does not start them again; with fewer steps an epoch than questions."""
    options = ["--batch-size", "512", "--epochs", "10000"]
    code, text, folder = stop_processes_of_torchrun(
        tmp_path, *options, restarts=1, choose=lambda parent: processes_of(parent)[1]
    )
    assert code == 0 and text.count("stopped and saved") == 1 and "resumed" not in text, text
    assert load_state(folder / STATE_FILES[0])["position"]["epoch"] < 10000


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_torchrun_is_asked_to_stop(tmp_path):
    options = ["--batch-size", "512", "--epochs", "10000"]
    code, text, folder = stop_processes_of_torchrun(tmp_path, *options, restarts=0, choose=lambda parent: parent)
    assert text.count("stopped and saved") == 1, text  # torchrun's own exit code is 1, whatever its processes say


def test_torchrun_goes_on_with_its_own_runs_alone(tmp_path, monkeypatch, recipe):
    """A refused start is started again: that must not make the folder of another run its own."""
    train = recipe("train")
    options = "--policy fixed --amp none --device cpu --batch-size 128 --epochs 1 --quiet".split()
    options += ["--model-kwargs", "conv_dim=8", "num_types=2", "--output", str(tmp_path / "run")]
    assert train.main(options) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UsageError, match="is not empty"):
        train.main(options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before

    for run_id in ("none", "9c5f"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        options[-1] = str(tmp_path / f"own-{run_id}")
        assert train.parse_args(options).resume is None
        assert train.main(options) == 0
        # A change of the machines that take part is none that torchrun counts, but without a name it tells nothing.
        assert train.parse_args(options).resume == (options[-1] if run_id != "none" else None)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert train.parse_args(options).resume == options[-1]
        assert train.parse_args([*options, "--seed", "1"]).resume is None
        assert train.parse_args([*options, "--workers", "1"]).resume == options[-1]


def test_restarts_need_a_folder_that_is_named(monkeypatch, recipe):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="--max-restarts needs --output RUN_DIR"):
        recipe("train").parse_args([])


# The table


def test_table_of_faults_names_tests():
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| .*\| `(test_\w+)`(?:, `(test_\w+)`)? \|$", text, re.MULTILINE)
    named = {name for row in rows for name in row if name}
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) >= 12
    assert [name for name in sorted(named) if f"def {name}(" not in code] == []
