"""Processes of torchrun that are killed or asked to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest

from capszoo.engine.run_folder import STATE_FILES
from capszoo.engine.run_state import load_state
from capszoo.errors import UsageError

ROOT = Path(__file__).parents[2]


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
    done = processes.run(ROOT / "recipes/train.py", "--resume", folder)
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_one_process_of_torchrun_is_asked_to_stop(tmp_path):
    """All stop with it, save, and torchrun does not start them again; with fewer steps an epoch than questions."""
    options = ["--batch-size", "512", "--epochs", "10000"]
    code, text, folder = stop_processes_of_torchrun(
        tmp_path, *options, restarts=1, choose=lambda parent: processes_of(parent)[1]
    )
    assert code == 0 and text.count("stopped and saved") == 1 and "resumed" not in text, text
    assert load_state(folder / STATE_FILES[0])["position"]["epoch"] < 10000


@pytest.mark.slow
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
