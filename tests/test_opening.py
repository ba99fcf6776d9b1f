"""Models with their weights, from a name or a file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import capszoo
from capszoo.errors import DataError, UsageError
from capszoo.opening import OpenedModel, load_data_for, load_split_for, open_model, warn_of_split


def test_shipped_weights():
    opened = open_model("capsnet_tiny.mnist")
    assert (opened.name, opened.dataset) == ("capsnet_tiny.mnist", "mnist") and opened.model.decoder is not None
    assert opened.file.name == "capsnet_tiny.mnist.safetensors" and opened.header["model"] == "capsnet_tiny"
    assert open_model("capsnet_tiny").name == "capsnet_tiny.mnist"  # its default weights
    assert open_model("capsnet_tiny.mnist", decoder=False).model.decoder is None


def test_files(make_run):
    file = make_run("capsnet_tiny", "digits", conv_dim=8)
    opened = open_model(file)
    assert (opened.name, opened.dataset, opened.file) == (f"capsnet_tiny {file}", "digits", file)
    again = capszoo.load_model(file)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in opened.model.state_dict().items())
    assert opened.model.decoder is not None and open_model(file, decoder=False).model.decoder is None
    assert open_model(file, model_name="capsnet_tiny").model.conv1.out_channels == 8
    assert not hasattr(open_model(make_run("cnn_baseline_tiny", "digits")).model, "decoder")


@pytest.mark.parametrize(
    ("source", "model_name", "expected"),
    [
        ("nowhere.safetensors", None, "'nowhere.safetensors' is no file and no shipped weights (there are: capsnet"),
        ("capsnet_tiny.mnist", "capsnet", "says what model it is, --model capsnet is for files: leave it out"),
        ("FILE", "capsnet", "holds weights of the model 'capsnet_tiny': leave out --model capsnet"),
    ],
)
def test_what_cannot_be_opened(source, model_name, expected, make_run):
    source = str(make_run()) if source == "FILE" else source
    with pytest.raises(UsageError) as caught:
        open_model(source, model_name=model_name)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_data_of_a_models_size():
    model = capszoo.create_model("capsnet_tiny", img_size=32)
    assert load_data_for(model, "digits", "data").img_size == (32, 32)
    model.reset_classifier(5)
    with pytest.raises(UsageError, match="'digits' has 10 classes, the model has 5: check --dataset"):
        load_data_for(model, "digits", "data")


def test_run_folders(make_run):
    file = make_run("capsnet_tiny", "digits", conv_dim=8)
    opened = open_model(file.parent)
    assert opened.file == file and opened.dataset == "digits"


def test_files_that_are_named_like_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = capszoo.create_model("capsnet_tiny", conv_dim=8)
    capszoo.save_model("capsnet_tiny.safetensors", model)
    assert open_model("capsnet_tiny.safetensors").model.conv1.out_channels == 8
    (tmp_path / "capsnet_tiny.mnist").mkdir()
    (tmp_path / "capsnet_tiny").mkdir()
    assert open_model("capsnet_tiny.mnist").name == open_model("capsnet_tiny").name == "capsnet_tiny.mnist"


def test_classes_of_other_names_or_order(caplog):
    model = capszoo.create_model("capsnet_tiny")
    names = load_data_for(model, "digits", "data").class_names
    assert not caplog.records
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": (*names[:9], "ten")}
    load_data_for(model, "digits", "data")
    assert "'digits' has classes of other names than the weights, such as '9' where they have 'ten'" in caplog.text
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": (names[1], names[0], *names[2:])}
    with pytest.raises(UsageError, match="classes in another order than the weights, '0' where they have '1'"):
        load_data_for(model, "digits", "data")


def test_a_split_that_has_images_of_the_training(caplog):
    header = {"dataset": "digits", "val_fraction": "0.05"}
    for dataset, fraction in (("mnist", 0.1), ("digits", 0.05)):
        warn_of_split(header, dataset, fraction)
    warn_of_split({"dataset": "digits"}, "digits", 0.1)
    warn_of_split({"dataset": "digits", "val_fraction": "null"}, "digits", 0.1)
    assert not caplog.records
    for fraction in (0.1, 0.02):  # a smaller split is no part of a larger one
        caplog.clear()
        warn_of_split(header, "digits", fraction)
        text = f"trained with --val-fraction 0.05: of the validation split of {fraction} they know images; give --val"
        assert text in caplog.text


def test_the_validation_split_is_that_of_the_training():
    opened = OpenedModel(torch.nn.Identity(), "net", Path("net"), {"val_fraction": "0.3"}, "digits")
    assert [opened.val_fraction("digits"), opened.val_fraction("digits", 0.2)] == [0.3, 0.2]
    assert opened.val_fraction("mnist") == 0.1 and replace(opened, header={}).val_fraction("digits") == 0.1
    assert replace(opened, header={"val_fraction": "0.0"}).val_fraction("digits") == 0


def test_a_run_folder_that_is_named_like_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "capsnet_tiny").mkdir()
    capszoo.save_model("capsnet_tiny/best.safetensors", capszoo.create_model("capsnet_tiny", conv_dim=8))
    with pytest.raises(UsageError, match="a model's name, and that of a run folder here: give ./capsnet_tiny for the"):
        open_model("capsnet_tiny")
    assert open_model("./capsnet_tiny").model.conv1.out_channels == 8
    assert open_model("capsnet_tiny.mnist").name == "capsnet_tiny.mnist"


@pytest.mark.parametrize("layout", ["test", "classes", "broken train"])
def test_test_images_of_a_folder_are_read_alone(layout, tmp_path):
    model = capszoo.create_model("capsnet_tiny", num_classes=3, in_chans=3)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ("cat", "dog", "eel")}
    below = tmp_path if layout == "classes" else tmp_path / "test"
    for name, level in (("eel", 200), ("cat", 100)):
        (below / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), (level, 0, 0)).save(below / name / "a.png")
    if layout == "broken train":
        (tmp_path / "train/cat").mkdir(parents=True)
        (tmp_path / "train/cat/a.png").write_bytes(b"no image")
    split, names = load_split_for(model, str(tmp_path), "data", "test")
    assert names == ["cat", "dog", "eel"] and split.labels.tolist() == [0, 2]
    assert split.images[:, 0, 14, 14].tolist() == [100, 200] and split.image_shape == (3, 28, 28)
    with pytest.raises(DataError):
        load_split_for(model, str(tmp_path), "data", "val")
    if layout != "broken train":
        (below / "fly").mkdir()
        Image.new("RGB", (9, 9)).save(below / "fly/a.png")
        with pytest.raises(
            DataError, match=r"fly' is a class that the weights do not have \(they have cat, dog, eel\)"
        ):
            load_split_for(model, str(tmp_path), "data", "test")
