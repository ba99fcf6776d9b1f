"""Tables of a grid's rows, and the figures that are drawn from them."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from capszoo.errors import UsageError
from capszoo.explore import Solution, compare
from capszoo.explore.comparison import draw_epochs, draw_rows, write_comparison
from capszoo.explore.results import write_reports
from capszoo.figures import plot_accuracy, plot_comparison
from capszoo.precision import device_name

_STUDY = SimpleNamespace(user_attrs={"facts": {"dataset": "mnist"}})
EXPLORATION = SimpleNamespace(study=_STUDY, device=torch.device("cpu"))


def run(number, name, seed, accuracies, state="complete"):
    history = [[epoch, 10.5 * epoch, accuracy] for epoch, accuracy in enumerate(accuracies, 1)]
    best = max(range(len(accuracies)), key=accuracies.__getitem__)
    return Solution(
        number, name, state, options={"seed": seed}, accuracy=accuracies[best], seconds=history[-1][1],
        parameters=1, seconds_to_best=history[best][1], best_epoch=best + 1, history=history, machine="vm:12 A CPU (R)",
    )  # fmt: skip


RUNS = [
    run(0, "baseline", 0, [0.5, 0.9, 0.8]),
    run(1, "one_cycle", 0, [0.4, 0.95]),
    run(2, "baseline", 1, [1 / 3, 0.7, 0.8]),
    run(3, "one_cycle", 1, [0.6, 0.91]),
    run(4, "one_cycle", 2, [0.6], state="interrupted"),
]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path, clock="cpu", runs=RUNS):
    write_comparison(path, EXPLORATION, runs, compare(runs), clock, "python recipes/explore.py")
    return table(path)


def test_the_tables_say_where_and_on_what(tmp_path):
    rows = write(tmp_path / "new/p.csv")
    assert [(row["name"], row["runs"], row["dataset"], row["machine"]) for row in rows] == [
        ("baseline", "2", "mnist", "A CPU (R)"), ("one_cycle", "2", "mnist", "A CPU (R)"),
    ]  # fmt: skip
    assert {row["machine"] for row in write(tmp_path / "p.csv", "at rest")} == {device_name(torch.device("cpu"))}
    epochs = table(tmp_path / "p-epochs.csv")
    assert len(epochs) == 10, "of complete runs alone"
    assert epochs[5] == {
        "name": "baseline", "seed": "1", "epoch": "1", "seconds": "10.5", "accuracy": str(1 / 3),
    }  # fmt: skip


def test_figures_from_the_files_are_those_of_the_runs(tmp_path):
    rows = write(tmp_path / "p.csv")
    published = [{"name": name, "epochs": n, "epoch_seconds": 300} for name, n in (("baseline", 29), ("one_cycle", 24))]
    plot_comparison(rows, published, tmp_path / "own.png")
    assert (tmp_path / "p.png").read_bytes() == (tmp_path / "own.png").read_bytes()
    plot_accuracy(RUNS, tmp_path / "own.png")
    drawn = (tmp_path / "p-accuracy.png").read_bytes()
    assert drawn == (tmp_path / "own.png").read_bytes()
    draw_epochs(tmp_path / "p.csv", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == drawn
    draw_rows(tmp_path / "p.csv", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "p.png").read_bytes()


def test_without_a_baseline_there_are_tables_alone(tmp_path):
    write(tmp_path / "p.csv", runs=[replace(solution, name="row") for solution in RUNS[::2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-epochs.csv", "p.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is no table of results"), ("name,seed\na,0\n", "is no table of epochs .'epoch'."),
     ("name,seed,epoch,seconds,accuracy\na,0,1,2,x\n", "is no table of epochs .could not convert")],
)  # fmt: skip
def test_what_is_no_table_of_epochs(tmp_path, text, message):
    if text is not None:
        (tmp_path / "p-epochs.csv").write_text(text)
    with pytest.raises(UsageError, match=f"p-epochs.csv' {message}.*: write it anew with recipes/explore.py --results"):
        draw_epochs(tmp_path / "p.csv", tmp_path / "p-accuracy.png")
    assert not (tmp_path / "p-accuracy.png").exists()


def test_what_was_chosen_before_does_not_stay(digits, tmp_path, explore, small_space):
    exploration = explore(small_space(digits, 1), digits, tmp_path / "a study", trials=1)
    assert exploration.run()
    (chosen,) = exploration.solutions()
    write_reports(exploration, tmp_path / "a study", chosen)
    first, *_ = (tmp_path / "a study/chosen.yaml").read_text().splitlines()
    assert first == f"# python recipes/train.py --config '{tmp_path / 'a study/chosen.yaml'}'"
    write_reports(exploration, tmp_path / "a study", None)
    assert not (tmp_path / "a study/chosen.yaml").exists()
