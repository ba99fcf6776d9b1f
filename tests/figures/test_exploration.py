"""Figures of an exploration: the front, accuracy over time, time to the best, rows against the published ones."""

from dataclasses import replace

import pytest

from capszoo import figures
from capszoo.explore import Solution


def trial(number, name="fixed", accuracy=0.99, seconds=30.0, parameters=1000, epochs=3, **values):
    history = [[e, seconds * e / epochs, accuracy - 0.01 * (epochs - e)] for e in range(1, epochs + 1)]
    values = {"options": {"lr": 0.1, "seed": number}, "history": history, "seconds_to_best": seconds / 2, **values}
    return Solution(number, name, values.pop("state", "complete"), accuracy=accuracy, seconds=seconds,
                    parameters=parameters, **values)  # fmt: skip


TRIALS = [
    trial(0, "baseline", 0.990, 100.0, 3_000_000),
    trial(1, "fixed", 0.985, 20.0, 1_000_000),
    trial(2, "fixed", 0.987, 30.0, 1_000_000),
    trial(3, "one_cycle", 0.992, 40.0, 2_000_000, epochs=4),
    trial(4, "one_cycle", 0.995, 45.0, 4_000_000, epochs=2),
    trial(5, "one_cycle", 0.110, 50.0, 2_000_000),
    trial(6, "ada_batch", 0.970, 9.0, 500_000, state="stopped"),
    trial(7, "ada_batch", 0.999, 1.0, 100, state="failed"),
    Solution(8, "ada_batch", "running", parameters=5),
    Solution(9, "fixed", "complete", parameters=5),
]  # fmt: skip
FRONT = [TRIALS[1], TRIALS[3], TRIALS[4]]
EXPLORED = {
    "front": lambda trials, path: figures.plot_front(trials, FRONT, path, ("accuracy", "seconds", "parameters")),
    "tradeoff": lambda trials, path: figures.plot_tradeoff(trials, FRONT, path),
    "accuracy": figures.plot_accuracy,
    "time_to_best": figures.plot_time_to_best,
}


@pytest.fixture
def explored(monkeypatch):
    """Draws and returns the figure itself instead of a file."""

    def draw(name, trials=TRIALS):
        kept = []
        monkeypatch.setattr(figures.style, "save", lambda figure, path: kept.append(figure))
        EXPLORED[name](trials, "unused.png")
        return kept[0]

    return draw


def points(axes):
    """Drawn points with their marker's number of corners, and whether they have an outline."""
    found = {}
    for collection in axes.collections:
        for place, edge in zip(collection.get_offsets(), collection.get_edgecolors(), strict=True):
            found[tuple(float(value) for value in place)] = bool(edge[3])
    return found


@pytest.mark.parametrize("name", EXPLORED)
def test_exploration_writes_a_png_of_good_size(tmp_path, name):
    from matplotlib.image import imread

    EXPLORED[name](TRIALS, tmp_path / "figure.png")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    picture = imread(tmp_path / "figure.png")
    height, width, _ = picture.shape
    assert 300 < height < 1200 and 900 < width < 2500
    assert picture[..., :3].std() > 0.05


def test_front_has_a_panel_for_each_cost_and_numbers(explored):
    time, size = explored("front").axes
    assert (time.get_xlabel(), size.get_xlabel()) == ("training time, s", "parameters")
    bottom, top = time.get_ylim()
    assert 0.9 < bottom < 0.985 and top > 0.995
    assert points(time) == {
        (20, 0.985): True, (30, 0.987): False, (40, 0.992): True, (45, 0.995): True, (50, bottom): False,
        (100, 0.99): False,
    }  # fmt: skip
    assert sorted(text.get_text() for text in time.texts) == ["1", "3", "4"]
    assert {x for x, _ in points(size)} == {1e6, 2e6, 3e6, 4e6}
    assert time.get_xscale() == "log" and [t.get_text() for t in time.get_xticklabels()] == ["20", "50", "100"]
    (steps,) = time.lines
    assert list(zip(*steps.get_data(), strict=True)) == [
        (20, 0.985), (30, 0.987), (40, 0.992), (45, 0.995), (100, 0.995)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("objectives", "labels"),
    [(("accuracy",), ["training time, s"]), (("parameters", "accuracy"), ["parameters"])],
)
def test_front_of_fewer_objectives(monkeypatch, objectives, labels):
    kept = []
    monkeypatch.setattr(figures.style, "save", lambda figure, path: kept.append(figure))
    figures.plot_front(TRIALS, FRONT, "unused.png", objectives)
    assert [axes.get_xlabel() for axes in kept[0].axes] == labels


def test_tradeoff_has_areas_by_parameters(explored):
    figure = explored("tradeoff")
    areas = {}
    for collection in figure.axes[0].collections[:1]:
        for (x, _), area in zip(collection.get_offsets(), collection.get_sizes(), strict=True):
            areas[float(x)] = float(area)
    assert areas[45] == 4 * areas[20] == 2 * areas[40]
    names, sizes = ([text.get_text() for text in legend.get_texts()] for legend in figure.legends)
    assert names == ["baseline", "fixed", "one_cycle", "Pareto front", "below the axis"]
    assert sizes == ["1 M", "2 M", "4 M"]


def own_lines(figure):
    """By its title, what a panel shows in colour, above and then below the axis; others are grey."""
    found = {}
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_color() != "0.8"]
        found.setdefault(axes.get_title(), []).append([list(zip(*line.get_data(), strict=True)) for line in lines])
    return found


def test_accuracy_is_a_mean_over_seeds_or_the_best_trial(explored):
    figure = explored("accuracy")
    panels = own_lines(figure)
    assert list(panels) == ["baseline", "fixed, 2 seeds", "one_cycle", "ada_batch"]
    ((epochs,), (time,)) = panels["fixed, 2 seeds"]
    assert epochs == [(1, pytest.approx(0.966)), (2, pytest.approx(0.976)), (3, pytest.approx(0.986))]
    assert [x for x, _ in time] == [pytest.approx(25 / 3), pytest.approx(50 / 3), 25]
    assert panels["one_cycle"][0] == [[(1, pytest.approx(0.985)), (2, 0.995)]]  # trial 4
    assert len(panels["ada_batch"][0][0]) == 3  # stopped, and nothing else to show; the failed one is left out
    assert [bool(axes.collections) for axes in figure.axes] == [False, True, False, False] * 2  # the range of the seeds


def test_panels_of_accuracy_share_axes_and_show_the_others_in_grey(explored):
    figure = explored("accuracy")
    for block in (figure.axes[:4], figure.axes[4:]):
        assert len({(axes.get_xlim(), axes.get_ylim()) for axes in block}) == 1
        for axes in block:
            assert sum(line.get_color() == "0.8" for line in axes.lines) == 3
    colors = [axes.title.get_color() for axes in figure.axes]
    assert colors[:4] == colors[4:] and len(set(colors)) == 4
    texts = [axes.texts[0].get_text() for axes in figure.axes[:4]]
    assert texts == ["best 99.00 %", "best 98.60 %", "best 99.50 %", "best 97.00 %"]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (5, (1, 5)), (6, (2, 3)), (9, (2, 5)), (11, (3, 4))])
def test_panels_of_accuracy_fill_rows(explored, count, shape):
    figure = explored("accuracy", [trial(number, f"name {number}") for number in range(count)])
    assert len(figure.axes) == 2 * count
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    lowest = figure.axes[:count][-shape[1] :]
    assert all(axes.xaxis.get_tick_params()["labelbottom"] for axes in lowest)


def test_what_lies_below_the_axis_is_marked(explored):
    good = [trial(number, f"name {number}", accuracy=0.99) for number in range(5)]
    poor = trial(5, "poor", accuracy=0.3)
    dip = trial(6, "dip", history=[[1, 10.0, 0.98], [2, 20.0, 0.2], [3, 30.0, 0.985]], accuracy=0.985)
    figure = explored("accuracy", [*good, poor, dip])
    panels = own_lines(figure)
    bottom = figure.axes[0].get_ylim()[0]
    assert 0.9 < bottom
    assert panels["poor"][0][1] == [(1, bottom), (2, bottom), (3, bottom)]
    assert panels["dip"][0][1] == [(2, bottom)] and panels["dip"][1][1] == [(20, bottom)]
    assert all(len(panels[t.name][0]) == 1 for t in good)
    texts = {axes.get_title(): axes.texts[0].get_text() for axes in figure.axes}
    assert texts["poor"] == "best 30.00 %, below the axis" and texts["dip"] == "best 98.50 %"


def test_trials_with_other_options_are_not_averaged():
    other = trial(3, options={"lr": 0.2, "seed": 3}, accuracy=0.95)
    assert [run.number for run in figures.curves([*TRIALS[1:3], other])["fixed"]] == [2]


def test_time_to_best_has_bars_of_means_and_points(explored):
    (axes,) = explored("time_to_best").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["baseline", "one_cycle", "fixed"]
    assert [bar.get_width() for bar in axes.patches] == [50, 22.5, 12.5]
    assert [list(line.get_xdata()) for line in axes.lines] == [[20, 22.5, 25], [10, 15]]
    assert [text.get_text() for text in axes.texts] == [
        "50.0 s, 99.00 %", "mean 22.5 s, 11.00 to 99.50 %", "mean 12.5 s, 98.50 to 98.70 %"
    ]  # fmt: skip


def test_time_to_best_without_accuracies_has_times(explored):
    (axes,) = explored("time_to_best", [Solution(1, "fixed", "complete", seconds_to_best=15.0)]).axes
    assert [text.get_text() for text in axes.texts] == ["15.0 s"]


def test_poor_trials_do_not_squash_the_accuracies():
    low, high = figures.accuracy_limits([0.1, 0.11, 0.99, 0.991, 0.992, 0.993, 0.994, 0.995])
    assert 0.985 < low < 0.99 and 0.995 < high < 1
    assert figures.accuracy_limits([0.5]) == (0.499, 0.501)
    low, high = figures.accuracy_limits([0.2, 0.4, 0.6, 0.8])
    assert low == pytest.approx(0.2 - 0.036) and high == pytest.approx(0.836)


@pytest.mark.parametrize("name", EXPLORED)
@pytest.mark.parametrize("seconds", [1e-4, 12.0, 1e5])
def test_one_trial_is_enough(explored, name, seconds):
    figure = explored(name, [trial(1, seconds=seconds)])
    figure.draw_without_rendering()


@pytest.mark.parametrize("name", EXPLORED)
@pytest.mark.parametrize("trials", [[], [TRIALS[7], TRIALS[8]], [Solution(0, "bare", "complete")]])
def test_nothing_explored_is_one_error(tmp_path, name, trials):
    with pytest.raises(ValueError, match="there is nothing to draw") as caught:
        EXPLORED[name](trials, tmp_path / "figure.png")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def comparison(**changes):
    rows = [
        {"name": "baseline", "seconds_to_best": 200.0, "saving": 0.0, "saving_std": 0.0, "reached": 3, "runs": 3},
        {"name": "quick", "seconds_to_best": 50.0, "saving": 0.8, "saving_std": 0.1, "reached": 2, "runs": 3},
        {"name": "poor", "seconds_to_best": 90.0, "saving": None, "saving_std": None, "reached": 0, "runs": 3},
    ]
    return [{**row, **changes} for row in rows]


PUBLISHED = [
    {"name": "baseline", "epochs": "20", "epoch_seconds": "300"},
    {"name": "quick", "epochs": "3", "epoch_seconds": "800"},
]


def test_comparison_shows_times_as_parts_of_the_baselines(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures.style, "save", lambda figure, path: drawn.append(figure))
    figures.plot_comparison(comparison(), PUBLISHED, tmp_path / "unused.png")
    (axes,) = drawn[0].axes
    bars = [[round(bar.get_width(), 3) for bar in group] for group in axes.containers if hasattr(group, "patches")]
    assert bars == [[1.0, 0.4], [1.0, 0.25, 0.45], [1.0, 0.2]]
    texts = [text.get_text() for text in axes.texts]
    assert "20 % (2 of 3 runs)" in texts and texts.count("not reached by any run") == 1
    assert [label.get_text() for label in axes.get_yticklabels()] == ["baseline", "quick", "poor"]


def test_comparison_needs_a_baseline(tmp_path):
    with pytest.raises(ValueError, match="no row named 'baseline'"):
        figures.plot_comparison(comparison()[1:], PUBLISHED, tmp_path / "figure.png")
    assert not any(tmp_path.iterdir())


def test_means_over_seeds_are_drawn_in_place_of_single_runs(monkeypatch):
    """The front is one of means: a lucky run must not stand beside it as if it were better."""
    lucky = [trial(0, "fixed", 0.999, 10.0, 1_000_000), trial(1, "one_cycle", 0.9, 5.0, 1_000_000)]
    means = [replace(lucky[0], accuracy=0.95), replace(lucky[1], accuracy=0.94)]
    means = [replace(mean, accuracy_std=0.01, runs=3) for mean in means]
    kept = []
    monkeypatch.setattr(figures.style, "save", lambda figure, path: kept.append(figure))
    figures.plot_front(lucky, means, "unused.png", ("accuracy", "seconds"), means)
    figures.plot_tradeoff(lucky, means, "unused.png", means)
    for figure in kept:
        offsets = [c for c in figure.axes[0].collections if hasattr(c, "get_sizes") and len(c.get_offsets()) == 2]
        drawn = sorted(tuple(map(float, place)) for place in offsets[0].get_offsets())
        assert drawn == [(5.0, 0.94), (10.0, 0.95)]


@pytest.mark.parametrize("name", ["$x_$", "co$t $_{^", "$"])
def test_dollar_signs_are_no_mathematics(explored, name):
    trials = [replace(one, name=name) for one in TRIALS]
    for kind in EXPLORED:
        explored(kind, trials).draw_without_rendering()
    assert any(axes.get_title().startswith(name.replace("$", r"\$")) for axes in explored("accuracy", trials).axes)
