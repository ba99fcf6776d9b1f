"""capszoo.explore.cautions: when a budget was too small to compare what it trained."""

from dataclasses import replace

import pytest

from capszoo.explore import cautions
from capszoo.explore.caution import RANDOM_TRIALS


@pytest.fixture
def run(solution):
    numbers = iter(range(1000))

    def run(name="fixed", accuracy=0.99, epochs=4, best=None, policy=None, **options):
        best = best or epochs - 1
        history = [[epoch, 10.0 * epoch, accuracy - 0.01 * abs(best - epoch)] for epoch in range(1, epochs + 1)]
        options = {"policy": policy or name, "epochs": epochs, **options}
        return solution(next(numbers), accuracy, 10.0 * epochs, 7, name=name, options=options, history=history,
                        best_epoch=best, images=1000)  # fmt: skip

    return run


def test_nothing_speaks_against_a_large_search(run):
    trials = [run(accuracy=0.9 + 0.001 * n) for n in range(RANDOM_TRIALS)]
    assert cautions([*trials, run("one_cycle", 0.99)], 10_000, searched=True) == []
    assert cautions([], 10_000, searched=True) == []


def test_few_trials_are_random(run):
    trials = [run() for _ in range(RANDOM_TRIALS - 1)]
    (line,) = cautions(trials, 100, searched=True)
    assert line.startswith("9 trials are complete: the search begins to learn from them at 10")
    assert cautions(trials, 100, searched=False) == []
    assert cautions([*trials, run()], 100, searched=True) == []
    again = [replace(run(), repeat_of=trials[0].number) for _ in range(9)]
    (line,) = cautions([*trials, *again], 100, searched=True, seeds=2)
    assert line.startswith("9 trials are complete"), "with repetitions nothing more was searched"


def test_the_sampler_begins_to_learn_there(tmp_path):
    optuna = pytest.importorskip("optuna")
    assert optuna.samplers.TPESampler()._n_startup_trials == RANDOM_TRIALS


@pytest.mark.parametrize(
    ("policy", "epochs", "options", "begun"),
    [
        ("fixed", 2, {}, True),
        ("one_cycle", 2, {}, True),
        ("exp_decay", 2, {}, False),  # 16 steps of a decay every 2000
        ("exp_decay", 2, {"decay_steps": 10}, True),
        ("warm_restarts", 4, {}, False),  # one cycle of all epochs
        ("warm_restarts", 4, {"cycle_epochs": 2}, True),
        ("ada_batch", 4, {"warm_epochs": 3, "grow_every": 30}, True),
        ("ada_batch", 4, {"warm_epochs": 0}, False),
        ("ada_batch", 31, {"warm_epochs": 0}, True),
        ("warm_ada_batch", 4, {}, True),
    ],
)
def test_schedules_need_epochs(run, policy, epochs, options, begun):
    lines = cautions([run(policy, epochs=epochs, **options)], 10_000, searched=False)
    assert bool(lines) == (not begun)
    if lines:
        assert lines[0].startswith(f"the runs of {policy} ended before a restart or a larger batch")


def test_one_long_trial_says_enough_of_a_schedule(run):
    short = run("warm_restarts", epochs=4)
    assert cautions([short], 10_000, searched=False)
    assert cautions([short, run("warm_restarts", epochs=12)], 10_000, searched=False) == []


def test_of_unknown_options_nothing_is_said(run):
    assert cautions([run("warm_restarts", option_of_tomorrow=1)], 10_000, searched=False) == []


def test_trials_that_still_improved(run):
    rising, fallen = run(epochs=4, best=4), run(epochs=4, best=2)
    # One whose rate falls is best at its end in any case, and a short one is one of many.
    others = [run("one_cycle", epochs=4, best=4), *(run(epochs=1, best=1) for _ in range(5))]
    lines = cautions([rising, rising, fallen, *others], 100, searched=False)
    assert lines[0] == (
        "2 of 3 trials of 4 epochs at a fixed rate were best in their last epoch: longer ones may rank differently; "
        "give more epochs"
    )
    assert cautions([rising, fallen], 100, searched=False) == []


def test_differences_within_the_error_of_the_validation_images(run):
    trials = [run("one_cycle", 0.9931), run("exp_decay", 0.9861, decay_steps=9), run("fixed", 0.88)]
    (line,) = cautions(trials, 144, searched=False)
    assert line.startswith("the order of one_cycle 99.31 % and exp_decay 98.61 % may be chance: ")
    assert "144 validation images" in line and "fixed" not in line
    # 0.7 points are 6 standard errors of 20,000 images.
    assert cautions(trials, 20_000, searched=False) == []
    # All right is not certain: the next image may be wrong.
    assert cautions([run("one_cycle", 1.0), run("fixed", 0.99)], 100, searched=False)


def test_differences_within_the_spread_of_seeds(run):
    def rows(name, *accuracies):
        return [run(name, accuracy, seed=seed) for seed, accuracy in enumerate(accuracies)]

    near = [*rows("one_cycle", 0.990, 0.992, 0.994), *rows("fixed", 0.989, 0.991, 0.993)]
    (line,) = cautions(near, 1_000_000, searched=False)
    assert line.startswith("the order of one_cycle 99.20 % and fixed 99.10 % may be chance: ")
    assert "seeds, whose standard deviation is 0.20 points; give more seeds" in line
    far = [*rows("one_cycle", 0.990, 0.992, 0.994), *rows("fixed", 0.979, 0.981, 0.983)]
    assert cautions(far, 10, searched=False) == [], "seeds say more than the number of images"


def test_the_run_by_which_a_solution_was_found_does_not_count(run):
    found = [run("one_cycle", 0.999), run("fixed", 0.95)]
    again = [
        replace(run(one.name, accuracy, seed=seed), repeat_of=one.number)
        for one, accuracies in zip(found, ((0.981, 0.983), (0.980, 0.982)), strict=True)
        for seed, accuracy in enumerate(accuracies, 1)
    ]
    line = cautions([*found, *again], 10_000, searched=True, seeds=3)[-1]
    assert line.startswith("the order of one_cycle 98.20 % and fixed 98.10 % may be chance")


def test_unfinished_and_failed_trials_do_not_count(run, solution):
    from dataclasses import replace

    stopped = [replace(run(), state="stopped") for _ in range(20)]
    (line,) = cautions([run(), *stopped], 100, searched=True)
    assert line.startswith("1 trial is complete")


def test_repetitions_that_did_not_fit(run):
    trials = [run(accuracy=0.9 + 0.001 * n) for n in range(RANDOM_TRIALS)]
    lines = cautions(trials, 10_000, searched=True, seeds=3)
    assert lines == ["no repetition with another seed is complete; give a larger budget, or more of it with --resume"]
    again = replace(trials[-1], number=99, repeat_of=trials[-1].number, options={**trials[-1].options, "seed": 1})
    assert cautions([*trials, again], 10_000, searched=True, seeds=3) == []
    failed = replace(again, number=100, state="failed", reason="the loss is nan", options={"seed": 2})
    (line,) = cautions([*trials, again, failed], 10_000, searched=True, seeds=3)
    assert line == "trial 9 with seed 2 failed (the loss is nan): what fails with a seed is not chosen"
