"""capszoo.figures: what the figures show, and what happens where there is nothing to show."""

import sys

import pytest

from capszoo import checkpoint, figures
from capszoo.explore import Solution

PNG = b"\x89PNG\r\n\x1a\n"
DRAW = {"speedup": figures.plot_speedup, "memory": figures.plot_memory, "layers": figures.plot_layers}


def row(subject="routing", model="capsnet", batch_size=8, variant="plain", **values):
    """A row as csv.DictReader gives it: strings, and nothing for a missing value."""
    empty = dict.fromkeys(("layer", "graph", "median_ms", "ratio_to_fused", "peak_mib", "note"), "")
    facts = {"subject": subject, "model": model, "batch_size": batch_size, "variant": variant, "precision": "float32"}
    return {key: str(value) for key, value in {**empty, **facts, **values}.items()}


def layer_rows(model="capsnet", **times):
    rows = [row("layer", model, layer=layer, variant="fused", median_ms=time) for layer, time in times.items()]
    return [*rows, row("layer", model, layer="routing", variant="plain", median_ms=20)]


ROWS = [
    *(row(batch_size=size, ratio_to_fused=size + 1, peak_mib=100 * size) for size in (32, 1, 8)),
    *(row(batch_size=size, variant="fused", ratio_to_fused=1.0, peak_mib=10 * size) for size in (32, 1, 8)),
    row("training step", "capsnet_ws", 8, "none", ratio_to_fused=0.8, peak_mib=9),
    *layer_rows(conv1=1.0, routing=2.0, optimizer=0.5),
]


@pytest.fixture
def figure(monkeypatch):
    """Draws and returns the figure itself instead of a file."""

    def draw(name, rows):
        kept = []
        monkeypatch.setattr(figures.style, "save", lambda figure, path: kept.append(figure))
        DRAW[name](rows, "unused.png")
        return kept[0]

    return draw


def lines(axes):
    """The drawn lines: points by color and style."""
    found = [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() != "None"]  # no line at 1
    return {(line.get_color(), line.get_linestyle()): list(zip(*line.get_data(), strict=True)) for line in found}


@pytest.mark.parametrize("name", DRAW)
def test_writes_a_png_and_nothing_else(tmp_path, name):
    before = set(sys.modules)
    DRAW[name](ROWS, tmp_path / "figure.png")
    data = (tmp_path / "figure.png").read_bytes()
    assert data.startswith(PNG) and len(data) > 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_speedup_has_a_panel_for_each_subject_and_lines_in_order(figure):
    routing, training = figure("speedup", ROWS).axes
    assert (routing.get_title(), training.get_title()) == ("routing", "training step")
    assert lines(routing) == {("C0", "--"): [(1, 2), (8, 9), (32, 33)]}  # fused over fused is the line at 1
    assert lines(training) == {("C1", ":"): [(8, 0.8)]}
    assert routing.get_xscale() == routing.get_yscale() == "log"


def test_memory_shows_ours_too(figure):
    drawn = figure("memory", ROWS)
    assert lines(drawn.axes[0]) == {
        ("C0", "--"): [(1, 100), (8, 800), (32, 3200)],
        ("C0", "-"): [(1, 10), (8, 80), (32, 320)],
    }
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels == ["capsnet", "capsnet_ws", "capszoo", "plain PyTorch", "without routing"]


def test_missing_values_and_other_precisions_are_skipped(figure):
    rows = [
        *ROWS,
        row(batch_size=64, note="out of memory"),
        row(batch_size=128, ratio_to_fused="nan"),
        row(batch_size=256, ratio_to_fused=7, precision="bfloat16"),
        {"subject": "routing", "model": "capsnet", "variant": "plain"},
    ]
    assert lines(figure("speedup", rows).axes[0]) == lines(figure("speedup", ROWS).axes[0])


@pytest.mark.parametrize("order", [1, -1])
def test_captured_steps_come_before_eager_ones(figure, order):
    both = [row(ratio_to_fused=5, graph=1), row(ratio_to_fused=3, graph=0)]
    assert lines(figure("speedup", both[::order]).axes[0]) == {("C0", "--"): [(8, 5)]}


def test_layers_stack_to_the_step_with_either_routing(figure):
    (axes,) = figure("layers", ROWS).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["capsnet\nplain PyTorch", "capsnet\ncapszoo"]
    bars = {bar.get_label(): [patch.get_height() for patch in bar] for bar in axes.containers}
    assert bars == {"conv1": [1, 1], "routing": [20, 2], "optimizer": [0.5, 0.5]}
    assert [text.get_text() for text in axes.texts] == ["21.5 ms", "3.5 ms"]


def test_model_that_lacks_a_layer_has_no_bar(figure):
    (axes,) = figure("layers", [*ROWS, *layer_rows("capsnet_ws", conv1=1.0, routing=2.0)]).axes
    assert len(axes.get_xticklabels()) == 2


def test_rows_may_hold_numbers(figure):
    rows = [{"subject": "routing", "model": "m", "batch_size": 4, "precision": "float32", "variant": "plain",
             "graph": 1, "ratio_to_fused": 2.5}]  # fmt: skip
    assert lines(figure("speedup", rows).axes[0]) == {("C0", "--"): [(4, 2.5)]}


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize("rows", [[], [{"epoch": "1", "loss": "2"}], [row(note="out of memory")]])
def test_nothing_to_draw_is_one_error(tmp_path, name, rows):
    with pytest.raises(ValueError, match="there is nothing to draw") as caught:
        DRAW[name](rows, tmp_path / "figure.png")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", DRAW)
def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib: pip install "capszoo\[train\]"'):
        DRAW[name](ROWS, tmp_path / "figure.png")


def test_failed_write_keeps_the_old_figure(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "figure.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(checkpoint.WriteError, match="figure.png.*disk full"):
        figures.plot_speedup(ROWS, tmp_path / "figure.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("figure.png", b"old")]


# Figures of an exploration


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


def test_accuracy_is_a_mean_over_seeds_or_the_best_trial(explored):
    epochs, time = explored("accuracy").axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in epochs.lines}
    assert list(drawn) == ["baseline", "fixed, 2 seeds", "one_cycle", "ada_batch"]
    assert drawn["fixed, 2 seeds"] == [(1, pytest.approx(0.966)), (2, pytest.approx(0.976)), (3, pytest.approx(0.986))]
    assert drawn["one_cycle"] == [(1, pytest.approx(0.985)), (2, 0.995)]  # trial 4
    assert len(drawn["ada_batch"]) == 3  # stopped, and nothing else to show; the failed one is left out
    assert len(epochs.collections) == len(time.collections) == 1
    assert list(time.lines[1].get_xdata()) == [pytest.approx(25 / 3), pytest.approx(50 / 3), 25]


def test_trials_with_other_options_are_not_averaged():
    other = trial(3, options={"lr": 0.2, "seed": 3}, accuracy=0.95)
    assert [run.number for run in figures.curves([*TRIALS[1:3], other])["fixed"]] == [2]


def test_time_to_best_has_bars_of_means_and_points(explored):
    (axes,) = explored("time_to_best").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["baseline", "one_cycle", "fixed"]
    assert [bar.get_width() for bar in axes.patches] == [50, 22.5, 12.5]
    assert [list(line.get_xdata()) for line in axes.lines] == [[20, 22.5, 25], [10, 15]]
    assert [text.get_text() for text in axes.texts] == ["50.0 s", "mean 22.5 s", "mean 12.5 s"]


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
