"""recipes/gpu_round.sh tried without a GPU, in a Python where capszoo is not installed."""

import gzip
import json
import os
import struct
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bare_python(tmp_path):
    """A Python with all that capszoo needs, and without it: a path file does not bring the editable installation."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    # Other path files on sys.path, such as those of a virtual environment on top of another, are followed too.
    paths = [sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))]
    Path(site, "others.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [python, "-c", "import capszoo"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    if found.returncode == 0:
        pytest.skip("capszoo is installed as a copy here")
    assert "No module named 'capszoo'" in found.stderr
    return python


def write_gzipped_mnist(folder):
    raw, rng = folder / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for prefix, count in (("train", 200), ("t10k", 60)):
        images = struct.pack(">4i", 0x803, count, 28, 28) + rng.integers(0, 256, count * 784, dtype=np.uint8).tobytes()
        labels = struct.pack(">2i", 0x801, count) + (np.arange(count) % 10).astype(np.uint8).tobytes()
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            with gzip.open(raw / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(content)


def run(python, out, data, **settings):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHON": str(python), "DEVICE": "cpu", **settings}
    command = ["bash", str(ROOT / "recipes" / "gpu_round.sh"), str(out), str(data)]
    return subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part(bare_python, tmp_path):
    write_gzipped_mnist(tmp_path / "data")
    result = run(bare_python, tmp_path / "out", tmp_path / "data", ROUND_SECONDS="400")
    assert result.returncode == 0, result.stdout + result.stderr
    tables = [f"benchmark-{name}" for name in ("main", "families", "layers")]
    for part in ("tests", "worker0", "rows", "training", *tables):
        assert f"{part}: exit code 0" in result.stdout
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["best.safetensors.00", "round.tar.gz"]
    with tarfile.open(tmp_path / "out" / "round.tar.gz") as archive:
        names = set(archive.getnames())
        assert json.load(archive.extractfile("round/mnist/result.json"))["epochs"] == 1
    for name in ("versions.txt", "parts.txt", "tests.log", "training.txt", "paper-mnist.csv"):
        assert f"round/{name}" in names
    assert {f"round/{table}.csv" for table in tables} <= names
    assert any(name.endswith(".png") for name in names) and not any(name.endswith(".safetensors") for name in names)
    assert not list(tmp_path.glob("data/MNIST/raw/*-ubyte"))  # unpacked elsewhere


def test_a_round_without_time_or_data_leaves_its_versions_behind(bare_python, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "best.safetensors.03").write_bytes(b"of an earlier round")
    result = run(bare_python, tmp_path / "out", tmp_path / "nothing", ROUND_SECONDS="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("torch ")
    for part in ("benchmark-main", "tests", "benchmark-families"):
        assert f"{part}: left out, no time" in result.stdout
    assert "training: left out, no MNIST" in result.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["round.tar.gz"]
    with tarfile.open(tmp_path / "out" / "round.tar.gz") as archive:
        assert {"round/versions.txt", "round/parts.txt"} <= set(archive.getnames())


def test_a_part_that_ends_badly_is_shown_at_once(tmp_path, monkeypatch, capsys):
    from capszoo.recipes import gpu_round

    monkeypatch.setenv("DEVICE", "cpu")
    (tmp_path / "work").mkdir()
    round = gpu_round.Round(tmp_path, tmp_path, tmp_path / "work")
    round.alone("quick", 1.0, "-c", "import sys; print('first'); sys.exit('the reason')")
    round.alone("slow", 10.5 / round.total + 5 / round.total, "-c", "import time; time.sleep(60)")
    out = capsys.readouterr().out
    assert "quick: exit code 1" in out and "the reason" in out and round.failed
    assert "slow: cut off" in out
    with tarfile.open(tmp_path / "round.tar.gz") as archive:
        assert {"round/quick.log", "round/slow.log", "round/parts.txt"} <= set(archive.getnames())


def test_a_worker_gives_way_to_a_long_training(tmp_path, monkeypatch):
    from capszoo.recipes import gpu_round

    class Fake:
        code, stopped = None, False

        def pause(self, stopped):
            self.stopped = stopped

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock, workers, seen = Clock(), [Fake(), Fake()], []
    monkeypatch.setattr(gpu_round, "time", clock)
    monkeypatch.setenv("DEVICE", "cuda")
    round = object.__new__(gpu_round.Round)
    round.start, round.total, round.work = 0.0, 900.0, tmp_path
    (tmp_path / "cifar10").mkdir()
    for seconds, epochs, expected in ((10, 1, 0), (70, 4, 1), (90, 5, 1), (130, 7, 2), (150, 10, 2), (180, 25, 1)):
        clock.now = seconds
        (tmp_path / "cifar10" / "summary.csv").write_text("epoch\n" + "1\n" * epochs)
        gpu_round.give_way(round, workers, seen)
        assert sum(worker.stopped for worker in workers) == expected, (seconds, epochs)


def test_without_a_gpu_it_says_so(bare_python, tmp_path):
    result = run(bare_python, tmp_path / "out", tmp_path, DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and "needs a CUDA GPU" in result.stderr
