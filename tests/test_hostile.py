"""Files that attack: each in the form that would work if nothing stood against it. Random ones are in tests/fuzz."""

import itertools
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.models import save_for_hf

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import load_tensors, save_tensors, save_weights
from capszoo.command_line import OptionParser, add_result, key_value
from capszoo.data import load_data
from capszoo.engine import Trainer
from capszoo.engine.run_state import check_resume_state, load_state, save_state
from capszoo.engine.task import CapsuleTask
from capszoo.files import read_yaml
from capszoo.policies import create_policy

SMALL = dict(img_size=8, kernel_size=3, conv_dim=3, num_types=2, decoder_dims=[3, 4])


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "code ran")


def refused(function, *args, **kwargs) -> str:
    """The one line in which an error says what is wrong."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def bomb(tmp_path):
    """The bytes of a pickle; at the end its code must not have run."""
    yield pickle.dumps(Bomb(tmp_path / "mark"))
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def weights(tmp_path):
    """A file of a model's weights whose header says what is given."""

    def write(name="capsnet_tiny", model="capsnet_tiny", **changes):
        path = tmp_path / "model.safetensors"
        source = capszoo.create_model(model, **SMALL)
        save_weights(path, source, {"model": name, "model_args": {**SMALL, **changes}})
        return path

    return write


# Headers of models.


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 10**12},
        {"conv_dim": 10**9},
        {"img_size": 10**6},
        {"img_size": [10**6, 99]},
        {"num_types": 10**9},
        {"keep_types": 10**9},
        {"kernel_size": 10**6, "img_size": 3 * 10**6},
        {"decoder": True, "decoder_dims": [2**40, 2**40]},
        {"keep_capsules": list(range(8)), "num_types": 10**6},
        {"keep_capsules": [0] * 9},
        {"keep_capsules": [-1]},
        {"keep_capsules": ["0"]},
        {"num_classes": "10"},
        {"num_classes": True},
        {"num_classes": 10.0},
        {"img_size": [8, 8, 8]},
        {"img_size": []},
        {"drop_rate": "x"},
        {"drop_rate": float("nan")},
        {"routing": ["dynamic"]},
        {"share_weights": 1},
        {"nonsense": 1},
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained": True},
        {"name": "capsnet"},
    ],
    ids=str,
)
def test_headers_that_ask_for_another_model(weights, changes):
    path = weights(**changes)
    assert str(path) in refused(capszoo.load_model, path)


def test_shared_matrices_do_not_hide_a_vast_model(weights, tmp_path):
    """Their shapes are the same whatever the size of the images."""
    path = weights(img_size=100_000)
    assert "primary capsules, more than" in refused(capszoo.load_model, path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "null", '"x"', "{", '{"num_classes": ' + "9" * 5000 + "}"])
def test_headers_that_are_no_keywords(tmp_path, text):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {}, {"model": "capsnet_tiny", "model_args": text})
    assert "'model_args' are no JSON object" in refused(capszoo.load_model, path)


@pytest.mark.parametrize("name", ["local-dir:..", "hf-hub:owner/name", "../capsnet", "resnet18", "", "capsnet\n"])
def test_headers_that_name_another_place(weights, name):
    path = weights(name=name)
    assert "unknown model" in refused(capszoo.load_model, path)


def test_headers_name_no_other_file(weights, tmp_path, bomb):
    (tmp_path / "other.pth").write_bytes(bomb)
    overlay = {"file": str(tmp_path / "other.pth"), "url": "http://localhost:1/x"}
    path = weights(pretrained_cfg_overlay=overlay, device="meta", dtype="float16", cache_dir="/", features_only=True)
    model = capszoo.load_model(path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in load_tensors(path)[0].items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_odd_types(tmp_path, dtype):
    model = capszoo.create_model("capsnet_tiny", **SMALL)
    tensors = {key: value.to(dtype) for key, value in model.state_dict().items()}
    save_tensors(tmp_path / "w.safetensors", tensors, {})
    assert "no type of weights" in refused(
        capszoo.create_model, "capsnet_tiny", checkpoint_path=tmp_path / "w.safetensors", **SMALL
    )


# Pickles.


@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin", "weights.pt", "model.safetensors", "weights"])
def test_no_pickle_is_read(tmp_path, bomb, name):
    path = tmp_path / name
    path.write_bytes(bomb)
    assert str(path) in refused(load_tensors, path)
    assert str(path) in refused(capszoo.load_model, path)
    assert str(path) in refused(capszoo.create_model, "capsnet_tiny", checkpoint_path=path)
    for options in ({"pretrained_cfg_overlay": {"file": str(path)}}, {"pretrained_cfg": {"file": str(path)}}):
        refused(capszoo.create_model, "capsnet_tiny", pretrained=True, **options)


def test_no_pickle_is_read_even_without_code(tmp_path):
    torch.save({}, tmp_path / "w.pth")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth")}}
    assert "is no safetensors file: use a safetensors file" in refused(capszoo.create_model, "capsnet_tiny", **options)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "x.pth.tar"])
def test_folders_of_pickles(tmp_path, bomb, name):
    folder = tmp_path / "folder"
    save_for_hf(capszoo.create_model("capsnet_tiny", **SMALL), folder, safe_serialization=True)
    (folder / name).write_bytes(bomb)
    assert capszoo.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 10
    (folder / "model.safetensors").rename(folder / "zz.safetensors")
    assert "is a pickle" in refused(capszoo.create_model, f"local-dir:{folder}", pretrained=True)


def test_sources_on_the_net():
    """Without a network: what is asked for is refused before, or is a safetensors file and nothing else."""
    check = pretrained.check_source
    assert "as a pickle" in refused(check, "capsnet_tiny", {"url": "https://localhost:1/w.pth"})
    assert check("capsnet_tiny", {"hf_hub_id": "a/b"})["hf_hub_filename"] == "model.safetensors"
    for name in ("pytorch_model.bin", "../../x.safetensors", "/etc/x.safetensors"):
        cfg = {"hf_hub_id": "a/b", "source": "hf-hub", "hf_hub_filename": name}
        assert "no safetensors file" in refused(check, "capsnet_tiny", cfg)
    assert (
        check("capsnet_tiny", {"hf_hub_id": "a/b", "source": "hf-hub"}, {"custom_load": "hf"})["custom_load"] is False
    )


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "resnet18"},
        {"architecture": "../capsnet"},
        {"architecture": None},
        {"model_args": {"num_classes": 10**12}},
        {"model_args": {"img_size": 10**6, "share_weights": False}},
        {"model_args": {"conv_dim": 10**5}},
        {"model_args": {"pretrained_cfg_overlay": {"file": "../x.pth"}}},
        {"model_args": {"device": "cuda:7"}},
        {"model_args": {"device": -1}},
        {"model_args": [1]},
        {"model_args": {"pretrained_filter_fn": "x"}},
        {"pretrained_cfg": {"custom_load": True, "file": "../../x", "unknown": 1}},
        {"pretrained_cfg": {"num_classes": 10**12}},
        {"pretrained_cfg": {"input_size": [1, 10**7, 10**7], "fixed_input_size": True}},
        {"pretrained_cfg": []},
    ],
    ids=str,
)
def test_configs_of_folders(tmp_path, change):
    save_for_hf(capszoo.create_model("capsnet_tiny", **SMALL), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    if "pretrained_cfg" in change:
        config.pop("model_args")
        config.pop("num_classes")
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    for load in (False, True):
        assert str(tmp_path) in refused(capszoo.create_model, f"local-dir:{tmp_path}", pretrained=load)


def test_configs_name_no_other_file(tmp_path, bomb):
    save_for_hf(capszoo.create_model("capsnet_tiny", **SMALL), tmp_path / "folder", safe_serialization=True)
    (tmp_path / "x.pth").write_bytes(bomb)
    config = json.loads((tmp_path / "folder/config.json").read_text())
    config["pretrained_cfg"].update(file="../x.pth", url="http://localhost:1/x", source="file", custom_load="hf")
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    model = capszoo.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    expected = load_tensors(tmp_path / "folder/model.safetensors")[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


def test_table_of_weights_names_no_other_file(weights_dir):
    entry = next(iter(json.loads((Path(capszoo.__file__).parent / "weights/weights.json").read_text()).values()))
    for name in ("../capsnet.mnist", "capsnet.mnist/../x", "/etc/capsnet.mnist", "capsnet"):
        (weights_dir / "weights.json").write_text(json.dumps({name: entry}))
        assert "is damaged" in refused(pretrained.read_table)
    for text in (
        json.dumps({"capsnet.mnist": {**entry, "sha256": "x\ny"}}),
        "[" * 100_000,
        "[]",
        '{"capsnet.mnist": 3}',
        '{"capsnet.mnist": {"sha256": 1}}',
    ):
        (weights_dir / "weights.json").write_text(text)
        assert "is damaged" in refused(pretrained.read_table)


# States of runs.


@pytest.mark.parametrize(
    "text",
    [
        '{"__dict__": ' * 5000,
        '{"__tensor__": "missing"}',
        '{"__dict__": [[[], 1]]}',
        '{"__dict__": 3}',
        '{"x": 1}',
        "[]",
        "{",
        "1" * 5000,
    ],
)
def test_states_that_are_none(tmp_path, text):
    path = tmp_path / "resume.safetensors"
    save_tensors(path, {}, {"capszoo": "capszoo.resume.v1", "state": text})
    assert "is damaged" in refused(load_state, path)
    save_tensors(path, {}, {"capszoo": "capszoo.resume.v1"})
    assert "is damaged" in refused(load_state, path)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """What the engine writes after an epoch."""
    folder = tmp_path_factory.mktemp("run")
    data = load_data("digits", img_size=8)
    model = capszoo.create_model("capsnet_tiny", **SMALL)
    policy = create_policy("one_cycle", lr=1e-3, batch_size=64, epochs=1, num_images=len(data.test))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    Trainer(CapsuleTask(model, verbose=False), optimizer, policy, data.test, folder=folder).fit()
    return folder / "resume.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        {"position": {}},
        {"position": None},
        {"sums": [0] * 5},
        {"sums": torch.zeros(4)},
        {"lr": "x"},
        {"lr": float("nan")},
        {"model": {}},
        {"model": {"conv1.weight": 3}},
        {"optimizer": {"state": [], "param_groups": []}},
        {"optimizer": {"state": {}, "param_groups": [{"lr": None, "params": [0]}]}},
        {"scaler": 3},
        {"random": {}},
        {"random": {"cpu": torch.zeros(3)}},
    ],
    ids=str,
)
def test_states_that_lack_something(state, change, tmp_path):
    sound = load_state(state)
    check_resume_state(sound, state)
    save_state(tmp_path / "s", {**sound, **change})
    key = next(iter(change))
    assert f"has no {key!r}" in refused(check_resume_state, load_state(tmp_path / "s"), "s")
    del sound[key]
    assert f"has no {key!r}" in refused(check_resume_state, sound, "s")


# Configurations and tables.

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{two}: &{two} [{', '.join(['*' + one] * 9)}]\n" for one, two in itertools.pairwise("abcdefg")
)


@pytest.mark.parametrize(
    "text, expected",
    [
        (LAUGHS, "alias"),
        ("a: &a {x: *a}", "alias"),
        ("a: " + "[" * 100, "too deeply"),
        ("a: " + "[" * 100_000, "too deeply"),
        ("a: " + "x" * 200_000, "longer than"),
        ("a: !!python/object/apply:os.system [touch mark]", "could not determine a constructor"),
        ("a: !!timestamp x", "no YAML"),
        ("a: 2001-13-01", "no YAML"),
        ("a: " + "9" * 5000, "no YAML"),
        ("a: \x00", "no YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_yaml(tmp_path, text, expected):
    (tmp_path / "c.yaml").write_text(text)
    assert expected in refused(read_yaml, tmp_path / "c.yaml")
    parser = OptionParser()
    parser.add_argument("--kwargs", nargs="*", type=key_value)
    assert "kwargs" in refused(parser.parse, ["--kwargs", f"x={text.replace('a: ', '', 1)}"])


def test_one_value_is_not_a_list(tmp_path):
    parser = OptionParser()
    parser.add_argument("--config")
    parser.add_argument("--epochs", type=int)
    for text in ("epochs: [3, 4]", "epochs: []", "epochs: {a: 1}"):
        (tmp_path / "c.yaml").write_text(text)
        assert "epochs takes one value" in refused(parser.parse, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("content", [b"top1\n0.5,0.6\n", b"top1\n\xff\n", b'top1\n"0.5', b"top1\n" + b"x" * 200_000])
def test_damaged_tables_are_left_alone(tmp_path, content):
    (tmp_path / "r.csv").write_bytes(content)
    assert "is no table of results" in refused(add_result, tmp_path / "r.csv", {"top1": 1.0}, "train.py", [])
    assert (tmp_path / "r.csv").read_bytes() == content


# Data.


def test_cifar_is_unpickled_only_if_it_is_cifar(tmp_path, bomb):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(bomb)
    assert "is damaged" in refused(load_data, "cifar10", tmp_path)


def make_folder(root: Path) -> Path:
    for part in ("train", "test"):
        (root / part / "a").mkdir(parents=True)
        Image.new("L", (6, 5)).save(root / part / "a/0.png")
    return root / "train/a"


def test_links_out_of_a_folder(tmp_path):
    images = make_folder(tmp_path / "set")
    Image.new("L", (6, 5)).save(tmp_path / "outside.png")
    (images / "1.png").symlink_to(images / "0.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert len(load_data(tmp_path / "link", val_fraction=0).train) == 2
    (images / "2.png").symlink_to(tmp_path / "outside.png")
    assert "2.png' is a link out of" in refused(load_data, tmp_path / "set", val_fraction=0)
    (images / "2.png").unlink()
    (tmp_path / "b").mkdir()
    (tmp_path / "set/train/b").symlink_to(tmp_path / "b")
    assert "train/b' is a link out of" in refused(load_data, tmp_path / "set", val_fraction=0)


def test_links_in_a_circle_and_pipes(tmp_path):
    images = make_folder(tmp_path)
    (images / "1.png").symlink_to(images / "1.png")
    assert "1.png" in refused(load_data, tmp_path, val_fraction=0)
    (images / "1.png").unlink()
    os.mkfifo(images / "1.png")  # reading it would wait forever
    assert "1.png' is not an image file" in refused(load_data, tmp_path, val_fraction=0)


def test_images_that_other_programs_would_draw(tmp_path):
    images = make_folder(tmp_path)
    Image.new("L", (6, 5)).save(images / "1.png", "EPS")  # PIL starts Ghostscript
    assert "1.png' is not an image" in refused(load_data, tmp_path, val_fraction=0)


def test_images_that_claim_to_be_vast(tmp_path, monkeypatch):
    images = make_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 29)
    with pytest.warns(Image.DecompressionBombWarning):
        message = refused(load_data, tmp_path, val_fraction=0)
    assert f"{images / '0.png'}' is not" in message and "6x5 are more than 29 pixels" in message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    assert "DecompressionBombError" in refused(load_data, tmp_path, val_fraction=0)


def test_names_with_line_breaks(tmp_path):
    images = make_folder(tmp_path)
    (images / "1\n2\u2028.png").write_bytes(b"x")
    assert "1 2 .png" in refused(load_data, tmp_path, val_fraction=0)
