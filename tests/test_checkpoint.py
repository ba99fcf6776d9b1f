"""Checkpoints: round trips, damage, and writes that are whole or absent."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import capszoo
from capszoo import checkpoint
from capszoo.checkpoint import load_weights, save_weights
from capszoo.engine.run_state import load_state, save_state
from capszoo.errors import CheckpointError
from capszoo.files import write_json


@pytest.fixture
def model():
    return capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, decoder=True)


def message(call, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers(0, 9) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(tree=st.dictionaries(st.text(min_size=1, max_size=4), trees, max_size=4))
@settings(max_examples=60, deadline=None)
def test_state_round_trip(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    save_state(path, {"tree": tree})
    assert load_state(path) == {"tree": tree}


def test_state_keeps_tensors_bit_for_bit(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3, 5))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    save_state(tmp_path / "s.safetensors", {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()})
    loaded = load_state(tmp_path / "s.safetensors")
    before = optimizer.state_dict()
    assert loaded["optimizer"]["state"].keys() == before["state"].keys()  # integers stay integers
    for key, value in before["state"][0].items():
        assert torch.equal(loaded["optimizer"]["state"][0][key], value)
    assert torch.equal(loaded["rng"], torch.get_rng_state())


class Tied(torch.nn.Module):
    """Two layers of one matrix, and a buffer that is a part of it."""

    def __init__(self):
        super().__init__()
        self.one, self.other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.register_buffer("part", self.one.weight.detach()[1:])


def test_tied_weights(tmp_path):
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    path = tmp_path / "tied.safetensors"
    save_weights(path, model, {})
    load_weights(other, path)
    assert other.other.weight is other.one.weight and torch.equal(other.one.weight, model.one.weight)
    assert torch.equal(other.part, model.one.weight[1:])
    with safe_open(path, "pt") as file:  # any safetensors reader finds all names
        assert set(file.keys()) == {"one.weight", "one.bias", "other.weight", "other.bias", "part"}

    optimizer = torch.optim.Adam(model.parameters())
    model.one(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    save_state(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    state = load_state(path)
    assert list(state["model"]) == list(model.state_dict())
    assert all(torch.equal(state["model"][key], value) for key, value in model.state_dict().items())
    other.load_state_dict(state["model"])
    torch.optim.Adam(other.parameters()).load_state_dict(state["optimizer"])
    assert torch.equal(other.one.weight, model.one.weight)


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.zeros(2, device="meta"), "x' has no values to store, it is torch.strided on meta"),
        (torch.eye(2).to_sparse(), "x' has no values to store, it is torch.sparse_coo on cpu"),
    ],
)
def test_tensors_that_cannot_be_stored(value, message, tmp_path):
    for call in (
        lambda: checkpoint.save_tensors(tmp_path / "w.safetensors", {"x": value}, {}),
        lambda: save_state(tmp_path / "w.safetensors", {"x": value}),
    ):
        with pytest.raises(checkpoint.WriteError, match=f"w.safetensors' cannot be written: .*{message}"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [torch.zeros(2), {1, 2}, {"a": {(1, 2): 3}}])
def test_facts_that_a_header_cannot_hold(model, value, tmp_path):
    with pytest.raises(checkpoint.WriteError, match="its header cannot hold this 'fact' .*: give text, numbers"):
        save_weights(tmp_path / "w.safetensors", model, {"fact": value})
    assert list(tmp_path.iterdir()) == []


def test_state_refuses_what_it_cannot_store(tmp_path):
    with pytest.raises(TypeError, match="set"):
        save_state(tmp_path / "s.safetensors", {"x": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_weights_round_trip_and_header(model, tmp_path):
    path = tmp_path / "w.safetensors"
    model.to(memory_format=torch.channels_last)
    save_weights(path, model, {"model": "capsnet_tiny", "model_args": {"num_classes": 10}, "epoch": 3})
    other = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, decoder=True)
    header = load_weights(other, path)
    assert header["model"] == "capsnet_tiny" and json.loads(header["model_args"]) == {"num_classes": 10}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with safe_open(path, "pt") as file:  # any safetensors reader takes the file
        assert set(file.keys()) == set(model.state_dict())


def test_decoder_is_left_out_silently_but_never_made_up(model, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, model, {})
    plain = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2)
    load_weights(plain, path)
    assert torch.equal(plain.conv1.weight, model.conv1.weight)
    save_weights(path, plain, {})
    assert "decoder" in message(load_weights, model, path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_file_is_refused(model, tmp_path, keep):
    path = tmp_path / "w.safetensors"
    save_weights(path, model, {})
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert "w.safetensors" in message(load_weights, model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_foreign_files_are_refused(model, tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("not a checkpoint")
    assert "text.safetensors" in message(load_weights, model, text)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"fc.weight": torch.zeros(2, 2)}, foreign)
    assert "lacks 'conv1.weight'" in message(load_weights, model, foreign)
    assert "no resume state" in message(load_state, foreign)
    assert "missing.safetensors" in message(load_weights, model, tmp_path / "missing.safetensors")


def test_weights_of_another_shape_change_nothing(model, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, num_classes=7), {"model": "m7"})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    text = message(load_weights, capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2), path)
    assert "m7" in text and "class_caps" in text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_failed_write_keeps_the_old_file_and_no_litter(model, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, model, {"epoch": 1})
    content = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(checkpoint.WriteError, match="w.safetensors.*disk full"):
            save_weights(path, model, {"epoch": 2})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fail)
        with pytest.raises(checkpoint.WriteError, match="w.safetensors.*disk full"):
            save_weights(path, model, {"epoch": 2})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.WriteError, match="'.' cannot be written"):
        save_weights(".", model, {})
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_mean_and_std_of_the_images_come_with_the_weights(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    model_args = {"conv_dim": 4, "num_types": 2, "decoder": True}
    save_weights(path, model, {"model": "capsnet_tiny", "model_args": model_args, "mean": [0.25], "std": (0.5,)})
    load_weights(model, path)
    assert model.pretrained_cfg["mean"] == (0.25,) and model.default_cfg["std"] == (0.5,)
    of_timm = timm.data.resolve_model_data_config(capszoo.load_model(path))
    assert (of_timm["mean"], of_timm["std"]) == ((0.25,), (0.5,))
    for header in ({"mean": "0.25"}, {"std": "[0]"}, {"mean": "[]"}, {"std": '["a"]'}, {"mean": "[NaN]"}):
        save_weights(path, model, header)
        assert "is damaged (its '" in message(load_weights, model, path)


def test_what_is_not_a_file_is_never_replaced(model):
    with pytest.raises(checkpoint.WriteError, match="cannot be written .it is not a file.: give another path"):
        save_weights(os.devnull, model, {})
    assert not os.path.isfile(os.devnull)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        checkpoint.save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    for name in ("a.safetensors", "a.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_tables_are_utf_8_in_any_locale(tmp_path):
    code = "import sys; from pathlib import Path; from capszoo.files import read_rows, write_csv; "
    code += (
        "path = Path(sys.argv[1]); write_csv(path, ['a'], [{'a': 'm\\u00fcsli'}]); print(ascii(read_rows(path, '')))"
    )
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-c", code, str(tmp_path / "t.csv")]
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", "[{'a': 'm\\xfcsli'}]\n")
    assert (tmp_path / "t.csv").read_bytes() == "a\nmüsli\n".encode()
