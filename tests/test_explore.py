"""capszoo.explore: what is Pareto-optimal, what the space holds, and studies that survive their workers."""

import csv
import itertools
import json
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import capszoo.explore.worker
from capszoo import checkpoint
from capszoo.data import load_data
from capszoo.engine.options import options_from
from capszoo.engine.run import make_model, make_policy, model_arguments
from capszoo.errors import UsageError
from capszoo.explore import (
    OBJECTIVES,
    Exploration,
    ExplorationError,
    Row,
    Solution,
    Space,
    choose,
    compare,
    pareto_front,
    retime,
    seconds_of_an_epoch,
    write_solutions,
)
from capszoo.explore.stopping import why_stop

optuna = pytest.importorskip("optuna")

SMALL = {"conv_dim": 8, "num_types": 2, "decoder_dims": [4, 8]}
OPTIONS = {"dataset": "digits", "model": "capsnet_tiny", "model_kwargs": SMALL, "amp": "none"}
ROW = {"policy": "fixed", "epochs": 1, "batch_size": 64}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "data", val_fraction=0.1)


def solution(number, accuracy=0.9, seconds=10.0, parameters=1000, **kwargs):
    return Solution(number, kwargs.pop("name", "fixed"), kwargs.pop("state", "complete"), accuracy=accuracy,
                    seconds=seconds, parameters=parameters, **kwargs)  # fmt: skip


values = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))


@given(st.lists(values, max_size=25), st.sets(st.sampled_from(list(OBJECTIVES)), min_size=1))
@settings(deadline=None, max_examples=200)
def test_pareto_front_is_what_the_definition_says(points, objectives):
    objectives = sorted(objectives)
    solutions = [solution(n, a / 5, float(s), p) for n, (a, s, p) in enumerate(points)]
    front = pareto_front(solutions, objectives)

    def dominates(a, b):
        pairs = list(zip(a.gains(objectives), b.gains(objectives), strict=True))
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    best = [s for s in solutions if not any(dominates(other, s) for other in solutions)]
    assert {s.gains(objectives) for s in front} == {s.gains(objectives) for s in best}
    assert len({s.gains(objectives) for s in front}) == len(front), "equal solutions have one to stand for them"
    assert [s.gains(objectives)[0] for s in front] == sorted((s.gains(objectives)[0] for s in front), reverse=True)


def test_only_complete_solutions_are_optimal():
    stopped = solution(0, 0.99, 1.0, 10, state="stopped")
    assert pareto_front([stopped, solution(1)]) == [solution(1)] and pareto_front([stopped]) == []


def test_the_three_ways_to_choose():
    baseline = solution(0, 0.990, 100.0, 8000, name="baseline")
    fast = solution(1, 0.990, 40.0, 8000)
    careless = solution(2, 0.970, 5.0, 8000)
    best = solution(3, 0.995, 300.0, 8000)
    small = solution(4, 0.989, 120.0, 500)
    all_of_them = [baseline, fast, careless, best, small, solution(5, 1.0, 0.1, 1, state="failed")]
    assert choose(all_of_them, "fastest", baseline=baseline) == fast
    assert choose(all_of_them, "fastest", max_drop=0.02, baseline=baseline) == careless
    assert choose(all_of_them, "accurate") == best
    assert choose(all_of_them, "accurate", within=100) == fast
    assert choose(all_of_them, "smallest", baseline=baseline).parameters == 8000
    assert choose(all_of_them, "smallest", max_drop=0.001, baseline=baseline) == small
    assert choose(all_of_them, "smallest", loss=0.001, baseline=baseline) == small, "as it was called before"
    assert choose(all_of_them, "fastest") == best, "without a baseline nothing may be lost of the best"
    assert choose(all_of_them, "accurate", within=1) is None and choose([], "fastest") is None
    with pytest.raises(ExplorationError, match="did you mean 'fastest'"):
        choose(all_of_them, "fasttest")


def test_comparison_with_the_baseline_of_the_same_seed():
    def run(number, name, seed, *curve):
        history = [[n + 1, seconds, accuracy] for n, (seconds, accuracy) in enumerate(curve)]
        best = max(history, key=lambda point: (point[2], -point[0]))
        return solution(number, best[2], history[-1][1], 7, name=name, options={"seed": seed}, history=history,
                        best_epoch=best[0], seconds_to_best=best[1], test_top1=best[2] - 0.01)  # fmt: skip

    rows = compare([
        run(0, "baseline", 0, (10, 0.8), (20, 0.9), (30, 0.89)),
        run(1, "quick", 0, (5, 0.85), (8, 0.9), (12, 0.95)),
        run(2, "poor", 0, (5, 0.1), (10, 0.2)),
        run(3, "baseline", 1, (10, 0.8), (20, 0.85), (40, 0.96)),
        run(4, "quick", 1, (5, 0.85), (10, 0.9), (20, 0.97)),
        replace(run(5, "quick", 2, (1, 1.0)), state="failed"),
    ])  # fmt: skip
    assert [row["name"] for row in rows] == ["baseline", "quick", "poor"]
    baseline, quick, poor = rows
    assert baseline["saving"] == 0 and baseline["seconds_to_baseline"] == 30 and baseline["best_epoch"] == 2.5
    assert quick["runs"] == quick["reached"] == 2 and quick["seconds_to_baseline"] == 14
    assert quick["saving"] == pytest.approx((1 - 8 / 20 + 1 - 20 / 40) / 2)
    assert quick["saving_std"] == pytest.approx(0.1 / 2**0.5)
    assert quick["accuracy"] == pytest.approx(0.96) and quick["test_top1"] == pytest.approx(0.95)
    assert quick["epoch_seconds"] == pytest.approx((4 + 20 / 3) / 2)
    assert poor["reached"] == 0 and poor["seconds_to_baseline"] is poor["saving"] is poor["accuracy_std"] is None


def test_times_measured_at_rest_replace_those_of_the_trials():
    history = [[1, 9.0, 0.5], [2, 99.0, 0.9], [3, 999.0, 0.8]]
    options = {"policy": "ada_batch", "epochs": 3, "warm_epochs": 1}
    trial = solution(0, 0.9, 999.0, options=options, history=history, best_epoch=2, seconds_to_best=99.0, images=1000)
    waiting = solution(1, None, None, state="waiting")
    timed, same = retime([trial, waiting], lambda solution, batch_size: {1: 10.0, 16: 2.0}[batch_size])
    assert timed.history == [[1, 10.0, 0.5], [2, 12.0, 0.9], [3, 14.0, 0.8]] and same == waiting
    assert (timed.seconds, timed.seconds_to_best, timed.accuracy) == (14.0, 12.0, 0.9)


def draw(space, count, seed=0):
    study = optuna.create_study(directions=["maximize"] * 3, sampler=optuna.samplers.RandomSampler(seed))
    for point in space.queue():
        study.enqueue_trial(point)
    return [space.suggest(study.ask()) for _ in range(count)]


@pytest.mark.parametrize("name", ["capsnet", "capsnet_ws", "capsnet_pruned", "capsnet_tiny", "cnn_baseline_tiny"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_all_that_the_space_draws_can_be_trained(digits, name):
    space = Space(name, digits, epochs=7, amps=["none", "bf16"])
    policies = set()
    for policy, options in draw(space, 60):
        policies.add(policy)
        args = options_from({"dataset": "digits", **options})
        made = make_policy(args, len(digits.train))
        assert 1 <= made.epochs <= 7 and args.policy == policy
        with torch.device("meta"):
            model = make_model(args, digits)
        if name.startswith("capsnet"):
            assert (model.decoder is not None) == options["decoder"]
            assert len(model.keep_types) in (0, options["model_kwargs"].get("keep_types", 0))
    assert policies == {"fixed", "exp_decay", "one_cycle", "warm_restarts", "ada_batch", "warm_ada_batch"}


def test_first_trial_is_the_unreduced_network_at_one_rate(digits):
    (policy, options), *others = draw(Space("capsnet_ws", digits, epochs=12), 6)
    args = options_from({"dataset": "digits", **options})
    with torch.device("meta"):
        assert sum(p.numel() for p in make_model(args, digits).parameters()) == 8_215_728
    assert (policy, args.lr, args.epochs, args.num_routing, args.squash) == ("fixed", 1e-3, 12, 3, "exact")
    assert [name for name, _ in others] == [
        "exp_decay", "one_cycle", "warm_restarts", "ada_batch", "warm_ada_batch"
    ]  # fmt: skip
    assert others[-1][1]["warm_batch"] == 1 and others[-1][1]["first_batch"] == 16


def test_what_is_fixed_is_not_varied(digits):
    fixed = {"policy": "one_cycle", "epochs": 3, "lr": 0.002, "model_kwargs": {"share_weights": True}, "decoder": False}
    for policy, options in draw(Space("capsnet", digits, epochs=9, fixed=fixed), 10):
        kwargs = options["model_kwargs"]
        assert policy == "one_cycle" and options["epochs"] == 3 and options["lr"] == 0.002
        assert kwargs["share_weights"] is True and options["decoder"] is False and "small_decoder" not in kwargs


def test_an_epoch_is_measured(digits):
    args = options_from({**OPTIONS, **ROW})
    seconds = seconds_of_an_epoch(args, digits, torch.device("cpu"), limit=0.2)
    assert 0 < seconds < 1000
    larger = options_from({**OPTIONS, **ROW, "batch_size": 1, "epochs": 1})
    assert seconds_of_an_epoch(larger, digits, torch.device("cpu"), limit=0.2) > seconds, "64 times the steps"


def explore(plan, digits, folder, **kwargs):
    folder.mkdir(exist_ok=True)
    return Exploration(plan, OPTIONS, digits, folder, **kwargs)


def test_arguments_of_models_that_are_options_too_are_fixed(digits):
    fixed = {"model_kwargs": {**SMALL, "num_routing": 2, "decoder": False}}
    for _, options in draw(Space("capsnet_tiny", digits, epochs=9, fixed=fixed), 4):
        assert (options["num_routing"], options["decoder"]) == (2, False)
        arguments = model_arguments(options_from(options), digits)
        assert (arguments["num_routing"], arguments["decoder"]) == (2, False)
    with pytest.raises(ValueError, match="num_classes=3 contradicts the images of 'digits'"):
        Space("capsnet_tiny", digits, epochs=9, fixed={"model_kwargs": {"num_classes": 3}})
    with pytest.raises(ValueError, match="conv_dim='many' is not possible: give a whole number"):
        Space("capsnet_tiny", digits, epochs=9, fixed={"model_kwargs": {"conv_dim": "many"}})


def small_space(digits, epochs):
    return Space("capsnet_tiny", digits, epochs, fixed={"policy": "fixed", "model_kwargs": SMALL})


@pytest.fixture(scope="module")
def searched(digits, tmp_path_factory):
    """A finished search of ten small trials."""
    folder = tmp_path_factory.mktemp("searched")
    exploration = explore(small_space(digits, 2), digits, folder, trials=10)
    assert exploration.run()
    return exploration, folder


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


def test_a_finished_search_has_nothing_left_to_do(searched, digits):
    exploration, folder = searched
    again = explore(small_space(digits, 99), digits, folder)
    assert again.run() and again.solutions() == exploration.solutions()
    assert again.plan.epochs == 2, "the study's space, not that of the later call"


def test_a_study_for_something_else_is_refused(searched, digits):
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
def test_what_cannot_be_searched(digits, tmp_path, kwargs, expected):
    with pytest.raises(ExplorationError, match=expected) as caught:
        explore(Space("capsnet_tiny", digits, 2), digits, tmp_path, **kwargs)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_search_without_end_or_validation_is_refused(digits, tmp_path):
    with pytest.raises(ExplorationError, match="--budget"):
        explore(Space("capsnet_tiny", digits, 2), digits, tmp_path).run()
    with pytest.raises(ExplorationError, match="--val-fraction"):
        explore(Space("capsnet_tiny", digits, 2), replace(digits, val=None), tmp_path)


def test_a_failing_trial_is_one_line_and_the_rest_goes_on(digits, tmp_path):
    plan = [Row("bad", {**ROW, "lr": 1e30}), Row("good", ROW), Row("wrong", {**ROW, "squash": "none"})]
    exploration = explore(plan, digits, tmp_path)
    assert exploration.run()
    bad, good, wrong = exploration.solutions()
    assert (bad.state, good.state, wrong.state) == ("failed", "complete", "failed")
    assert "loss is" in bad.reason and "unknown squash 'none'" in wrong.reason


def test_a_search_in_which_all_fails_ends(digits, tmp_path):
    space = Space("capsnet_tiny", digits, 1, fixed={"policy": "fixed", "lr": 1e30, "model_kwargs": SMALL})
    with pytest.raises(ExplorationError, match="the first 5 trials failed, the last one since the loss is"):
        explore(space, digits, tmp_path).run(budget=600)


def test_a_grid_runs_every_row_with_every_seed(digits, tmp_path):
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


def test_an_interrupted_trial_goes_on_where_it_was(digits, tmp_path):
    plan = [Row("a", {**ROW, "epochs": 2}), Row("b", {**ROW, "epochs": 2})]
    whole = explore(plan, digits, tmp_path / "whole")
    assert whole.run()
    exploration = explore(plan, digits, tmp_path / "cut")
    # Into the second epoch of the second trial; the loop over trials asks as well.
    assert not exploration.run(should_stop=stop_after(3 * 21 + 5))
    first, second, again = exploration.solutions()
    assert (first.state, second.state, again.state) == ("complete", "failed", "waiting")
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


def test_the_budget_ends_a_search_in_time(digits, tmp_path):
    exploration = explore(small_space(digits, 500), digits, tmp_path)
    assert exploration.run(budget=1.5)
    assert exploration.solutions()[0].state in ("failed", "stopped")


def test_same_options_are_not_trained_twice(digits, tmp_path):
    fixed = {
        "policy": "fixed", "epochs": 1, "lr": 1e-3, "batch_size": 128, "decoder": False, "num_routing": 1,
        "squash": "exact", "model_kwargs": {**SMALL, "share_weights": True, "keep_types": 2},
    }  # fmt: skip
    exploration = explore(Space("capsnet_tiny", digits, 1, fixed=fixed), digits, tmp_path)
    assert exploration.run(budget=300)
    assert len(exploration.solutions()) == 1


def trainer_at(epoch, epochs, seconds, accuracy):
    return Namespace(position=Namespace(epoch=epoch, total_seconds=seconds), policy=Namespace(epochs=epochs),
                     best={"eval_top1": accuracy})  # fmt: skip


def test_only_hopeless_trials_are_stopped(searched):
    exploration, _ = searched
    history = [[1, 5.0, 0.5], [2, 10.0, 0.8], [3, 15.0, 0.85], [4, 20.0, 0.9]]
    peers = [solution(n, 0.9, 20.0, 1000, history=history) for n in range(3)]

    def why(epoch, seconds, accuracy, parameters=1000, peers=peers):
        trial = Namespace(number=9, user_attrs={"parameters": parameters})
        return why_stop(trial, trainer_at(epoch, 4, seconds, accuracy), peers, exploration.objectives)

    assert why(2, 30.0, 0.7).startswith("could at best come near trial")
    assert why(2, 30.0, 0.81) == "", "with the gain of 0.1 that others had from here it would be the most accurate"
    assert why(2, 19.0, 0.7) == "", "it may still be the fastest"
    assert why(2, 30.0, 0.7, parameters=999) == "", "it is the smallest"
    assert why(2, 30.0, 0.7, peers=peers[:2]) == "", "two finished trials say too little"


@pytest.mark.parametrize("values", [{"epoch": 3}, {"epochs": "many"}, {"amp": "bf17"}, {"decoder": 3}])
def test_options_of_a_trial_are_checked(values):
    with pytest.raises(UsageError):
        options_from(values)


# Workers


ASK = """
import json, sys, time
import optuna
from capszoo.explore.storage import open_storage
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1], 30, 120, None))
taken = []
sys.stdout.write("ready\\n"), sys.stdout.flush(), sys.stdin.readline()
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
    command = [sys.executable, "-c", ASK, url]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
    taken = [json.loads(worker.communicate(timeout=300)[0]) for worker in workers]
    assert sorted(number for numbers in taken for number in numbers) == list(range(40)), taken


def test_the_budgets_end_while_the_test_set_is_measured(digits, tmp_path, monkeypatch):
    rows = [Row("a", ROW), Row("b", ROW)]
    exploration = explore(rows, digits, tmp_path / "study", measure_test=True)
    real = capszoo.explore.worker.measure_test

    def too_late(*args):
        exploration._deadline = time.monotonic()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(capszoo.explore.worker, "measure_test", too_late)
        exploration.run(budget=1000)
    assert [s.state for s in exploration.solutions()] == ["failed", "waiting", "waiting"]
    again = explore(rows, digits, tmp_path / "study", measure_test=True)
    assert again.run()
    complete = [s for s in again.solutions() if s.state == "complete"]
    assert sorted(s.name for s in complete) == ["a", "b"] and all(0 <= s.test_top1 <= 1 for s in complete)
    first = next(s for s in complete if s.name == "a")
    assert first.history == exploration.solutions()[0].history, "trained once"
    assert not list(tmp_path.rglob("resume*.safetensors"))


def test_interruptions_are_no_failures(digits, tmp_path):
    rows = [Row("a", {**ROW, "epochs": 300})]
    for _ in range(7):
        explore(rows, digits, tmp_path / "study").run(should_stop=iter([False, False, True, *[True] * 99]).__next__)
    states = [s.state for s in explore(rows, digits, tmp_path / "study").solutions()]
    assert states == ["failed"] * 7 + ["waiting"]


def test_a_full_disk_takes_no_trial_from_other_workers(digits, tmp_path, monkeypatch):
    rows = [Row("a", ROW), Row("b", ROW)]
    exploration = explore(rows, digits, tmp_path / "study")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(ExplorationError, match=r"cannot be written \(No space\).*is left to other workers"):
            exploration.run()
    assert explore(rows, digits, tmp_path / "study").run()
    assert sorted(s.name for s in exploration.solutions() if s.state == "complete") == ["a", "b"]


def test_a_worker_that_died_before_it_could_say_who_it_is(digits, tmp_path):
    rows = [Row("a", ROW)]
    exploration = explore(rows, digits, tmp_path / "study", grace=1)
    exploration.study.ask()  # taken, and nothing more
    assert exploration.run(budget=300)
    assert [s.state for s in exploration.solutions()] == ["failed", "complete"]


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


def test_workers_share_the_precisions_of_the_study(digits, tmp_path):
    fixed = {"policy": "fixed", "model_kwargs": SMALL}
    explore(Space("capsnet_tiny", digits, 2, ["bf16", "none"], fixed), digits, tmp_path / "study", trials=2)
    joined = Space("capsnet_tiny", digits, 2, ["none"], fixed)
    explore(joined, digits, tmp_path / "study")
    assert joined.amps == ["bf16", "none"]
    with pytest.raises(ExplorationError, match=r"varies precisions that cpu does not have \(fp16\)"):
        explore(Space("capsnet_tiny", digits, 2, ["fp16", "none"], fixed), digits, tmp_path / "other", trials=2)


def test_a_study_of_other_rows_or_options_is_refused(digits, tmp_path):
    explore([Row("a", ROW)], digits, tmp_path / "study")
    with pytest.raises(ExplorationError, match="was made with other options or rows"):
        explore([Row("a", {**ROW, "epochs": 2})], digits, tmp_path / "study")
    with pytest.raises(ExplorationError, match="was made for seeds 1, not 4"):
        explore([Row("a", ROW)], digits, tmp_path / "study", seeds=4)


def test_a_short_budget_stops_nothing_that_a_long_one_began(digits, tmp_path):
    def search(**kwargs):
        return explore(small_space(digits, 40), digits, tmp_path / "study", trials=2, **kwargs)

    steps = itertools.count()
    assert not search().run(budget=4000, should_stop=lambda: next(steps) > 40)
    again = search()
    assert again.run(budget=300) and again.study.user_attrs["most_seconds"] == 1000
    assert {s.state for s in again.solutions()} == {"complete", "failed"}, "failed: what was interrupted, and retried"
    assert again.baseline().name == "baseline"
