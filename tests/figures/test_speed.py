"""capszoo.figures.speed: what the figures of measurements show, and what happens where there is nothing to show."""

import sys

import pytest

from capszoo import checkpoint, figures

PNG = b"\x89PNG\r\n\x1a\n"


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
# A model whose layers have other names.
OTHER = [row("layer", "other", layer=name, variant="fused", median_ms=3.0) for name in ("stem", "optimizer")]
DRAW = {"speedup": figures.plot_speedup, "memory": figures.plot_memory, "layers": figures.plot_layers}


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


def test_layers_of_a_model_without_routing(figure):
    (axes,) = figure("layers", [*ROWS, *OTHER]).axes
    bars = {bar.get_label(): [patch.get_height() for patch in bar] for bar in axes.containers}
    assert bars["stem"] == [0, 0, 3] and bars["conv1"] == [1, 1, 0]


@pytest.mark.parametrize("layers", [{"conv1": 1.0, "routing": 2.0}, {"conv1": "", "routing": 2.0, "optimizer": 1.0}])
def test_model_of_which_a_layer_was_not_measured_has_no_bar(figure, layers):
    (axes,) = figure("layers", [*ROWS, *layer_rows("capsnet_ws", **layers)]).axes
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
    def fail(self, data):
        with open(self, "wb") as file:
            file.write(data[:9])
        raise OSError("disk full")

    (tmp_path / "figure.png").write_bytes(b"old")
    monkeypatch.setattr(type(tmp_path), "write_bytes", fail)
    with pytest.raises(checkpoint.WriteError, match="figure.png.*disk full"):
        figures.plot_speedup(ROWS, tmp_path / "figure.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("figure.png", b"old")]
