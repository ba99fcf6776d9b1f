"""What the page shows of a network and an image, against the functions of the network itself."""

import math
from pathlib import Path

import pytest
import torch

import capszoo
from capszoo import inspect
from capszoo.errors import InspectionError, UsageError
from capszoo.explorer import Network
from capszoo.opening import OpenedModel, open_model


def network(name, **kwargs):
    torch.manual_seed(0)
    return Network(OpenedModel(capszoo.create_model(name, **kwargs), name, Path(name), {}, None))


def numbers(shape):
    return [(37 * place) % 256 for place in range(math.prod(shape))]


@pytest.fixture(scope="module")
def tiny():
    return Network(open_model("capsnet_tiny.mnist"))


def test_description(tiny):
    about = tiny.describe()
    assert (about["name"], about["dataset"], about["parameters"]) == ("capsnet_tiny.mnist", "mnist", 458_032)
    assert about["classes"][5] == "5 - five" and about["shape"] == [1, 28, 28]
    assert (about["dims"], about["draws"], about["score"]) == (16, True, "length")
    assert len(about["centers"]) == 36 and about["centers"][0] == [8.5, 8.5] and about["centers"][-1] == [18.5, 18.5]


def test_activations_are_no_lengths():
    about = Network(open_model("capsnet_vb_mini.mnist")).describe()
    assert about["score"] == "activation" and not about["draws"]
    assert len({tuple(center) for center in about["centers"]}) == 9


def test_look_says_what_the_network_says(tiny):
    pixels = numbers(tiny.shape)
    x = torch.tensor(pixels).view(1, *tiny.shape) / 255
    answer = tiny.look(pixels)
    capsules, scores = tiny.model.forward_capsules(x)
    torch.testing.assert_close(torch.tensor(answer["scores"]), scores[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(answer["capsules"]), capsules.flatten(), rtol=0, atol=1e-6)
    assert answer["target"] == int(scores.argmax())
    drawn = tiny.model.reconstruct(x).flatten() * 255
    torch.testing.assert_close(torch.tensor(answer["drawn"]).float(), drawn, rtol=0, atol=0.501)
    shares, presence = inspect.place_couplings(tiny.model, x)
    torch.testing.assert_close(torch.tensor(answer["shares"]), shares[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(answer["presence"]), presence[0], rtol=0, atol=1e-6)
    other = tiny.look(pixels, target=(answer["target"] + 1) % 10)
    assert other["scores"] == answer["scores"] and other["drawn"] != answer["drawn"]


def test_draw_follows_the_numbers(tiny):
    answer = tiny.look(numbers(tiny.shape))
    target, capsules = answer["target"], list(answer["capsules"])
    assert tiny.draw(capsules, target)["drawn"] == pytest.approx(answer["drawn"], abs=1)
    capsules[16 * target + 3] += 0.25
    drawn = tiny.draw(capsules, target)["drawn"]
    x = torch.tensor(numbers(tiny.shape)).view(1, *tiny.shape) / 255
    expected = inspect.perturb(tiny.model, x, dims=[3], values=[0.25]).flatten() * 255
    torch.testing.assert_close(torch.tensor(drawn).float(), expected, rtol=0, atol=0.51)
    assert max(abs(a - b) for a, b in zip(drawn, answer["drawn"], strict=True)) > 10


@pytest.mark.parametrize(
    ("name", "kwargs", "has"),
    [
        ("efficient_capsnet", {"decoder": True}, {"capsules", "drawn"}),  # its capsules are of the whole image
        ("efficient_capsnet", {}, {"capsules"}),
        ("capsnet_resnet_sr", {"img_size": 24, "in_chans": 3}, {"capsules", "shares", "presence"}),
        ("cnn_baseline", {"img_size": 20}, set()),
    ],
)
def test_networks_show_what_they_have(name, kwargs, has):
    small = network(name, **kwargs)
    about, answer = small.describe(), small.look(numbers(small.shape))
    found = {key for key in ("capsules", "drawn", "shares", "presence") if answer.get(key) is not None}
    assert found == has
    assert about["draws"] == ("drawn" in has) and bool(about["dims"]) == ("capsules" in has)
    assert bool(about["centers"]) == ("shares" in has)
    if "capsules" in has:
        assert len(answer["capsules"]) == about["dims"] * len(about["classes"])
    if "shares" in has:
        assert len(answer["shares"][0]) == len(answer["presence"]) == len(about["centers"])
    if "drawn" not in has:
        with pytest.raises(InspectionError, match="no decoder to draw with"):
            small.draw([], 0)


def test_scores_of_logits_are_probabilities():
    small = network("capsnet_resnet_sr", img_size=24, in_chans=3)
    assert small.describe()["score"] == "probability"
    assert sum(small.look(numbers(small.shape))["scores"]) == pytest.approx(1, abs=1e-4)


def test_numbers_that_json_does_not_have(tiny):
    broken = network("capsnet_tiny", decoder=True)
    torch.nn.init.constant_(broken.model.conv1.bias, math.nan)
    answer = broken.look(numbers(broken.shape))
    assert all(math.isfinite(value) for value in (*answer["scores"], *answer["capsules"], *answer["presence"]))


def test_pages_do_not_tell_where_files_are(tmp_path):
    (tmp_path / "first").mkdir()
    for file, name in (
        (tmp_path / "first" / "best.safetensors", "first"),
        (tmp_path / "a.safetensors", "a.safetensors"),
    ):
        model = capszoo.create_model("capsnet_tiny")
        opened = OpenedModel(model, f"capsnet_tiny {file}", file, {}, None)
        assert Network(opened).describe()["name"] == f"capsnet_tiny {name}"


def test_networks_that_nobody_can_draw_for():
    with pytest.raises(UsageError, match="2 channels"):
        network("efficient_capsnet", form="smallnorb", in_chans=2, img_size=48)
    with pytest.raises(UsageError, match="no classes"):
        network("capsnet_tiny", num_classes=0)
