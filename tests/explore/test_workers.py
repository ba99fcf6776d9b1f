"""Studies that several workers share, and survive them."""

import json
import subprocess
import sys
import time

import processes
import pytest

import capszoo.explore.worker
from capszoo import checkpoint
from capszoo.explore import ExplorationError, Row, Space

optuna = pytest.importorskip("optuna")

SMALL = {"conv_dim": 8, "num_types": 2, "decoder_dims": [4, 8]}
ROW = {"policy": "fixed", "epochs": 1, "batch_size": 64}


ASK = """
import json, os, sys
import optuna
from capszoo.explore.storage import open_storage
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1], 30, 120, None))
taken = []
print("ready", flush=True)
while not os.path.exists(sys.argv[2]):
    pass
while (trial := study.ask()).user_attrs.get("queued"):
    taken.append(trial.number)
print(json.dumps(taken))
"""


def test_no_trial_is_given_to_two_workers(tmp_path):
    from capszoo.explore.storage import open_storage

    url = f"sqlite:///{tmp_path}/study.db"
    storage = open_storage(url, 30, 120, None)
    study = optuna.create_study(study_name="s", storage=storage, directions=["maximize", "minimize"])
    for _ in range(40):
        study.enqueue_trial({}, user_attrs={"queued": True})
    workers = [processes.start("-c", ASK, url, tmp_path / "go", stderr=None) for _ in range(3)]
    for worker in workers:
        assert worker.stdout.readline() == b"ready\n"
    (tmp_path / "go").touch()
    taken = [json.loads(worker.communicate(timeout=300)[0]) for worker in workers]
    assert sorted(number for numbers in taken for number in numbers) == list(range(40)), taken


def test_the_budgets_end_while_the_test_set_is_measured(digits, tmp_path, monkeypatch, explore):
    rows = [Row("a", ROW), Row("b", ROW)]
    exploration = explore(rows, digits, tmp_path / "study", measure_test=True)
    real = capszoo.explore.worker.measure_test

    def too_late(*args):
        exploration._deadline = time.monotonic()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(capszoo.explore.worker, "measure_test", too_late)
        exploration.run(budget=1000)
    assert [s.state for s in exploration.solutions()] == ["interrupted", "waiting", "waiting"]
    again = explore(rows, digits, tmp_path / "study", measure_test=True)
    assert again.run()
    complete = [s for s in again.solutions() if s.state == "complete"]
    assert sorted(s.name for s in complete) == ["a", "b"] and all(0 <= s.test_top1 <= 1 for s in complete)
    first = next(s for s in complete if s.name == "a")
    assert first.history == exploration.solutions()[0].history, "trained once"
    assert not list(tmp_path.rglob("resume*.safetensors"))


def test_interruptions_are_no_failures(digits, tmp_path, explore):
    rows = [Row("a", {**ROW, "epochs": 300})]
    for _ in range(7):
        explore(rows, digits, tmp_path / "study").run(should_stop=iter([False, False, True, *[True] * 99]).__next__)
    states = [s.state for s in explore(rows, digits, tmp_path / "study").solutions()]
    assert states == ["interrupted"] * 7 + ["waiting"]


def test_a_full_disk_takes_no_trial_from_other_workers(digits, tmp_path, monkeypatch, explore):
    rows = [Row("a", ROW), Row("b", ROW)]
    exploration = explore(rows, digits, tmp_path / "study")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(ExplorationError, match=r"cannot be written \(No space\).*is left to other workers"):
            exploration.run()
    assert explore(rows, digits, tmp_path / "study").run()
    assert sorted(s.name for s in exploration.solutions() if s.state == "complete") == ["a", "b"]


def test_a_worker_that_died_before_it_could_say_who_it_is(digits, tmp_path, explore):
    rows = [Row("a", ROW)]
    exploration = explore(rows, digits, tmp_path / "study", grace=1)
    exploration.study.ask()  # taken, and nothing more
    assert exploration.run(budget=300)
    assert [s.state for s in exploration.solutions()] == ["interrupted", "complete"]


def test_a_trial_that_ends_its_workers_is_left_alone(digits, tmp_path, explore):
    from capszoo.explore.reclaim import retry

    exploration = explore([Row("a", ROW)], digits, tmp_path / "study")
    study = exploration.study
    for epochs in (0, 0, 0, 1, 1, 1, 1):  # once it got through an epoch
        trial = study.ask()
        trial.set_user_attr("history", [[1, 1.0, 0.5]] * epochs)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        retry(study, study.trials[trial.number])
    *died, last = exploration.solutions()
    assert {(s.state, s.reason) for s in died} == {("interrupted", "worker died")} and len(died) == 6
    assert last.state == "failed" and "died 4 times in one epoch: memory may be too small" in last.reason


def test_what_was_put_off_is_searched_after_the_repetitions(digits, tmp_path, explore, small_space):
    exploration = explore(small_space(digits, 1), digits, tmp_path / "study", trials=2, seeds=2)
    exploration.study.set_user_attr("repeating", True)  # as a call leaves it that ended among them
    assert exploration.run(budget=300)
    done = [(s.state, s.repeat_of is None) for s in exploration.solutions() if s.state == "complete"]
    assert done.count(("complete", True)) == 2 and ("complete", False) in done


def test_of_a_repetition_that_two_workers_enqueued_one_is_run(digits, tmp_path, explore, small_space):
    exploration = explore(small_space(digits, 2), digits, tmp_path / "study", trials=1, seeds=2)
    study = exploration.study
    assert exploration.run()
    (own, again) = exploration.solutions()
    assert (again.repeat_of, again.state) == (own.number, "complete")
    exploration._enqueue_again(own, repeat_of=own.number, seed=again.seed, name=own.name)
    exploration._enqueue_again(own, repeat_of=own.number, seed=again.seed + 1, name=own.name)
    assert exploration.run()
    assert [(s.repeat_of, s.seed, s.state) for s in exploration.solutions()[1:]] == [
        (own.number, again.seed, "complete"), (own.number, again.seed + 1, "complete"),
    ]  # fmt: skip
    assert len(study.trials) == 4


def test_processes_are_told_apart():
    from capszoo.explore.reclaim import is_dead, process_identity

    own = process_identity()
    if not own:
        pytest.skip("no /proc here")
    assert not is_dead(own)
    assert is_dead([own[0], own[1], "1"]), "another process with the same number, after a restart of the container"
    assert not is_dead(["another machine or container", own[1], "1"])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as child:
        identity = process_identity(child.pid)
        assert not is_dead(identity)
        child.communicate("\n")
    assert is_dead(identity)


def test_workers_share_the_precisions_of_the_study(digits, tmp_path, explore):
    fixed = {"policy": "fixed", "model_kwargs": SMALL}
    explore(Space("capsnet_tiny", digits, 2, ["bf16", "none"], fixed), digits, tmp_path / "study", trials=2)
    joined = Space("capsnet_tiny", digits, 2, ["none"], fixed)
    explore(joined, digits, tmp_path / "study")
    assert joined.amps == ["bf16", "none"]
    with pytest.raises(ExplorationError, match=r"varies precisions that cpu does not have \(fp16\)"):
        explore(Space("capsnet_tiny", digits, 2, ["fp16", "none"], fixed), digits, tmp_path / "other", trials=2)
