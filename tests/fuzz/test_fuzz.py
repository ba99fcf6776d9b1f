"""Hostile files: whatever bytes a loader is given, it returns or says in one line what is wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
from loaders import LOADERS

# Cases of the nightly run: more where a case takes little, and where a file comes from strangers.
NIGHTLY = {
    "checkpoint": 30_000,
    "state": 25_000,
    "model": 8_000,
    "folder": 3_000,
    "pretrained": 3_000,
    "table": 10_000,
    "config": 3_000,
    "resume": 1_000,
    "key_value": 8_000,
    "results": 5_000,
    "card": 2_000,
    "recipe": 1_000,
    "pruning": 1_000,
    "timings": 300,
    "mnist": 3_000,
    "cifar": 500,
    "cifar_binary": 1_000,
    "norb": 3_000,
    "images": 10_000,
    "labels": 5_000,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_fuzz(loader):
    outcomes, _ = harness.fuzz(loader, 60)
    assert outcomes.total() == 60 and outcomes.keys() - {"result"}


@pytest.mark.slow
def test_nightly(tmp_path):
    """At least 100,000 cases, each loader in a process of its own, one after the other."""
    number = int(time.time()) // 86_400  # other cases each day; the number is in the output
    total = 0
    for loader, count in NIGHTLY.items():
        command = [sys.executable, harness.__file__, loader, str(count), str(number)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        total += json.loads(done.stdout.splitlines()[-1])["cases"]
        print(done.stdout.splitlines()[-1])
    assert total >= 100_000


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_atheris(loader, tmp_path):
    """Cases that reach new branches breed others; see fuzz_atheris.py."""
    pytest.importorskip("atheris")
    command = [sys.executable, str(Path(__file__).with_name("fuzz_atheris.py")), loader, "-runs=2000", "-seed=1"]
    # libFuzzer ends the process where it stands, and leaves its folders.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Done 2000 runs" in done.stderr
