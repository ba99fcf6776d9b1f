"""capszoo.figures.page: one file with every trial in it, safe whatever the trials hold, and right in a real browser."""

import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import escape, unescape

import pytest

from capszoo.explore import Solution, pareto_front
from capszoo.explore.solution import Difference
from capszoo.figures import interactive, write_report

optuna = pytest.importorskip("optuna")
pytest.importorskip("plotly")

OBJECTIVES = ("accuracy", "seconds", "parameters")
HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \"'&"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def solution(number, name="fixed", accuracy=0.99, seconds=30.0, parameters=1000, **values):
    history = [[epoch, seconds * epoch / 3, accuracy - 0.01 * (3 - epoch)] for epoch in (1, 2, 3)]
    return Solution(**{
        "number": number, "name": name, "state": "complete", "options": {"model": "tiny", "policy": name, "lr": number},
        "accuracy": accuracy, "seconds": seconds, "parameters": parameters, "seconds_to_best": seconds,
        "best_epoch": 3, "history": history, "folder": f"trials/{number:04d}", **values,
    })  # fmt: skip


TRIALS = [
    solution(0, "baseline", 0.990, 100.0, 3_000_000),
    solution(1, "fixed", 0.985, 20.5, 1_000_000),
    solution(2, "one_cycle", 0.992, 40.0, 2_000_000, test_top1=0.991),
    solution(3, "one_cycle", 0.91, 45.0, 2_000_000),
    solution(4, "fixed", 0.4, 9.0, 500_000, state="stopped", reason="could at best come near trial 1"),
    solution(5, "ada_batch", state="failed", reason="out of memory", accuracy=0.5),
    Solution(6, "ada_batch", "running", {"model": "tiny"}),
    Solution(7, "", "waiting"),
    solution(8, HOSTILE, 0.98, 30.0, 1000, reason=HOSTILE, folder=HOSTILE,
             options={HOSTILE: HOSTILE, "model_kwargs": {"deep": HOSTILE}}),
]  # fmt: skip


def make_study(solutions, objectives=OBJECTIVES):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = {"complete": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL", "running": "RUNNING", "waiting": "WAITING"}
    study = optuna.create_study(directions=["maximize" if o == "accuracy" else "minimize" for o in objectives])
    for s in solutions:
        values = [getattr(s, o) for o in objectives] if s.state == "complete" else None
        state = optuna.trial.TrialState[states[s.state]]
        attributes = {"options": s.options, "history": s.history}
        study.add_trial(optuna.trial.create_trial(state=state, values=values, user_attrs=attributes))
    return study


def write(path, solutions=TRIALS, objectives=OBJECTIVES, **options):
    front = pareto_front(solutions, objectives)
    options = {"title": "A search", "facts": {"model": "tiny"}, "command": "python train.py --lr 2", **options}
    write_report(path, solutions, front, objectives=objectives, **options)
    return path.read_text("utf-8")


def rows(page):
    """Cells of the table of all trials, as text, by number of the trial."""
    found = re.findall(r'<tr [^>]*data-trial="(\d+)"[^>]*>(.*?)</tr>', page, re.DOTALL)
    return {
        int(number): [unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for number, row in found
    }


def without_plotly(page):
    """The page without the script that is plotly itself, which has markup in its strings."""
    from plotly.offline import get_plotlyjs

    assert page.count(get_plotlyjs()) <= 1
    return page.replace(get_plotlyjs(), "")


def figures(page):
    return re.findall(r'<div id="(\w+)" class="plotly-graph-div"', page)


def test_every_trial_is_a_row(tmp_path):
    page = write(tmp_path / "report.html", study=make_study(TRIALS))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    found = rows(page)
    assert list(found) == list(range(9))
    assert found[2] == ["2", "one_cycle", "complete", "99.20 %", "99.10 %", "40.0", "40.0", "2,000,000", "3",
                        "model\xa0tiny, lr\xa02", "", "trials/0002"]  # fmt: skip
    assert found[4][-2] == "could at best come near trial 1" and found[5][2] == "failed"
    assert found[6][3:9] == [""] * 6 and found[7][:3] == ["7", "", "waiting"]
    assert re.findall(r'data-trial="(\d+)" class=front', page) == ["1", "2", "8"]
    assert figures(page) == ["pareto", "tradeoff", "epochs", "time", "best"]
    assert "9 (5 complete, 1 failed, 1 running, 1 stopped, 1 waiting), 3 on the front" in page
    assert "python train.py --lr 2" in page and "high accuracy, short training time, few parameters" in page


def test_repetitions_have_their_spread_and_difference(tmp_path):
    trials = [
        solution(0, "baseline", runs=3, accuracy_std=0.001, gain=Difference(0.0, 0.0, 0.0, 3)),
        solution(1, seconds=20.0, runs=3, accuracy_std=0.0021, gain=Difference(0.0015, -0.0005, 0.0035, 3)),
    ]
    page = write(tmp_path / "r.html", trials)
    front = page.split("<h2>Pareto front</h2>")[1].split("<h2>")[0]
    assert "means over the runs" in front and "+0.15 (-0.05 to +0.35)" in front and "± 0.21" in front
    assert "above baseline" not in write(tmp_path / "r.html").split("<h2>All trials")[0]


def test_options_of_all_trials_are_said_once(tmp_path):
    found = rows(page := write(tmp_path / "report.html", TRIALS[:4]))
    assert "<th>in all trials</th><td>model&nbsp;<b>tiny</b></td>" in page
    assert [cells[9] for cells in found.values()] == ["lr\xa00", "lr\xa01", "lr\xa02", "lr\xa03"]


def test_text_of_users_stays_text(tmp_path):
    page = write(tmp_path / "report.html", title=HOSTILE, facts={HOSTILE: HOSTILE}, command=HOSTILE,
                 study=make_study(TRIALS))  # fmt: skip
    page = without_plotly(page)
    assert rows(page)[8][1] == rows(page)[8][-1] == rows(page)[8][-2] == HOSTILE
    assert "<script>alert" not in page and "<img" not in page and "<!--" not in page
    assert page.count("<script") == page.count("</script>") == 1 + 5 + 1  # plotly, its figures, ours
    assert f"<title>{escape(HOSTILE)}</title>" in page


def test_labels_of_figures_are_text_too():
    assert interactive._label("a <b>bold</b>\n&amp; name") == "a &lt;b&gt;bold&lt;/b&gt; &amp;amp; name"
    hover = interactive._hover(TRIALS[8])
    assert set(re.findall(r"<[^>]*>", hover)) == {"<b>", "</b>", "<br>"}
    assert "deep: &lt;/script&gt;" in hover and "accuracy 98.00 %<br>30.0 s, best after 30.0 s" in hover


def test_nothing_is_loaded(tmp_path):
    page = without_plotly(write(tmp_path / "report.html", study=make_study(TRIALS)))
    assert not re.findall(r"https?://", page)
    assert not re.findall(r"<link|@import|url\(|\bsrc=(?!x onerror)", unescape(page))
    assert "default-src 'none'" in page


@pytest.mark.parametrize("objectives", [("accuracy",), ("seconds", "accuracy"), ("accuracy", "parameters")])
def test_one_and_two_objectives(tmp_path, objectives):
    page = write(tmp_path / "report.html", objectives=objectives, study=make_study(TRIALS, objectives))
    assert figures(page)[-4:] == ["tradeoff", "epochs", "time", "best"]
    assert ("pareto" in figures(page)) == (len(objectives) == 2) and "scatter3d" not in without_plotly(page)


def test_figure_of_optuna_has_our_hover_text(tmp_path):
    figure = interactive._pareto(make_study(TRIALS), TRIALS, OBJECTIVES)
    texts = {trace.name: list(trace.text) for trace in figure.data}
    assert texts["Pareto front"] == [interactive._hover(TRIALS[number]) for number in (1, 2, 8)]
    assert texts["complete trials"] == [interactive._hover(TRIALS[number]) for number in (0, 3)]


def test_what_lies_below_the_axis_is_marked_and_named(tmp_path):
    good = [solution(number, f"good {number}", 0.99 + number / 1000) for number in range(8)]
    poor = [solution(8, "poor & bad", 0.3, seconds=10.0), solution(9, "poor & bad", 0.2, seconds=100.0)]
    found = interactive.draw_figures([*good, *poor], good, OBJECTIVES, None)
    heading, note, figure = found["tradeoff"]
    assert note.endswith(
        " Triangles lie below the axis, and a double-click shows all: poor &amp; bad (20.00 %, 30.00 %)."
    )
    marks = [mark for mark in figure.layout.annotations if mark.text == "\u25bc"]
    assert [(mark.x, mark.y, mark.yref) for mark in marks] == [(1, 0, "y domain"), (2, 0, "y domain")]  # of a log axis
    assert "accuracy 30.00 %" in marks[0].hovertext and {mark.font.color for mark in marks} == {interactive._COLORS[8]}

    heading, note, figure = found["epochs"]
    assert "poor &amp; bad (30.00 %)" in note  # the best of the name
    assert [(mark.x, mark.hovertext) for mark in figure.layout.annotations] == [
        (1, "poor &amp; bad: 28.00 %"), (2, "poor &amp; bad: 29.00 %"), (3, "poor &amp; bad: 30.00 %")
    ]  # fmt: skip
    for _, note, figure in interactive.draw_figures(good, good, OBJECTIVES, None).values():
        assert "below the axis" not in note and not figure.layout.annotations


def test_bars_of_times_say_accuracies_while_there_is_room():
    *_, figure = interactive.draw_figures(TRIALS[:4], [], OBJECTIVES, None)["best"]
    texts = [text for trace in figure.data for text in trace.text]
    assert texts == ["0<br>99&#8239;%", "1<br>98.5&#8239;%", "2<br>99.2&#8239;%", "3<br>91&#8239;%"]
    *_, figure = interactive.draw_figures([solution(n) for n in range(25)], [], OBJECTIVES, None)["best"]
    assert list(figure.data[0].text) == [str(n) for n in range(25)]
    assert list(figure.layout.xaxis.ticktext) == ["fixed<br>best 99.00 %"]


def test_cautions_stand_on_top(tmp_path):
    page = write(tmp_path / "report.html", cautions=["3 trials are complete", HOSTILE])
    assert "<h2>Before you compare</h2><ul><li>3 trials are complete.</li>" in page
    assert page.index("Before you compare") < page.index("Pareto front</h2>")
    assert escape(HOSTILE[0] + HOSTILE[1:]) in page and "<script>alert" not in without_plotly(page)
    assert "Before you compare" not in write(tmp_path / "report.html")


def test_curves_show_the_best_trial_of_each_name():
    figure = interactive._curves(
        [t for t in TRIALS if t.history], dict.fromkeys([t.name for t in TRIALS], "#123456"), 1, ""
    )
    lines = {trace.hovertext[0].split("</b>")[0]: (trace.line.width, list(trace.x)) for trace in figure.data}
    assert lines["<b>trial 2"] == (3, [40 / 3, 80 / 3, 40]) and lines["<b>trial 3"][0] == 1
    assert lines["<b>trial 4"][0] == 1  # stopped


@pytest.mark.parametrize("trials", [[], TRIALS[4:8]])
def test_without_complete_trials_it_says_so(tmp_path, trials):
    page = write(tmp_path / "report.html", trials, study=make_study(trials), command="")
    assert "No trial is complete yet" in page and figures(page) == [] and len(page) < 20_000
    assert len(rows(page)) == len(trials)


def test_missing_values_are_left_out(tmp_path):
    bare = [
        Solution(0, "a", "complete"),
        Solution(1, "a", "complete", accuracy=float("nan"), seconds=1.0),
        Solution(2, "b", "complete", accuracy=0.9, seconds=0.0),
        Solution(3, "b", "complete", accuracy=0.9, seconds=2.0, options={"lr": None, "x": [1] * 99}),
    ]
    write_report(tmp_path / "r.html", bare, bare[3:], title="", facts={}, objectives=("accuracy",))
    page = (tmp_path / "r.html").read_text("utf-8")
    assert figures(page) == ["tradeoff"] and len(rows(page)) == 4
    assert rows(page)[1][3] == "" and "nan" not in without_plotly(page)


def test_undecodable_names_of_files_are_written(tmp_path):
    assert "\\udcff" in write(tmp_path / "r.html", [replace(TRIALS[0], folder="a\udcff", options={"x": "\udcff"})])


def test_import_needs_neither_plotly_nor_optuna(tmp_path, monkeypatch):
    for name in ("plotly", "plotly.io", "optuna"):
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(interactive)
    module = importlib.reload(sys.modules["capszoo.figures.page"])
    with pytest.raises(ImportError, match=r'reports need plotly: pip install "capszoo\[explore\]"'):
        module.write_report(tmp_path / "r.html", TRIALS, [], title="", facts={}, objectives=())
    assert list(tmp_path.iterdir()) == []


# Sorts the last table by seconds, both ways, and colours by parameters; what it did is read from the page's end.
DRIVE = """<script>
const table = [...document.querySelectorAll(".sortable")].pop();
const order = () => [...table.querySelectorAll("[data-trial]")].map(row => row.dataset.trial).join(" ");
const orders = [5, 5, 1].map(column => { table.tHead.rows[0].cells[column].firstChild.click(); return order(); });
document.querySelectorAll("#tradeoff .updatemenu-button")[1].dispatchEvent(new MouseEvent("click", {bubbles: true}));
document.body.dataset.orders = orders.join("/");
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("webgl", [True, False], ids=["webgl", "no-webgl"])
def test_browser_shows_it_without_errors(tmp_path, webgl):
    page = write(tmp_path / "report.html", study=make_study(TRIALS))
    (tmp_path / "driven.html").write_text(page.replace("</body>", DRIVE + "</body>"), "utf-8")
    graphics = ["--enable-unsafe-swiftshader"] if webgl else ["--disable-3d-apis"]
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", *graphics, "--virtual-time-budget=3000",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
        (tmp_path / "driven.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    # Chromium logs messages and errors of scripts alike. It warns about WebGL, and plotly where there is none.
    harmless = re.compile("webgl|GL Driver|willReadFrequently", re.IGNORECASE)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and not harmless.search(line)]
    assert console == []
    shown = without_plotly(done.stdout)
    assert len(re.findall('class="plotly-graph-div js-plotly-plot"', shown)) == 5
    assert set(re.findall(r'<div id="(\w+)" class="plotly-graph-div', shown)) == set(figures(page))
    assert shown.count('class="main-svg"') >= 10 and shown.count('class="point"') >= 10
    assert ("WebGL is not supported" in shown) == (not webgl)
    assert sorted(rows(shown)) == list(range(9)) and rows(shown) == rows(page)
    # Missing values come last either way; names are sorted as text.
    orders = re.search(r'data-orders="([^"]*)"', shown)[1].split("/")
    assert orders == ["4 1 5 8 2 3 0 6 7", "0 3 2 5 8 1 4 6 7", "8 5 6 0 1 4 3 2 7"]
    assert ">parameters</text>" in shown
