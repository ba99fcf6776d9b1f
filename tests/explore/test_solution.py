"""capszoo.explore: what is Pareto-optimal, what is chosen, and how rows and times compare."""

import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.explore import OBJECTIVES, ExplorationError, choose, compare, pareto_front, retime
from capszoo.explore.solution import is_behind, over_seeds, paired_difference

values = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))


@given(st.lists(values, max_size=25), st.sets(st.sampled_from(list(OBJECTIVES)), min_size=1))
@settings(deadline=None, max_examples=200)
def test_pareto_front_is_what_the_definition_says(solution, points, objectives):
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


def test_only_complete_solutions_are_optimal(solution):
    stopped = solution(0, 0.99, 1.0, 10, state="stopped")
    assert pareto_front([stopped, solution(1)]) == [solution(1)] and pareto_front([stopped]) == []


def test_the_three_ways_to_choose(solution):
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
    assert choose(all_of_them, "smallest", max_drop=0.001, within=100, baseline=baseline) == fast
    assert choose(all_of_them, "smallest", max_drop=0.001, baseline=baseline) == small
    assert choose(all_of_them, "smallest", loss=0.001, baseline=baseline) == small, "as it was called before"
    assert choose(all_of_them, "fastest") == best, "without a baseline nothing may be lost of the best"
    assert choose(all_of_them, "accurate", within=1) is None and choose([], "fastest") is None
    assert choose(all_of_them, "fastest", within=10) is None, "nor of the best that takes longer"
    with pytest.raises(ExplorationError, match="did you mean 'fastest'"):
        choose(all_of_them, "fasttest")


def test_comparison_with_the_baseline_of_the_same_seed(solution):
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
    assert quick["gain"].mean == pytest.approx((0.05 + 0.01) / 2) and quick["gain"].low < 0 < quick["gain"].high
    assert baseline["gain"].mean == baseline["gain"].low == 0 and str(poor["gain"]) == "-70.00"
    assert str(quick["gain"]) == "+3.00 (-22.41 to +28.41)"
    assert poor["reached"] == 0 and poor["seconds_to_baseline"] is poor["saving"] is poor["accuracy_std"] is None
    # Over the baseline's 20 and 40 s of the same seeds; of a row with one seed, over 20 s alone.
    assert (baseline["share"], baseline["share_to_best"]) == pytest.approx((35 / 30, 1))
    assert (quick["share"], quick["share_to_best"]) == pytest.approx((16 / 30, 16 / 30))
    assert poor["share"] == poor["share_to_best"] == 0.5
    alone = compare([run(0, "quick", 0, (5, 0.85))])
    assert alone[0]["share"] is alone[0]["share_to_best"] is None


def test_times_measured_at_rest_replace_those_of_the_trials(solution):
    history = [[1, 9.0, 0.5], [2, 99.0, 0.9], [3, 999.0, 0.8]]
    options = {"policy": "ada_batch", "epochs": 3, "warm_epochs": 1}
    trial = solution(0, 0.9, 999.0, options=options, history=history, best_epoch=2, seconds_to_best=99.0, images=1000)
    waiting = solution(1, None, None, state="waiting")
    timed, same = retime([trial, waiting], lambda solution, batch_size: {1: 10.0, 16: 2.0}[batch_size])
    assert timed.history == [[1, 10.0, 0.5], [2, 12.0, 0.9], [3, 14.0, 0.8]] and same == waiting
    assert (timed.seconds, timed.seconds_to_best, timed.accuracy) == (14.0, 12.0, 0.9)


def test_what_a_longer_run_had_reached_before_is_behind(solution):
    long = solution(0, 0.9, 40.0, 1000, history=[[1, 10.0, 0.7], [2, 20.0, 0.8], [3, 30.0, 0.75], [4, 40.0, 0.9]])

    def short(accuracy, seconds, parameters=1000):
        return solution(1, accuracy, seconds, parameters, history=[[1, seconds, accuracy]])

    for trial, behind in (
        (short(0.8, 20.0), True), (short(0.81, 20.0), False), (short(0.8, 19.0), False), (short(0.69, 11.0), True),
        (short(0.69, 11.0, 999), False), (short(0.85, 41.0), False),
    ):  # fmt: skip
        assert is_behind(trial, [long, trial]) == behind, trial
    assert not is_behind(long, [long])


def run_of(solution, number, accuracy, seed, repeat_of=None, **kwargs):
    return solution(number, accuracy, 10.0 + seed, options={"seed": seed}, repeat_of=repeat_of, **kwargs)


def test_means_over_seeds_and_their_difference_from_the_baseline(solution):
    def run(*args, **kwargs):
        return run_of(solution, *args, **kwargs)

    trials = [
        run(0, None, 0, name="baseline", state="interrupted"), run(1, 0.90, 0, name="baseline"), run(2, 0.93, 0),
        run(3, 0.99, 0), run(4, None, 0, state="failed"),
        run(5, 0.80, 1, 1), run(6, 0.85, 1, 2), run(7, 0.82, 2, 1), run(8, 0.81, 2, 2), run(9, 0.90, 3, 1),
        run(10, 0.87, 3, 2), run(11, 0.99, 4, 1), run(12, 0.1, 4, 2, state="stopped"),
    ]  # fmt: skip
    baseline, better = over_seeds(trials)
    assert (baseline.number, baseline.runs, better.number, better.runs) == (1, 3, 2, 3), "seeds that both have"
    assert baseline.accuracy == pytest.approx(0.84) and baseline.seconds == 12, "not the run it was chosen by"
    assert better.accuracy_std == pytest.approx(statistics.stdev([0.85, 0.81, 0.87]))
    gain = better.gain
    # The differences are 0.05, -0.01 and -0.03; Student's t of two degrees of freedom is 4.303.
    half = 4.3027 * statistics.stdev([0.05, -0.01, -0.03]) / 3**0.5
    assert gain.mean == pytest.approx(0.01 / 3) and gain.pairs == 3 and baseline.gain.mean == 0
    assert (gain.low, gain.high) == pytest.approx((gain.mean - half, gain.mean + half), abs=1e-5)
    assert paired_difference({0: 1.0}, {1: 0.5}) is None and paired_difference({0: 1.0}, {0: 0.5}).high is None


def test_repetitions_that_are_not_done_drop_no_solution(solution):
    def run(*args, **kwargs):
        return run_of(solution, *args, **kwargs)

    own = [run(0, 0.90, 0, name="baseline"), run(1, 0.93, 0), run(2, 0.92, 0), run(3, 0.5, 0)]
    assert over_seeds(own) == own, "without repetitions, all are compared"
    first = [run(4, 0.80, 1, 0), run(5, 0.85, 1, 1), run(6, None, 0, 2, state="waiting")]
    assert over_seeds(own + first) == own, "the first round is not complete"
    first[-1] = run(6, 0.84, 1, 2)
    second = [run(7, 0.70, 2, 0), run(8, None, 2, 1, state="interrupted"), run(9, None, 0, 2, state="waiting")]
    means = over_seeds(own + first + second)
    assert [(s.number, s.accuracy, s.runs) for s in means] == [(0, 0.80, 1), (1, 0.85, 1), (2, 0.84, 1)]
    second[1:] = [run(8, 0.60, 2, 1), run(9, 0.80, 2, 2)]
    late = [run(10, 0.99, 0), run(11, None, 0, 10, state="waiting")]
    assert [s.number for s in over_seeds(own + first + second + late)] == [0, 1, 2], "found later, not repeated yet"
    third = [run(20 + n, 0.8, 3, n) for n in range(3)]
    late[1:] = [run(11, 0.95, 1, 10), run(12, None, 0, 10, state="waiting")]
    found = over_seeds(own + first + second + third + late)
    assert [(s.number, s.runs) for s in found] == [(0, 3), (1, 3), (2, 3)], "one repetition of three is too few"
    found = over_seeds(own + first + second + third + late + [run(13, 0.95, 2, 10)])
    assert [(s.number, s.runs) for s in found] == [(0, 2), (1, 2), (2, 2), (10, 2)]
    failed = [run(7, None, 2, 0, state="failed"), run(8, None, 2, 1, state="failed"), second[2]]
    means = over_seeds(own + first + failed)
    assert [(s.number, s.runs) for s in means] == [(0, 1), (2, 1)], "the baseline stays, what failed does not"
    none = [run(4, None, 1, 0, state="failed"), *first[1:]]
    assert [(s.number, s.accuracy, s.gain) for s in over_seeds(own + none)] == [
        (0, 0.90, None), (1, 0.85, None), (2, 0.84, None)
    ]  # fmt: skip


def test_of_a_grid_the_means_of_rows_are_compared(solution):
    def run(number, name, accuracy, seed, **kwargs):
        return run_of(solution, number, accuracy, seed, name=name, **kwargs)

    trials = [run(0, "baseline", 0.90, 0), run(1, "fast", 0.92, 0), run(2, "new", None, 0, state="waiting")]
    assert [(s.name, s.accuracy) for s in over_seeds(trials, of_rows=True)] == [("baseline", 0.90), ("fast", 0.92)]
    trials += [run(3, "baseline", 0.98, 1), run(4, "fast", 0.90, 1), run(5, "baseline", 0.99, 2)]
    baseline, fast = over_seeds(trials, of_rows=True)
    assert (baseline.accuracy, fast.accuracy, fast.runs) == (pytest.approx(0.94), pytest.approx(0.91), 2)
    assert fast.gain.mean == pytest.approx(-0.03)
    assert choose([baseline, fast], "fastest", baseline=baseline) == baseline, "the lucky seed is not chosen"
