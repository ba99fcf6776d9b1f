"""Runs that are killed or asked to stop at any moment."""

import json
import os
import random
import re
import time
from pathlib import Path

import processes
import pytest
from small_runs import EPOCHS, STEPS, assert_same_bits, go_on, make_trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment(kills, tmp_path):
    seed = random.randrange(2**32)
    done = processes.run(Path(__file__).with_name("kills.py"), tmp_path, kills, seed, timeout=1800)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    facts = json.loads(done.stdout)
    assert facts["killed"] == kills and facts["finished"] > 0, facts
    assert kills < 100 or facts["between"] > 0, "none was killed while it wrote"


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


def test_table_of_faults_names_tests():
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\| .*\| `(test_\w+)`(?:, `(test_\w+)`)? \|$", text, re.MULTILINE)
    named = {name for row in rows for name in row if name}
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) >= 12
    assert [name for name in sorted(named) if f"def {name}(" not in code] == []
