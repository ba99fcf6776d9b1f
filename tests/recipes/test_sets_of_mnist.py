"""multi_mnist and mnist_affine through the recipes, made of a tiny set in MNIST's format."""

import json
from pathlib import Path

import pytest

import capszoo
from capszoo.data import Loader, load_data
from capszoo.engine import evaluate

OPTIONS = "--policy fixed --epochs 1 --lr 0.003 --batch-size 8 --amp none --device cpu --data-dir data --output run"


def train(recipe, dataset):
    arguments = f"--dataset {dataset} {OPTIONS} --model-kwargs conv_dim=4 num_types=2".split()
    assert recipe("train").main(arguments) == 0
    return json.loads(Path("run/result.json").read_text()), capszoo.load_model("run/best.safetensors")


def validate(recipe, *arguments):
    assert recipe("validate").main([*arguments, "--data-dir", "data", "--device", "cpu", "--json", "v.json"]) == 0
    return json.loads(Path("v.json").read_text())


def test_pairs(write_mnist, tmp_path, recipe, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data")
    result, model = train(recipe, "multi_mnist")
    assert f"k longest {result['test_exact_top_k']:.4f}" in capsys.readouterr().out
    data = load_data("multi_mnist", "data")
    data.normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    expected = evaluate(model, Loader(data.test, 20, "cpu", with_parts=True))
    found = validate(recipe, "run")
    for key in ("exact_top_k", "reconstruction_error", "mean_average_precision"):
        assert found[key] == pytest.approx(getattr(expected, key)) == pytest.approx(result[f"test_{key}"])
    pruning = "run --keep types=1 --epochs 1 --amp none --device cpu --data-dir data --output pruned"
    assert recipe("prune").main(pruning.split()) == 0
    assert json.loads(Path("pruned/result.json").read_text())["types"] == 1


def test_moved_digits(write_mnist, tmp_path, recipe, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data")
    result, model = train(recipe, "mnist_affine")
    assert model.img_size == (40, 40) and json.loads(Path("run/result.json").read_text()) == result
    found = validate(recipe, "run", "--robustness")
    assert found["top1"] == result["test_top1"] and 0 <= found["top1_affine"] <= 1
    assert validate(recipe, "run", "--split", "val")["images"] == 4 and "canvas" not in caplog.text
