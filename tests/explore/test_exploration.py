"""capszoo.explore.exploration: studies that end, go on, and stop what is hopeless."""

import csv
import itertools
import json
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from capszoo.engine.options import options_from
from capszoo.engine.run import make_model
from capszoo.errors import UsageError
from capszoo.explore import CLOCKS, OBJECTIVES, Exploration, ExplorationError, Row, Space, write_solutions
from capszoo.explore.stopping import why_stop

optuna = pytest.importorskip("optuna")

SMALL = {"conv_dim": 8, "num_types": 2, "decoder_dims": [4, 8]}
ROW = {"policy": "fixed", "epochs": 1, "batch_size": 64}
OPTIONS = {"dataset": "digits", "model": "capsnet_tiny", "model_kwargs": SMALL, "amp": "none"}


def test_without_optuna_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r'^optuna is not installed: pip install "capszoo\[explore\]"$'):
        Exploration([], {}, None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_search_runs_as_many_trials_as_asked(searched):
    exploration, folder = searched
    solutions = exploration.solutions()
    assert len(solutions) == 10 and {s.state for s in solutions} <= {"complete", "stopped"}
    assert solutions[0].name == "baseline" and exploration.baseline() == solutions[0]
    for s in solutions:
        assert s.seconds == pytest.approx(s.history[-1][1]) and s.accuracy == max(point[2] for point in s.history)
        assert (folder / "trials" / f"{s.number:04d}" / "args.yaml").is_file() and s.folder.endswith(f"{s.number:04d}")
        with torch.device("meta"):
            model = make_model(options_from(s.options), exploration.data)
        assert s.parameters == sum(p.numel() for p in model.parameters())
        assert not (folder / "trials" / f"{s.number:04d}" / "resume.safetensors").exists()
    front = exploration.front()
    study = {trial.number for trial in exploration.study.best_trials}
    assert {s.number for s in front} <= study, "Optuna finds the same front"
    assert {s.gains(list(OBJECTIVES)) for s in solutions if s.number in study} == {
        s.gains(list(OBJECTIVES)) for s in front
    }


def test_solutions_as_a_table(searched, tmp_path):
    solutions = searched[0].solutions()
    write_solutions(tmp_path / "trials.csv", solutions)
    with open(tmp_path / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == list(range(10))
    assert float(rows[0]["accuracy"]) == solutions[0].accuracy and rows[0]["policy"] == "fixed"
    assert json.loads(rows[0]["options"]) == solutions[0].options


def test_a_finished_search_has_nothing_left_to_do(searched, digits, explore, small_space):
    exploration, folder = searched
    again = explore(small_space(digits, 99), digits, folder)
    assert again.run() and again.solutions() == exploration.solutions()
    assert again.plan.epochs == 2, "the study's space, not that of the later call"


def test_a_study_for_something_else_is_refused(searched, digits, explore):
    _, folder = searched
    with pytest.raises(ExplorationError, match=r"study 'study' was made for objectives .* not \['accuracy'\]"):
        explore(Space("capsnet_tiny", digits, 2), digits, folder, objectives=["accuracy"])
    with pytest.raises(ExplorationError, match="was made for dataset 'digits', not 'mnist'"):
        Exploration(Space("capsnet_tiny", digits, 2), {**OPTIONS, "dataset": "mnist"}, digits, folder)
    with pytest.raises(ExplorationError, match="was made for grid None"):
        explore([Row("a", ROW)], digits, folder)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"objectives": ["accuracy", "second"]}, "unknown objective 'second', did you mean 'seconds'"),
        ({"objectives": ["seconds", "seconds"]}, "not all different"),
        ({"objectives": []}, "name each once"),
        ({"storage": "postgresql+psycopg://u:secret@127.0.0.1:1/none"}, r"u@127.0.0.1:1/none cannot be used \("),
        ({"storage": "nonsense"}, "storage nonsense cannot be used"),
        ({"storage": "sqlite:////nowhere/at/all.db"}, "cannot be used"),
    ],
)
def test_what_cannot_be_searched(digits, tmp_path, kwargs, expected, explore):
    with pytest.raises(ExplorationError, match=expected) as caught:
        explore(Space("capsnet_tiny", digits, 2), digits, tmp_path, **kwargs)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_search_without_end_or_validation_is_refused(digits, tmp_path, explore):
    with pytest.raises(ExplorationError, match="--budget"):
        explore(Space("capsnet_tiny", digits, 2), digits, tmp_path).run()
    with pytest.raises(ExplorationError, match="--val-fraction"):
        explore(Space("capsnet_tiny", digits, 2), replace(digits, val=None), tmp_path)


def test_a_failing_trial_is_one_line_and_the_rest_goes_on(digits, tmp_path, explore):
    plan = [Row("bad", {**ROW, "lr": 1e30}), Row("good", ROW), Row("wrong", {**ROW, "squash": "none"})]
    exploration = explore(plan, digits, tmp_path)
    assert exploration.run()
    bad, good, wrong = exploration.solutions()
    assert (bad.state, good.state, wrong.state) == ("failed", "complete", "failed")
    assert "loss is" in bad.reason and "unknown squash 'none'" in wrong.reason


def test_a_search_in_which_all_fails_ends(digits, tmp_path, explore):
    space = Space("capsnet_tiny", digits, 1, fixed={"policy": "fixed", "lr": 1e30, "model_kwargs": SMALL})
    with pytest.raises(ExplorationError, match="the first 5 trials failed, the last one since the loss is"):
        explore(space, digits, tmp_path).run(budget=600)


def test_a_grid_runs_every_row_with_every_seed(digits, tmp_path, explore):
    plan = [Row("slow", ROW), Row("fast", {**ROW, "batch_size": 256})]
    exploration = explore(plan, digits, tmp_path, seeds=2, measure_test=True)
    assert exploration.run()
    solutions = exploration.solutions()
    assert [(s.name, s.options["seed"]) for s in solutions] == [("slow", 0), ("fast", 0), ("slow", 1), ("fast", 1)]
    assert all(0 < s.test_top1 <= 1 for s in solutions)
    assert len({s.accuracy for s in solutions}) > 1


def stop_after(steps):
    count = [0]

    def stop():
        count[0] += 1
        return count[0] > steps

    return stop


def test_an_interrupted_trial_goes_on_where_it_was(digits, tmp_path, explore):
    plan = [Row("a", {**ROW, "epochs": 2}), Row("b", {**ROW, "epochs": 2})]
    whole = explore(plan, digits, tmp_path / "whole")
    assert whole.run()
    exploration = explore(plan, digits, tmp_path / "cut")
    # Into the second epoch of the second trial; the loop over trials asks as well.
    assert not exploration.run(should_stop=stop_after(3 * 21 + 5))
    first, second, again = exploration.solutions()
    assert (first.state, second.state, again.state) == ("complete", "interrupted", "waiting")
    seen = []
    resumed = explore(plan, digits, tmp_path / "cut", on_change=lambda t: t and seen.append(len(t.history)))
    assert resumed.run()
    assert seen[0] == 1, "the first epoch is not trained again"
    first_again, _, last = resumed.solutions()
    assert first_again == first and last.state == "complete" and last.folder == second.folder
    assert [s.accuracy for s in whole.solutions()] == [first.accuracy, last.accuracy]
    for name in ("0000", "0001"):
        a, b = (load_file(tmp_path / way / "trials" / name / "last.safetensors") for way in ("whole", "cut"))
        assert all(torch.equal(a[key], b[key]) for key in a), "bit for bit as without the interruption"


def test_the_budget_ends_a_search_in_time(digits, tmp_path, explore, small_space):
    exploration = explore(small_space(digits, 500), digits, tmp_path)
    assert exploration.run(budget=1.5)
    assert exploration.solutions()[0].state in ("interrupted", "stopped")


def test_same_options_are_not_trained_twice(digits, tmp_path, explore):
    fixed = {
        "policy": "fixed", "epochs": 1, "lr": 1e-3, "batch_size": 128, "decoder": False, "num_routing": 1,
        "squash": "exact", "start": "plain", "model_kwargs": {**SMALL, "share_weights": True, "keep_types": 2},
    }  # fmt: skip
    exploration = explore(Space("capsnet_tiny", digits, 1, fixed=fixed), digits, tmp_path)
    assert exploration.run(budget=300)
    assert len(exploration.solutions()) == 1


def trainer_at(epoch, epochs, seconds, accuracy):
    policy = Namespace(epochs=epochs, name="fixed")
    position = Namespace(epoch=epoch, total_seconds=seconds)
    return Namespace(position=position, policy=policy, best={"eval_top1": accuracy})


def test_only_hopeless_trials_are_stopped(searched, solution):
    exploration, _ = searched
    history = [[1, 5.0, 0.5], [2, 10.0, 0.8], [3, 15.0, 0.85], [4, 20.0, 0.9]]
    peers = [solution(n, 0.9, 20.0, 1000, history=history, options={"policy": "fixed"}) for n in range(3)]

    def why(epoch, seconds, accuracy, parameters=1000, peers=peers):
        trial = Namespace(number=9, user_attrs={"parameters": parameters})
        return why_stop(trial, trainer_at(epoch, 4, seconds, accuracy), peers, exploration.objectives)

    assert why(2, 30.0, 0.7).startswith("could at best come near trial")
    assert why(2, 30.0, 0.81) == "", "with the gain of 0.1 that others had from here it would be the most accurate"
    assert why(2, 19.0, 0.7) == "", "it may still be the fastest"
    assert why(2, 30.0, 0.7, parameters=999) == "", "it is the smallest"
    assert why(2, 30.0, 0.7, peers=peers[:2]) == "", "two finished trials say too little"
    others = [replace(peer, options={}) for peer in peers]
    assert why(2, 30.0, 0.7, peers=others) == "", (
        "those of another policy say nothing of what this one gains at its end"
    )


def test_a_study_of_other_rows_or_options_is_refused(digits, tmp_path, explore):
    explore([Row("a", ROW)], digits, tmp_path / "study")
    with pytest.raises(ExplorationError, match="other options of row 'a': choose another"):
        explore([Row("a", {**ROW, "epochs": 2})], digits, tmp_path / "study")
    with pytest.raises(ExplorationError, match="has a row 'a': name its file in --grid, too"):
        explore([Row("b", ROW)], digits, tmp_path / "study")
    with pytest.raises(ExplorationError, match="was made for 1 seeds, not 0: give that many or more"):
        explore([Row("a", ROW)], digits, tmp_path / "study", seeds=0)
    with pytest.raises(ExplorationError, match="was made for clock 'wall', not 'cpu'"):
        explore([Row("a", ROW)], digits, tmp_path / "study", clock="cpu")
    with pytest.raises(ExplorationError, match="was made for grid"):
        explore(Space("capsnet_tiny", digits, 1), digits, tmp_path / "study")


def test_a_grid_takes_more_seeds_and_rows(digits, tmp_path, explore):
    a, b = Row("a", {**ROW, "epochs": 1}), Row("b", {**ROW, "epochs": 1, "batch_size": 256})
    assert explore([a], digits, tmp_path).run()
    more = explore([b, a], digits, tmp_path, seeds=2)
    assert more.run()
    done = {(s.name, s.options["seed"], s.options["batch_size"], s.state) for s in more.solutions()}
    assert done == {(name, seed, size, "complete") for name, size in (("a", 64), ("b", 256)) for seed in (0, 1)}
    assert len(more.solutions()) == 4, "nothing is trained twice"
    again = explore([a, b], digits, tmp_path, seeds=2)
    assert again.run() and len(again.solutions()) == 4
    with pytest.raises(ExplorationError, match="2 seeds, not 1"):
        explore([a, b], digits, tmp_path)


def test_a_worker_without_a_row_leaves_its_trial_to_others(digits, tmp_path, explore):
    rows = [Row(name, {**ROW, "epochs": 1}) for name in "ab"]
    first = explore(rows[:1], digits, tmp_path)
    second = explore(rows, digits, tmp_path)
    with pytest.raises(ExplorationError, match="row 'b' was added by another worker: give this one the same --grid"):
        first.run()
    assert second.run()
    assert [(s.name, s.state) for s in second.solutions()] == [
        ("a", "complete"),
        ("b", "interrupted"),
        ("b", "complete"),
    ]


def test_a_study_that_kept_its_rows_as_parameters_goes_on(digits, tmp_path, explore):
    rows = [Row(name, {**ROW, "epochs": 1}) for name in "ab"]
    new = explore(rows, digits, tmp_path / "new", seeds=2).study
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=url, study_name="study", directions=new.directions)
    study.set_user_attr("facts", {key: value for key, value in new.user_attrs["facts"].items() if key != "rows"})
    for seed in range(2):
        for row in rows:
            study.enqueue_trial({"row": row.name, "seed": seed}, user_attrs={"queued": True})
    study.set_user_attr("queue", 4)
    more = explore(rows, digits, tmp_path, seeds=3)
    assert more.run()
    assert [(s.name, s.options["seed"], s.state) for s in more.solutions()] == [
        (name, seed, "complete") for seed in range(3) for name in "ab"
    ]


def test_a_short_budget_stops_nothing_that_a_long_one_began(digits, tmp_path, explore, small_space):
    def search(**kwargs):
        return explore(small_space(digits, 8), digits, tmp_path / "study", trials=2, **kwargs)

    steps = itertools.count()
    assert not search().run(budget=4000, should_stop=lambda: next(steps) > 40)
    again = search()
    assert again.run(budget=300) and again.study.user_attrs["most_seconds"] == 1000
    assert {s.state for s in again.solutions()} == {"complete", "interrupted"}
    assert again.baseline().name == "baseline"


def test_what_is_good_gets_more_epochs_and_what_is_best_other_seeds(digits, tmp_path, explore, monkeypatch):
    ticks = itertools.count()  # by the steps, and not by what else the machine does
    monkeypatch.setitem(CLOCKS, "wall", lambda: float(next(ticks)))
    space = Space("capsnet_tiny", digits, 3, fixed={"policy": "fixed", "model_kwargs": SMALL})
    known = {**space.queue()[0], "batch_size": 64}
    space.queue = lambda: [known, {**known, "epochs": 1, "lr": 3e-3}]
    exploration = explore(space, digits, tmp_path, trials=2, seeds=2)
    assert exploration.run()
    trials = exploration.study.get_trials(deepcopy=False)
    baseline, short, promoted = trials[:3]
    assert promoted.user_attrs["promoted_from"] == 1 and promoted.params == {**short.params, "epochs": 3}
    assert baseline.user_attrs["name"] == "baseline" and promoted.user_attrs["options"]["lr"] == 3e-3
    solutions = exploration.solutions()
    again = [solution for solution in solutions if solution.repeat_of is not None]
    # The short one is the fastest, and the baseline is repeated in any case.
    assert {0, 1} <= {solution.repeat_of for solution in again} and all(solution.seed == 1 for solution in again)
    for solution in again:
        first = solutions[solution.repeat_of]
        assert {**first.options, "seed": 1} == solution.options
    means = exploration.candidates()
    assert all(solution.runs == 1 and solution.gain.pairs == 1 for solution in means)
    repeated = next(solution for solution in again if solution.repeat_of == 1)
    found = next(solution for solution in means if solution.number == 1)
    assert found.accuracy == repeated.accuracy and found.seed == 0
    assert exploration.baseline().gain.mean == 0
    assert exploration.run() and len(exploration.solutions()) == len(solutions), "all is done"


def test_a_space_that_is_exhausted_is_repeated(digits, tmp_path, explore):
    fixed = {
        "policy": "fixed", "epochs": 1, "lr": 1e-3, "batch_size": 128, "decoder": False, "num_routing": 1,
        "squash": "exact", "start": "plain", "model_kwargs": {**SMALL, "share_weights": True, "keep_types": 2},
    }  # fmt: skip
    exploration = explore(Space("capsnet_tiny", digits, 1, fixed=fixed), digits, tmp_path, seeds=3)
    assert exploration.run(budget=300)
    assert [(s.repeat_of, s.seed, s.state) for s in exploration.solutions()] == [
        (None, 0, "complete"), (0, 1, "complete"), (0, 2, "complete")
    ]  # fmt: skip


@pytest.mark.parametrize("trials", [None, 3])
def test_repetitions_come_before_what_still_waits(digits, tmp_path, explore, small_space, monkeypatch, trials):
    monkeypatch.setattr("capszoo.explore.exploration._SHARE_OF_THE_SEARCH", 0)
    space = small_space(digits, 1)
    known = {**space.queue()[0], "batch_size": 64}
    space.queue = lambda: [known, {**known, "lr": 2e-3}, {**known, "lr": 3e-3}]
    exploration = explore(space, digits, tmp_path, seeds=2, trials=trials)
    assert exploration.run(budget=1000)
    assert [(s.state, s.repeat_of, s.seed) for s in exploration.solutions()] == [
        ("complete", None, 0),
        ("complete", 0, 1),
    ]
    exploration._search_on()
    waiting = [trial for trial in exploration.study.get_trials(deepcopy=False) if trial.state.name == "WAITING"]
    assert [trial.system_attrs["fixed_params"]["lr"] for trial in waiting] == [2e-3, 3e-3], "they go on later"
