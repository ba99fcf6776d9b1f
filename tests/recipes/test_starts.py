"""recipes/starts.py: bright colour images that the old start cannot learn, and the table of starts."""

import csv

import pytest
import torch

from capszoo.data import DataSplits, Loader, Split
from capszoo.engine import evaluate
from capszoo.engine.options import options_from
from capszoo.engine.run import make_trainer
from capszoo.engine.watch import measure_saturation


@pytest.fixture
def starts(recipe):
    return recipe("starts")


def splits(starts, kinds, size):
    train, val = (Split(y, x) for x, y in (starts.bright_shapes(90 * kinds, kinds, size, seed) for seed in (0, 1)))
    return DataSplits("shapes", train, val, val, [str(kind) for kind in range(kinds)], kinds, 3, (size, size))


def test_shapes_are_bright_balanced_and_repeat(starts):
    images, labels = starts.bright_shapes(80)
    again, _ = starts.bright_shapes(80)
    other, _ = starts.bright_shapes(80, seed=1)
    assert images.shape == (80, 3, 32, 32) and images.dtype == torch.uint8
    assert images.float().mean() > 0.6 * 255 and torch.bincount(labels).tolist() == [20] * 4
    assert torch.equal(images, again) and not torch.equal(images, other)


def train(starts, **options):
    data = splits(starts, kinds=2, size=20)
    model_kwargs = {"conv_dim": 32, "num_types": 4, "decoder_dims": [16, 32]}
    args = options_from({"epochs": 8, "amp": "none", "model_kwargs": model_kwargs, **options})
    trainer = make_trainer(args, data, torch.device("cpu"))
    trainer.fit()
    model, loader = trainer.task.model, Loader(data.val, 180, "cpu")
    return evaluate(model, loader).top1, measure_saturation(model, next(iter(loader))[0])


def test_defaults_learn_bright_colour_images(starts, caplog):
    top1, saturation = train(starts)
    assert top1 >= 0.9 and saturation.saturated < 0.1 and "saturated" not in caplog.text


def test_the_plain_start_on_pixels_does_not_and_says_so(starts, caplog):
    top1, saturation = train(starts, start="plain", mean=[0.0], std=[1.0], epochs=2)
    assert top1 <= 0.6 and saturation.is_stuck
    assert "of the primary capsules are saturated" in caplog.text and "--start" in caplog.text


def test_the_table_has_a_row_for_each_and_goes_on_where_it_ended(starts, tmp_path, monkeypatch):
    monkeypatch.setattr(starts, "open_set", lambda name, data_dir: splits(starts, 2, 18))
    path = tmp_path / "starts.csv"
    command = ["--sets", "shapes", "--starts", "plain", "default", "--batch-sizes", "60", "--results", str(path)]
    command += ["--lrs", "0.001", "--steps", "2", "--amp", "none"]
    assert starts.main(command) == 0
    rows = list(csv.DictReader(path.open()))
    assert [row["start"] for row in rows] == ["plain", "default"]
    for row in rows:
        assert (row["lr"], row["batch_size"], row["epochs"], row["chance"]) == ("0.001", "60", "1", "0.5")
        assert 0 <= float(row["top1"]) <= 1 and 0 <= float(row["saturated"]) <= 1
    assert starts.main([*command, "--policies", "one_cycle", "--epochs", "1", "--images", "30"]) == 0
    again = list(csv.DictReader(path.open()))
    assert again[:2] == rows and [row["policy"] for row in again] == ["fixed"] * 2 + ["one_cycle"] * 2
    monkeypatch.setattr(starts, "measure", lambda *args: pytest.fail("measured a row again"))
    assert starts.main(command) == 0


def test_rows_say_on_how_many_images_they_train(starts):
    row = {"images": 7680, "epochs": 1, "lr": "0.001"}
    assert starts.of_set(row, 60_000) == row
    assert starts.of_set(row, 360) == {**row, "images": 360, "epochs": 21}
    policy = {"images": 1000, "epochs": 6, "lr": "default"}
    assert starts.of_set(policy, 360) == {**policy, "images": 360}


def test_a_table_that_cannot_be_written_is_told_first(starts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="no table can be made at .*file/starts.csv'"):
        starts.main(["--sets", "shapes", "--results", str(tmp_path / "file/starts.csv")])
