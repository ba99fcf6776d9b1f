"""Routing against uniform couplings: pairs of rows, their measures, and going on."""

import csv

import pytest

import capszoo
from capszoo.errors import DataError, UsageError
from capszoo.recipes import ablation
from capszoo.registry import uniform_arguments

SMALL = ["--dataset", "digits", "--epochs", "1", "--seeds", "1", "--device", "cpu", "--set", "batch_size=128"]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_pair_of_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL, "--models", "capsnet_tiny", "--results", "gain.csv"]
    assert ablation.main(argv) == 0
    routing, uniform = read("gain.csv")
    assert (routing["couplings"], uniform["couplings"]) == ("routing", "uniform")
    assert float(uniform["entropy"]) == 1.0 and 0.9 < float(routing["entropy"]) < 1.0
    assert routing["parameters"] == uniform["parameters"]
    assert all(float(row["top1"]) > 0.2 and float(row["step_ms"]) > 0 for row in (routing, uniform))
    assert not list((tmp_path / "runs/ablation").iterdir()), "finished trainings leave nothing"
    capsys.readouterr()
    assert ablation.main(argv) == 0 and "gain.csv has all of these rows" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL, "--models", "efficient_capsnet", "--results", "gain.csv"]
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(ablation.StopSignal, "__call__", lambda self: asked.append(1) or len(asked) == 3, raising=False)
        patch.setattr(ablation.StopSignal, "exit_code", 143, raising=False)
        assert ablation.main(argv) == 143
    assert not (tmp_path / "gain.csv").exists() and len(list((tmp_path / "runs/ablation").iterdir())) == 1
    assert ablation.main(argv) == 0 and len(read("gain.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "cnn_baseline"], "^'cnn_baseline' has no form with uniform couplings: choose a model with"),
        (["--set", "epochs=3"], r"^--set epochs=\.\.\. is an option of this recipe: give it as --epochs$"),
        (["--set", "nothing=3"], "nothing"),
        (["--set", "val_fraction=2"], "val_fraction=2.0 is out of range"),
    ],
)
def test_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, DataError), match=message):
        ablation.main([*SMALL[:8], *arguments, "--results", "gain.csv"])


def test_every_family_with_routing_has_a_uniform_twin():
    for name in capszoo.list_models(exclude_filters="cnn_*"):
        twin = capszoo.create_model(name, **uniform_arguments(name), device="meta")
        assert twin.arguments() != capszoo.create_model(name, device="meta").arguments()


def test_trainings_of_other_options_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"model": "capsnet_tiny", "couplings": "routing", "dataset": "/pets/cats", "epochs": 3, "seed": 0}
    rows = [
        {**row, "options": "lr=0.1"},
        {**row, "options": "lr=0.2"},
        {**row, "dataset": "/cats", "options": "lr=0.1"},
    ]
    folders = [ablation.folder_of(each, "work") for each in rows]
    assert len(set(folders)) == 3 and all(folder.parent.name == "work" for folder in folders)
    assert folders[0] == ablation.folder_of(rows[0], "work") and folders[0].name.startswith(
        "capsnet_tiny-routing-cats-3-"
    )


def test_a_table_that_cannot_be_written_is_told_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="no table can be made at 'file/gain.csv'"):
        ablation.main([*SMALL, "--models", "capsnet_tiny", "--results", "file/gain.csv"])
    assert not (tmp_path / "runs").exists()
