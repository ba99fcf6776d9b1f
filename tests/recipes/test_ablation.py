"""Routing against uniform couplings: pairs of rows, their measures, and going on."""

import csv

import pytest

import capszoo
from capszoo.errors import UsageError
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
    ],
)
def test_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        ablation.main([*SMALL[:8], *arguments, "--results", "gain.csv"])


def test_every_family_with_routing_has_a_uniform_twin():
    for name in capszoo.list_models(exclude_filters="cnn_*"):
        twin = capszoo.create_model(name, **uniform_arguments(name), device="meta")
        assert twin.arguments() != capszoo.create_model(name, device="meta").arguments()
