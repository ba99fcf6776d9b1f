"""Weights in and out by timm's ways: overlays, folders, checkpoint files; other classes, channels, sizes and types."""

import json
import logging

import pytest
import timm
import torch
from families import CAPSNETS
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import capszoo

SMALL = dict(conv_dim=8, num_types=4, decoder_dims=(6, 7))


def make(name="capsnet", **kwargs):
    """A small model for the images of the default configuration, 1x28x28."""
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def images(in_chans=1, size=28):
    return torch.rand(2, in_chans, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source():
    torch.manual_seed(0)
    return make(decoder=True)


@pytest.fixture
def file(source, tmp_path):
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def load(file, name="capsnet", **kwargs):
    torch.manual_seed(1)
    return make(name, pretrained=True, pretrained_cfg_overlay=dict(file=file), **kwargs)


def equal_to(model, source):
    """Keys of the parameters that are those of the source."""
    found, expected = model.state_dict(), source.state_dict()
    return {key for key in found if key in expected and torch.equal(found[key], expected[key])}


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_all_of_it(source, file, caplog):
    model = load(file, decoder=True)
    assert equal_to(model, source) == set(model.state_dict()) and not warnings_of(caplog)
    assert torch.equal(model(images()), source(images()))
    assert torch.equal(model.reconstruct(images()), source.reconstruct(images()))


def test_without_decoder(source, file, caplog):
    model = load(file)
    assert torch.equal(model(images()), source(images())) and model.decoder is None
    assert not warnings_of(caplog)


def test_decoder_that_the_weights_lack(source, tmp_path, caplog):
    weights = {key: value for key, value in source.state_dict().items() if not key.startswith("decoder.")}
    save_file(weights, tmp_path / "weights.safetensors")
    model = load(str(tmp_path / "weights.safetensors"), decoder=True)
    assert torch.equal(model(images()), source(images()))
    assert not equal_to(model, source) & {"decoder.fc1.weight", "decoder.fc2.weight", "decoder.fc3.weight"}
    (message,) = warnings_of(caplog)
    assert "decoder.fc1.weight" in message and "initialised anew" in message


def test_other_classes(source, file, caplog):
    model = load(file, num_classes=4, decoder=True)
    anew = {"class_caps.weight", "decoder.fc1.weight"}
    assert equal_to(model, source) >= set(model.state_dict()) - anew - {"class_caps.bias"}
    assert model(images()).shape == (2, 4) and model.class_caps.weight.detach().std() == pytest.approx(0.1, rel=0.1)
    message = next(m for m in warnings_of(caplog) if "initialised anew" in m)
    assert all(key in message for key in anew)


def test_no_classes(source, file):
    assert torch.equal(load(file, num_classes=0)(images()), source.forward_features(images()).flatten(1))


def test_features(source, file):
    features = load(file, features_only=True)(images())
    assert torch.equal(features[2], source.forward_features(images()))


def test_other_channels(source, file, caplog):
    model = load(file, in_chans=3, decoder=True)
    anew = {"conv1.weight", "decoder.fc3.weight", "decoder.fc3.bias"}
    assert equal_to(model, source) == set(model.state_dict()) - anew
    gray = images().repeat(1, 3, 1, 1)
    torch.testing.assert_close(model(gray), source(images()), rtol=0, atol=1e-5)  # adapted, not drawn anew
    assert model.reconstruct(gray).shape == gray.shape
    assert any("decoder.fc3.weight" in m and "initialised anew" in m for m in warnings_of(caplog))


def test_other_size(source, file, caplog):
    model = load(file, img_size=20, decoder=True)
    anew = {"class_caps.weight", "decoder.fc3.weight", "decoder.fc3.bias"}
    assert equal_to(model, source) == set(model.state_dict()) - anew
    assert model(images(size=20)).shape == (2, 10)
    assert any("class_caps.weight" in m for m in warnings_of(caplog))


@pytest.mark.parametrize("classes", [10, 4])
def test_a_bias_for_each_capsule_of_another_size(classes, tmp_path):
    """Self-routing has one."""
    kwargs = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}, "pretrained": True}
    source = timm.create_model("capsnet_resnet_sr")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = timm.create_model("capsnet_resnet_sr", img_size=36, num_classes=classes, **kwargs)
    found = set(model.state_dict()) - equal_to(model, source)
    assert "class_caps.bias" in found and {key.rpartition(".")[0] for key in found} <= {"class_caps"}
    assert model.eval()(torch.rand(1, 3, 36, 36)).shape == (1, classes)


def test_other_size_of_shared_weights(tmp_path, caplog):
    """One matrix per type fits any size."""
    source = make("capsnet_ws")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = load(str(tmp_path / "weights.safetensors"), "capsnet_ws", img_size=20)
    assert equal_to(model, source) == set(model.state_dict()) and not warnings_of(caplog)


def test_everything_other(source, file):
    model = load(file, img_size=20, in_chans=3, num_classes=4, decoder=True)
    assert equal_to(model, source) >= {"conv1.bias", "primary_caps.conv.weight", "decoder.fc2.weight"}
    assert model.reconstruct(images(3, 20)).shape == (2, 3, 20, 20)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(conv_dim=9),
        dict(num_types=5),
        dict(class_dim=4),
        dict(kernel_size=7),
        dict(share_weights=True),
        dict(decoder=True, small_decoder=True),
        dict(decoder=True, decoder_dims=(6, 8)),
        # A number does not say which types, and indices count in as many types as the weights hold.
        dict(keep_types=2),
        dict(num_types=5, keep_types=(0, 1)),
    ],
)
def test_another_architecture(file, kwargs):
    with pytest.raises(ValueError, match=r"^these weights do not fit 'capsnet': '.*' has shape .* needs .*$") as error:
        load(file, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [lambda w: w.pop("class_caps.bias"), lambda w: w.update(fc=torch.zeros(1))])
def test_missing_or_foreign_weights(source, tmp_path, change):
    weights = source.state_dict()
    change(weights)
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="these weights do not fit 'capsnet': (they lack|it has no)") as error:
        load(str(tmp_path / "weights.safetensors"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("keep", [(1,), (0, 2), (3, 1), (0, 1, 3)])
def test_keep_types(share_weights, keep, tmp_path, caplog):
    """The types left compute what they do in the full network where the votes of the others are zero.

    A vote of zero has logit zero and adds nothing, so the removed types are the same as zero matrices.
    """
    caplog.set_level(logging.INFO)
    full = make(share_weights=share_weights)
    save_file(full.state_dict(), tmp_path / "weights.safetensors")
    pruned = load(str(tmp_path / "weights.safetensors"), share_weights=share_weights, keep_types=keep)
    assert pruned.class_caps.num_capsules == len(keep) * 36
    assert any(f"Kept {len(keep)} of 4 capsule types" in r.getMessage() for r in caplog.records)
    with torch.no_grad():
        removed = [t for t in range(4) if t not in keep]
        full.class_caps.weight.view(4, -1, 8, 10, 16)[removed] = 0
    torch.testing.assert_close(pruned(images()), full(images()), rtol=0, atol=1e-6)
    kept_map = full.forward_features(images()).unflatten(1, (4, 8))[:, list(keep)].flatten(1, 2)
    torch.testing.assert_close(pruned.forward_features(images()), kept_map)


def test_keep_types_of_weights_cut_already(file, tmp_path):
    pruned = load(file, keep_types=(3, 1))
    save_file(pruned.state_dict(), tmp_path / "pruned.safetensors")
    again = load(str(tmp_path / "pruned.safetensors"), keep_types=(3, 1))
    assert torch.equal(again(images()), pruned(images()))


@pytest.mark.parametrize("name", CAPSNETS)
def test_folder(name, tmp_path):
    """config.json and model.safetensors, as on the Hugging Face hub."""
    kept = dict(keep_types=[3, 1]) if name == "capsnet_pruned" else {}
    source = make(name, num_classes=7, in_chans=3, img_size=(20, 22), num_routing=2, decoder=True, **kept)
    save_for_hf(source, tmp_path, safe_serialization=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name

    x = torch.rand(2, 3, 20, 22)
    for create in timm.create_model, capszoo.create_model:
        model = create(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert model.class_caps.routing.num_iters == 2 and model.num_classes == 7
        assert torch.equal(model(x), source(x)) and torch.equal(model.reconstruct(x), source.reconstruct(x))
        plain = create(f"local-dir:{tmp_path}", pretrained=True, decoder=False).eval()
        assert plain.decoder is None and torch.equal(plain(x), source(x))


@pytest.mark.parametrize(
    "change, anew",
    [
        (dict(num_classes=3), {"class_caps.weight", "class_caps.bias"}),
        (dict(img_size=24), {"class_caps.weight", "decoder.fc3.weight", "decoder.fc3.bias"}),
        (dict(in_chans=1), {"conv1.weight", "decoder.fc3.weight", "decoder.fc3.bias"}),
    ],
)
def test_folder_for_another_task(change, anew, tmp_path):
    source = make(num_classes=7, in_chans=3, img_size=20, decoder=True, small_decoder=True)
    torch.nn.init.normal_(source.class_caps.bias)
    save_for_hf(source, tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **change)
    assert equal_to(model, source) == set(source.state_dict()) - anew
    shape = (2, change.get("in_chans", 3), *[change.get("img_size", 20)] * 2)
    assert model(torch.rand(shape)).shape == (2, change.get("num_classes", 7))


def test_folder_after_reset(tmp_path):
    source = make(img_size=20)
    source.reset_classifier(3)
    save_for_hf(source, tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model(images(size=20)), source(images(size=20)))


def test_checkpoint_path(source, file):
    for create in timm.create_model, capszoo.create_model:
        model = create("capsnet", checkpoint_path=file, decoder=True, **SMALL).eval()
        assert torch.equal(model.reconstruct(images()), source.reconstruct(images()))
        model = create("capsnet", checkpoint_path=file, **SMALL).eval()
        assert torch.equal(model(images()), source(images()))
    assert equal_to(source, make()) != set(load_file(file))


def test_checkpoint_path_of_another_model(file):
    with pytest.raises(ValueError, match="'primary_caps.conv.weight' has shape") as error:
        capszoo.create_model("capsnet", checkpoint_path=file, **{**SMALL, "num_types": 3})
    assert "\n" not in str(error.value) and file in str(error.value)
