"""Models with their weights, from a name or a file."""

import pytest
import torch

import capszoo
from capszoo.errors import UsageError
from capszoo.opening import load_data_for, open_model


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
