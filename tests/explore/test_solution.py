"""capszoo.explore: what is Pareto-optimal, what is chosen, and how rows and times compare."""

import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.explore import OBJECTIVES, ExplorationError, choose, compare, pareto_front, retime
from capszoo.explore.solution import most_repeated, over_seeds, paired_difference

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
    assert choose(all_of_them, "smallest", max_drop=0.001, baseline=baseline) == small
    assert choose(all_of_them, "smallest", loss=0.001, baseline=baseline) == small, "as it was called before"
    assert choose(all_of_them, "fastest") == best, "without a baseline nothing may be lost of the best"
    assert choose(all_of_them, "accurate", within=1) is None and choose([], "fastest") is None
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
    assert quick["gain"] == pytest.approx((0.05 + 0.01) / 2) and quick["gain_low"] < 0 < quick["gain_high"]
    assert baseline["gain"] == baseline["gain_low"] == 0 and poor["gain"] == pytest.approx(-0.7)
    assert poor["gain_low"] is None
    assert poor["reached"] == 0 and poor["seconds_to_baseline"] is poor["saving"] is poor["accuracy_std"] is None


def test_times_measured_at_rest_replace_those_of_the_trials(solution):
    history = [[1, 9.0, 0.5], [2, 99.0, 0.9], [3, 999.0, 0.8]]
    options = {"policy": "ada_batch", "epochs": 3, "warm_epochs": 1}
    trial = solution(0, 0.9, 999.0, options=options, history=history, best_epoch=2, seconds_to_best=99.0, images=1000)
    waiting = solution(1, None, None, state="waiting")
    timed, same = retime([trial, waiting], lambda solution, batch_size: {1: 10.0, 16: 2.0}[batch_size])
    assert timed.history == [[1, 10.0, 0.5], [2, 12.0, 0.9], [3, 14.0, 0.8]] and same == waiting
    assert (timed.seconds, timed.seconds_to_best, timed.accuracy) == (14.0, 12.0, 0.9)


def test_means_over_seeds_and_their_difference_from_the_baseline(solution):
    def run(number, accuracy, seed, repeat_of=None, **kwargs):
        return solution(number, accuracy, 10.0 + seed, options={"seed": seed}, repeat_of=repeat_of, **kwargs)

    trials = [
        run(0, 0.90, 0, name="baseline"), run(1, 0.93, 0), run(2, 0.99, 0), run(3, None, 0, state="failed"),
        run(4, 0.80, 1, 0), run(5, 0.85, 1, 1), run(6, 0.82, 2, 0), run(7, 0.81, 2, 1),
        run(8, 0.1, 2, 1, state="stopped"),
    ]  # fmt: skip
    baseline, better, once, failed = over_seeds(trials)
    assert (baseline.runs, better.runs, once.runs, failed) == (3, 3, 1, trials[3])
    assert baseline.accuracy == pytest.approx(0.84) and baseline.seconds == 11 and once.gain is None
    assert better.accuracy_std == pytest.approx(statistics.stdev([0.93, 0.85, 0.81]))
    gain = better.gain
    # The differences are 0.03, 0.05 and -0.01; Student's t of two degrees of freedom is 4.303.
    half = 4.3027 * statistics.stdev([0.03, 0.05, -0.01]) / 3**0.5
    assert gain.mean == pytest.approx(0.07 / 3) and gain.pairs == 3
    assert (gain.low, gain.high) == pytest.approx((gain.mean - half, gain.mean + half), abs=1e-5)
    assert most_repeated([baseline, better, once, failed]) == [baseline, better]
    assert paired_difference({0: 1.0}, {1: 0.5}) is None and paired_difference({0: 1.0}, {0: 0.5}).high is None
