"""recipes/validate.py: one file, and the tables of all shipped weights."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

import capszoo
from capszoo.command_line import run
from capszoo.data import Loader, load_data
from capszoo.engine import CapsuleTask, evaluate
from capszoo.engine.criteria import criterion_header
from capszoo.engine.robustness import ROBUSTNESS_COLUMNS, measure_robustness
from capszoo.losses import MarginLoss
from capszoo.recipes import validate as validate_recipe


@pytest.fixture
def validate(recipe, capsys):
    """Run the recipe as a shell would: what it printed, or the one line of an error."""

    def call(*argv):
        with pytest.raises(SystemExit) as ended:
            run(lambda: recipe("validate").main([str(word) for word in argv]))
        out, err = capsys.readouterr()
        if ended.value.code:
            assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out
        return out or err

    return call


@pytest.fixture(scope="module")
def digits():
    return load_data("digits").test


def test_all(validate, ship, make_run, digits, tmp_path, capsys):
    ship("capsnet_tiny.digits")
    also = [make_run("cnn_baseline_tiny", "digits", seed=seed, conv_dim=4) for seed in (3, 4)]
    other = make_run("capsnet_tiny", "mnist", seed=9, conv_dim=4)
    folder = tmp_path / "results"
    capsys.readouterr()
    out = validate("--all", "--also", *also, other, "--dataset", "digits", "--results-dir", folder, "--device", "cpu")
    assert [p.name for p in folder.iterdir()] == ["results-digits.csv"] and "results-digits.csv" in out
    rows = list(csv.DictReader((folder / "results-digits.csv").open()))
    assert list(rows[0]) == list(
        "model top1 margin_loss reconstruction_error param_count param_count_with_decoder macs img_size "
        "images_per_second top1_rotate_15 top1_rotate_30 top1_shift_6 top1_scale_0.8 top1_scale_1.2 top1_affine "
        "precision device "
        "torch capszoo date".split()
    )
    by_name = {row["model"]: row for row in rows}
    assert set(by_name) == {
        "capsnet_tiny.digits",
        "cnn_baseline_tiny",
        "cnn_baseline_tiny (cnn_baseline_tiny-digits-4)",
    }
    assert [float(row["top1"]) for row in rows] == sorted((float(row["top1"]) for row in rows), reverse=True)

    row = by_name["capsnet_tiny.digits"]
    model = capszoo.create_model("capsnet_tiny.digits", pretrained=True, decoder=True)
    expected = evaluate(model, Loader(digits, 256, "cpu"))
    assert float(row["top1"]) == expected.top1
    assert float(row["margin_loss"]) == pytest.approx(expected.margin_loss, rel=1e-5)
    assert float(row["reconstruction_error"]) == pytest.approx(expected.reconstruction_error, rel=1e-5)
    for key, value in measure_robustness(model, Loader(digits, 100, "cpu")).items():
        assert float(row[key]) == pytest.approx(value, abs=0.01)
    assert (row["param_count"], row["param_count_with_decoder"]) == ("347488", "458032")
    assert int(row["macs"]) == capszoo.model_info("capsnet_tiny").macs and row["img_size"] == "28"
    assert float(row["images_per_second"]) > 0 and row["precision"] == "float32" and row["device"] == "cpu"
    assert row["torch"] == torch.__version__ and row["capszoo"] == capszoo.__version__

    cnn = by_name["cnn_baseline_tiny"]
    assert cnn["reconstruction_error"] == "" and cnn["param_count"] == cnn["param_count_with_decoder"]
    assert all(0 <= float(cnn[key]) <= 1 for key in ROBUSTNESS_COLUMNS)


def test_all_without_robustness(validate, make_run, weights_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(capszoo, "list_pretrained", lambda: [])
    file = make_run("cnn_baseline_tiny", "digits", conv_dim=4)
    validate("--all", "--also", file, "--results-dir", tmp_path, "--no-robustness", "--amp", "bf16", "--device", "cpu")
    (row,) = csv.DictReader((tmp_path / "results-digits.csv").open())
    assert row["top1_shift_6"] == "" and row["precision"] == "bfloat16"


def test_nothing_is_written_before_all_data_is_there(validate, ship, tmp_path, capsys):
    ship("capsnet_tiny.digits", "capsnet_tiny.mnist")
    capsys.readouterr()
    message = validate("--all", "--data-dir", tmp_path / "nowhere", "--results-dir", tmp_path / "results")
    assert "data set 'mnist' not found" in message and "--data-dir" in message and "--download" in message
    assert not (tmp_path / "results").exists()


def test_shipped_by_name(validate, ship, tmp_path, capsys):
    ship("capsnet_tiny.digits")
    capsys.readouterr()
    out = validate("capsnet_tiny.digits", "--robustness", "--json", tmp_path / "v.json")
    assert out.startswith("capsnet_tiny.digits on digits test (360 images)")
    measured = json.loads((tmp_path / "v.json").read_text())
    assert set(ROBUSTNESS_COLUMNS) < set(measured) and measured["reconstruction_error"] > 0
    for key in ROBUSTNESS_COLUMNS:
        assert f"{key} {measured[key]:.4f}" in out
    assert "top1_shift_6" not in validate("capsnet_tiny.digits")


def test_file_of_a_model_without_decoder(validate, make_run):
    out = validate(make_run("cnn_baseline_tiny", "digits", conv_dim=4))
    assert out.startswith("cnn_baseline_tiny ") and "reconstruction error - (no decoder)" in out


def test_the_loss_is_that_of_the_training(validate, digits, tmp_path):
    """Margins go into the header; weights of before were trained with the paper's."""
    model = capszoo.create_model("capsnet_tiny", conv_dim=8, num_types=2)
    criterion = MarginLoss(0.8, 0.2, 0.7)
    losses = {}
    for name, facts in {"old": {}, "new": criterion_header(criterion), "same": criterion_header(MarginLoss())}.items():
        capszoo.save_model(tmp_path / f"{name}.safetensors", model, dataset="digits", **facts)
        validate(tmp_path / f"{name}.safetensors", "--json", tmp_path / "v.json", "--device", "cpu")
        losses[name] = json.loads((tmp_path / "v.json").read_text())["margin_loss"]
    digits.mean, digits.std = (0.0,), (1.0,)
    for name, expected in {"old": MarginLoss(), "new": criterion, "same": MarginLoss()}.items():
        task = CapsuleTask(model, expected, verbose=False)
        assert losses[name] == pytest.approx(evaluate(task, Loader(digits, 256, "cpu")).loss, rel=1e-5)
    assert losses["old"] != losses["new"]


def test_the_validation_split_is_that_of_the_training(validate, tmp_path, caplog):
    file, model = tmp_path / "w.safetensors", capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2)
    capszoo.save_model(file, model, dataset="digits", val_fraction=0.3)
    own = load_data("digits", val_fraction=0.3).val
    out = validate(file, "--split", "val", "--device", "cpu")
    assert f"on digits val ({len(own)} images)" in out and not caplog.records
    validate(file, "--split", "val", "--val-fraction", "0.1", "--device", "cpu")
    assert "trained with --val-fraction 0.3: of the validation split of 0.1 they know images" in caplog.text


@pytest.mark.parametrize("text", ["null", "[]", '{"name": "spread"}', '{"name": "margin"}', "{", '"margin"',
                                  '{"name": "margin", "m_plus": "a", "m_minus": 0.1, "lambda": 0.5}',
                                  '{"name": "margin", "m_plus": 0.1, "m_minus": 0.9, "lambda": 0.5}'])  # fmt: skip
def test_damaged_criterion(validate, text, tmp_path):
    file = tmp_path / "w.safetensors"
    capszoo.save_model(file, capszoo.create_model("capsnet_tiny"), dataset="digits", criterion=text)
    assert "(its 'criterion' is " in validate(file, "--device", "cpu")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "give either weights"),
        (["--all", "x.safetensors"], "give either weights"),
        (["x.safetensors", "--also", "y"], "--also needs --all"),
        (["x.safetensors", "--results-dir", "y"], "--results-dir needs --all"),
        (["--all", "--json", "y"], "--json does not go with --all"),
        (["--all", "--split", "val"], "--split does not go with --all"),
        (["capsnet_tiny.mnist", "--json", "no/v.json"], "--json 'no/v.json' is in a folder that is not there: make it"),
        (["--all", "--model", "capsnet"], "--model does not go with --all"),
        (["capsnet_tiny", "--model", "capsnet"], "'capsnet_tiny' says what model it is, --model capsnet is for files"),
        (["--all"], "no weights are shipped yet: give files with --also"),
        (["--all", "--also", "nowhere.safetensors"], "'nowhere.safetensors' is no file and no shipped weights"),
        (["--all", "--also", "alone.safetensors"], "does not say what model it holds"),
        (["--all", "--also", "digits.safetensors", "--dataset", "mnist"], "no weights are of the data set 'mnist'"),
        (["--al"], "did you mean '--all'"),
    ],
)
def test_wrong_command_line(validate, make_run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(capszoo, "list_pretrained", lambda: [])
    make_run("cnn_baseline_tiny", "digits", conv_dim=4).rename("digits.safetensors")
    capszoo.checkpoint.save_weights("alone.safetensors", capszoo.create_model("cnn_baseline_tiny", conv_dim=4), {})
    assert message in validate(*argv)


def test_many_classes_are_told_one_by_one():
    confusion = torch.zeros(40, 40, dtype=torch.int64)
    confusion[torch.arange(40), torch.arange(40)] = 7
    confusion[3, 5], confusion[3, 8] = 2, 1
    evaluation = SimpleNamespace(confusion=confusion)
    assert not validate_recipe.has_room(evaluation, 80) and validate_recipe.has_room(evaluation, 1000)
    table = validate_recipe.accuracy_table(evaluation, [f"class {j}" for j in range(40)])
    cells = [list(column.cells) for column in table.columns]
    assert [column[3] for column in cells] == ["class 3", "10", "0.7000", "class 5 (2)"]
    assert [column[4] for column in cells] == ["class 4", "7", "1.0000", "-"]


def test_all_measures_each_by_its_own_statistics(validate, tmp_path):
    """Weights of one size share their images, and not how these are normalised."""
    files = []
    for name, mean in (("one", 0.0), ("other", 0.3)):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "best.safetensors")
        torch.manual_seed(0)
        model = capszoo.create_model("cnn_baseline_tiny", conv_dim=4)
        capszoo.save_model(files[-1], model, dataset="digits", mean=[mean], std=[0.5])
    expected = []
    for file in files:
        validate(file, "--data-dir", "data", "--device", "cpu", "--json", tmp_path / "one.json")
        expected.append(json.loads((tmp_path / "one.json").read_text())["margin_loss"])
    options = ["--dataset", "digits", "--no-robustness", "--results-dir", tmp_path, "--device", "cpu"]
    validate("--all", "--also", *files, *options)
    rows = {row["model"]: row for row in csv.DictReader((tmp_path / "results-digits.csv").open())}
    found = [float(rows[name]["margin_loss"]) for name in ("cnn_baseline_tiny", "cnn_baseline_tiny (other)")]
    assert found == pytest.approx(expected, rel=1e-5) and abs(found[0] - found[1]) > 1e-4
