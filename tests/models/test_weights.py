"""Shipped weights: found, checked and loaded, by capszoo and by timm alone, and refused where they are not whole."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import load_tensors
from capszoo.contract import decoder_of
from capszoo.layers import unfold_scales
from capszoo.opening import open_model

ROOT = Path(__file__).parents[2]
both = pytest.mark.parametrize("create", [capszoo.create_model, timm.create_model], ids=["capszoo", "timm"])


def images(in_chans=1, size=28):
    return torch.rand(2, in_chans, size, size, generator=torch.Generator().manual_seed(1))


def stored(name):
    return load_tensors(pretrained.weights_path(name))[0]


def refused(function, *args, **kwargs):
    """The one line in which a ValueError says what is wrong."""
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def equal_to(model, tensors):
    """Keys of the parameters that are those of the file, in the model's type."""
    own = model.state_dict()
    return {
        key for key in own if own[key].shape == tensors[key].shape and torch.equal(own[key], tensors[key].to(own[key]))
    }


def test_names_and_configuration(ship):
    ship("capsnet_tiny.fashion_mnist", "capsnet_tiny.mnist")
    names = ["capsnet_tiny.fashion_mnist", "capsnet_tiny.mnist"]
    assert capszoo.list_pretrained() == names == list(capszoo.model_info("capsnet_tiny").weights)
    assert capszoo.list_pretrained("capsnet") == [] and capszoo.model_info("capsnet").weights == ()
    assert set(names) <= set(timm.list_pretrained("capsnet*"))
    model = capszoo.create_model("capsnet_tiny")
    cfg = model.pretrained_cfg
    entry = json.loads((pretrained.WEIGHTS_DIR / "weights.json").read_text())["capsnet_tiny.mnist"]
    assert cfg["tag"] == "mnist" and cfg["file"] == str(pretrained.weights_path("capsnet_tiny.mnist"))
    assert cfg["notes"][0] == f"sha256 {entry['sha256']}"
    assert cfg["num_classes"] == 10 and cfg["input_size"] == (1, 28, 28) and cfg["pool_size"] == (6, 6)
    classes = tuple(f"class {i}" for i in range(10))
    assert tuple(timm.get_pretrained_cfg("capsnet_tiny.mnist").label_names) == classes and cfg["license"] == "mit"
    assert "label_names" not in cfg, "it has not learnt these classes"
    assert capszoo.create_model("capsnet_tiny", pretrained=True).pretrained_cfg["label_names"] == classes
    assert timm.get_pretrained_cfg("capsnet.untrained").tag == "untrained"  # as before, where there is nothing
    assert "capsnet_tiny.untrained" not in timm.models.get_arch_pretrained_cfgs("capsnet_tiny")


@both
def test_load(ship, create):
    ship("capsnet_tiny.fashion_mnist", "capsnet_tiny.mnist")
    for name, file in (
        ("capsnet_tiny", "capsnet_tiny.mnist"),
        ("capsnet_tiny.mnist", "capsnet_tiny.mnist"),
        ("capsnet_tiny.fashion_mnist", "capsnet_tiny.fashion_mnist"),
    ):
        tensors = stored(file)
        assert {value.dtype for value in tensors.values()} == {torch.float16}
        model = create(name, pretrained=True, decoder=True).eval()
        assert equal_to(model, tensors) == set(tensors)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.reconstruct(images()).shape == (2, 1, 28, 28)
        plain = create(name, pretrained=True).eval()
        assert plain.decoder is None and torch.equal(plain(images()), model(images()))
        assert not torch.equal(create(name)(images()), model(images()))


@both
@pytest.mark.parametrize(
    "change, anew",
    [
        (dict(num_classes=4), {"class_caps.weight", "class_caps.bias"}),
        (dict(in_chans=3), {"conv1.weight", "decoder.fc3.weight", "decoder.fc3.bias"}),
        (dict(img_size=20), {"decoder.fc3.weight", "decoder.fc3.bias"}),
        (dict(dtype=torch.bfloat16), set()),
        (dict(num_classes=0), set()),
        (dict(features_only=True), set()),
    ],
)
def test_load_for_another_task(ship, create, change, anew):
    ship("capsnet_tiny.mnist")
    tensors = stored("capsnet_tiny.mnist")
    model = create("capsnet_tiny", pretrained=True, decoder=True, **change).eval()
    x = images(change.get("in_chans", 1), change.get("img_size", 28)).to(change.get("dtype", torch.float32))
    if change == dict(features_only=True):
        assert len(model(x)) == 3
        model = model.model
    assert equal_to(model, tensors) == set(model.state_dict()) - anew
    if "features_only" not in change:
        assert model(x).shape[1] == change.get("num_classes", 10) or change["num_classes"] == 0
        assert model(x).isfinite().all()


def test_weights_of_other_images(ship):
    """Classes, channels and size of the weights are the defaults of their tag, not of others."""
    ship("capsnet_tiny.mnist")
    ship("capsnet_tiny.shapes", num_classes=3, in_chans=2, img_size=[20, 22])
    model = capszoo.create_model("capsnet_tiny.shapes", pretrained=True, decoder=True).eval()
    assert (model.num_classes, model.in_chans, model.img_size) == (3, 2, (20, 22))
    assert model.pretrained_cfg["pool_size"] == model.grid_size
    assert equal_to(model, stored("capsnet_tiny.shapes")) == set(model.state_dict())
    assert capszoo.create_model("capsnet_tiny").img_size == (28, 28)


def test_models_without_weights_on_mnist_keep_their_defaults(ship):
    ship("capsnet_tiny.shapes", num_classes=3, in_chans=2, img_size=[20, 22])
    model = capszoo.create_model("capsnet_tiny")
    assert model.pretrained_cfg["tag"] == "untrained" and model.num_classes == 10 and model.img_size == (28, 28)
    assert capszoo.list_pretrained() == ["capsnet_tiny.shapes"]
    message = refused(capszoo.create_model, "capsnet_tiny", pretrained=True)
    assert message == "no weights are shipped for 'capsnet_tiny' alone, did you mean 'capsnet_tiny.shapes'?"
    assert capszoo.create_model("capsnet_tiny.shapes", pretrained=True).num_classes == 3


def test_pretrained_cfg_as_a_dict(ship):
    """As timm's scripts pass it on."""
    ship("capsnet_tiny.mnist")
    args = timm.models.resolve_model_input_args("capsnet_tiny.mnist", {"in_chans": 3})
    model = timm.create_model(pretrained=True, **args)
    assert model.in_chans == 3 and "class_caps.weight" in equal_to(model, stored("capsnet_tiny.mnist"))


def test_unknown_tags(ship):
    ship("capsnet_tiny.mnist")
    message = refused(capszoo.create_model, "capsnet_tiny.mnst", pretrained=True)
    assert message.startswith("unknown weights 'capsnet_tiny.mnst', did you mean 'capsnet_tiny.mnist'?")
    with pytest.raises(RuntimeError, match="mnst"):
        timm.create_model("capsnet_tiny.mnst", pretrained=True)
    assert "no weights are shipped for 'capsnet'" in refused(capszoo.create_model, "capsnet", pretrained=True)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for capsnet"):
        timm.create_model("capsnet", pretrained=True)


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@both
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: flip(content, len(content) - 1000),
        lambda content: flip(content, 100),
        lambda content: flip(content, 0),
        lambda content: content[:-1],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: content + b"\0",
    ],
    ids=["tensor", "header", "length", "end", "start", "empty", "more"],
)
def test_damaged_file(ship, create, damage):
    ship("capsnet_tiny.mnist")
    path = pretrained.weights_path("capsnet_tiny.mnist")
    path.write_bytes(damage(path.read_bytes()))
    for name in ("capsnet_tiny", "capsnet_tiny.mnist"):
        message = refused(create, name, pretrained=True)
        assert message.startswith("the shipped weights 'capsnet_tiny.mnist' are damaged: ") and str(path) in message
        assert message.endswith("install capszoo anew")
    create("capsnet_tiny")  # nobody asked for them


@both
def test_swapped_files(ship, create):
    ship("capsnet_tiny.mnist", "capsnet_tiny.fashion_mnist")
    one, other = map(pretrained.weights_path, ("capsnet_tiny.mnist", "capsnet_tiny.fashion_mnist"))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    message = refused(create, "capsnet_tiny", pretrained=True)
    assert "holds the weights 'capsnet_tiny.fashion_mnist' instead of 'capsnet_tiny.mnist'" in message


@both
def test_file_that_vanished(ship, create):
    ship("capsnet_tiny.mnist")
    pretrained.weights_path("capsnet_tiny.mnist").unlink()
    message = refused(create, "capsnet_tiny", pretrained=True)
    assert message.startswith("the shipped weights 'capsnet_tiny.mnist' are missing")


def test_entries_without_file_and_files_without_entry(ship):
    ship("capsnet_tiny.mnist", "capsnet_tiny.fashion_mnist")
    pretrained.weights_path("capsnet_tiny.fashion_mnist").unlink()
    shutil.copy(pretrained.weights_path("capsnet_tiny.mnist"), pretrained.weights_path("capsnet_tiny.mine"))
    ship()
    assert capszoo.list_pretrained() == ["capsnet_tiny.mnist"]


def test_damaged_table(weights_dir):
    (weights_dir / "weights.json").write_text('{"capsnet_tiny.mnist": {"sha')
    assert "weights.json' is damaged" in refused(pretrained.read_table)
    (weights_dir / "weights.json").unlink()
    assert pretrained.read_table() == {}


@both
def test_another_architecture(ship, create):
    ship("capsnet_tiny.mnist")
    overlay = dict(file=str(pretrained.weights_path("capsnet_tiny.mnist")))
    message = refused(create, "capsnet_ws", pretrained=True, pretrained_cfg_overlay=overlay)
    assert message.startswith("these weights do not fit 'capsnet_ws': ") and " has shape " in message


@both
def test_files_of_users_are_not_checked(ship, create, tmp_path, caplog):
    ship("capsnet_tiny.mnist")
    path, copy = pretrained.weights_path("capsnet_tiny.mnist"), tmp_path / "capsnet_tiny.mnist.safetensors"
    content = path.read_bytes()
    copy.write_bytes(flip(content, len(content) - 1000))
    path.write_bytes(b"")  # not looked at when a file or tensors are given
    caplog.set_level(logging.WARNING)
    model = create("capsnet_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=str(copy)), decoder=True)
    assert equal_to(model, load_tensors(copy)[0]) == set(model.state_dict()) and not caplog.records
    state_dict = {key: value + 1 for key, value in model.state_dict().items()}
    other = create("capsnet_tiny", pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict), decoder=True)
    assert equal_to(other, state_dict) == set(state_dict)


def test_relative_path_of_a_shipped_file_is_checked_too(ship, monkeypatch):
    ship("capsnet_tiny.mnist")
    path = pretrained.weights_path("capsnet_tiny.mnist")
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.chdir(path.parent)
    overlay = dict(file=path.name)
    assert "damaged" in refused(capszoo.create_model, "capsnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay)


def test_files_describe_themselves(ship):
    """`load_model` takes a shipped file as it takes that of a run."""
    ship("capsnet_tiny.mnist")
    model = capszoo.load_model(pretrained.weights_path("capsnet_tiny.mnist"))
    assert equal_to(model, stored("capsnet_tiny.mnist")) == set(model.state_dict()) and model.decoder is not None


def test_installed_package(ship, weights_dir, tmp_path):
    """As a wheel leaves it: a folder of the interpreter's, weights inside, no network and no repository."""
    ship("capsnet_tiny.mnist")
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "weights.json")
    shutil.copytree(ROOT / "capszoo", site / "capszoo", ignore=ignored)
    if not (site / "capszoo/kernels").is_dir():
        shutil.copytree(ROOT / "kernels", site / "capszoo/kernels", ignore=ignored)
    shutil.copytree(weights_dir, site / "capszoo/weights", dirs_exist_ok=True)
    code = """
import socket, sys
def connect(*args): raise OSError("this test has no network")
socket.socket.connect = connect
import timm, torch, capszoo
assert capszoo.__file__.startswith(sys.argv[1]), capszoo.__file__
assert capszoo.list_pretrained() == ["capsnet_tiny.mnist"]
model = timm.create_model("capsnet_tiny", pretrained=True)
other = capszoo.create_model("capsnet_tiny.mnist", pretrained=True)
x = torch.rand(1, 1, 28, 28)
assert torch.equal(model(x), other(x)) and model.pretrained_cfg["file"].startswith(sys.argv[1])
path = model.pretrained_cfg["file"]
content = open(path, "rb").read()
open(path, "wb").write(content[:-1])
try:
    timm.create_model("capsnet_tiny", pretrained=True)
except ValueError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(site)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the shipped weights 'capsnet_tiny.mnist' are damaged")


# What this copy of capszoo ships, whatever that is.


def test_every_shipped_file_is_in_the_table():
    files = {path.name.removesuffix(".safetensors") for path in pretrained.WEIGHTS_DIR.glob("*.safetensors")}
    entries = set(json.loads((pretrained.WEIGHTS_DIR / "weights.json").read_text()))
    assert files == entries == set(capszoo.list_pretrained())
    assert sum(pretrained.weights_path(name).stat().st_size for name in files) <= 50_000_000


@pytest.mark.parametrize("name", capszoo.list_pretrained())
def test_shipped(name):
    path, entry = pretrained.weights_path(name), pretrained.read_table()[name]
    assert pretrained.sha256_of(path) == entry["sha256"]
    with safe_open(path, framework="pt") as file:
        card = file.metadata()
        dtypes = {file.get_tensor(key).dtype for key in file.keys() if not key.endswith("num_batches_tracked")}
        assert dtypes == {torch.float16}
    assert card["model"] == name.split(".")[0] and card["precision"] == "float16"
    words = shlex.split(card["recipe"])
    assert words[0] == "python" and words[1].startswith("recipes/") and not any(Path(w).is_absolute() for w in words)
    # The table has what recipes/validate.py measures of the rounded weights, the card what the run measured.
    assert 0.5 < entry["top1"] == pytest.approx(json.loads(card["test_top1"]), abs=1e-3)
    assert 0.5 < json.loads(card["eval_top1"]) <= 1
    for key in ("capszoo_version", "dataset", "date", "license", "model_args"):
        assert card[key], key
    assert json.loads(card["seed"]) >= 0 and json.loads(card["epochs"]) > 0
    has_decoder = json.loads(card["model_args"]).get("decoder", False)
    model = capszoo.create_model(name, pretrained=True, **({"decoder": True} if has_decoder else {})).eval()
    # A decoder that was not trained is not taken.
    assert (decoder_of(open_model(name).model) is not None) == has_decoder
    assert json.loads(card["class_names"]) == list(model.pretrained_cfg["label_names"]) == entry["label_names"]
    assert len(entry["label_names"]) == model.num_classes
    weights = unfold_scales(stored(name), model)
    assert equal_to(model, weights) == set(model.state_dict()) == set(weights)
    x = torch.rand(2, model.in_chans, *model.img_size)
    assert model(x).shape == (2, model.num_classes) and model(x).isfinite().all()
    if has_decoder:
        assert model.reconstruct(x).isfinite().all()
