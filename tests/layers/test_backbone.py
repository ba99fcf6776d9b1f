"""Networks of timm as backbones: levels and maps, what stays of them, weights, groups, refusals."""

import json

import pytest
import timm
import torch
from timm.models import group_parameters

from capszoo.layers import Backbone, StridedStem
from capszoo.layers.backbone import plan_backbone


def images(size=64, chans=3):
    return torch.rand(2, chans, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size, level, map_size", [(32, 0, 16), (64, 1, 16), (128, 2, 16), (224, 3, 14), (384, 4, 12)])
def test_default_level_has_at_least_12_pixels(size, level, map_size):
    plan = plan_backbone("resnet18", None, 3, (size, size))
    assert (plan.level, plan.map_size) == (level, (map_size, map_size))
    assert plan.channels == (64, 64, 128, 256, 512)[level]


def test_default_level_where_all_maps_are_too_small():
    assert plan_backbone("resnet18", None, 1, (16, 20)).level == 0
    plan = plan_backbone("test_vit", None, 3, (64, 64))
    assert (plan.level, plan.map_size) == (5, (4, 4)), "of maps of equal size, the deepest"


def _plain(key):
    """Names of two of timm's extractors, made equal."""
    return key.replace("net.", "").replace("model.", "").replace(".", "_")


# One of each kind of timm's extractors: modules in a list, flattened; a getter; one that keeps unused stages; NHWC.
KINDS = ["test_resnet", "test_convnext", "test_vit", "test_efficientnet", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("name", KINDS)
def test_map_is_that_of_timm(name):
    size, kwargs = (224, {}) if name.startswith("swin") else (64, {})
    if name.startswith("swin"):
        kwargs = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    torch.manual_seed(0)
    backbone = Backbone(name, 1, 3, (size, size), kwargs=kwargs).eval()
    own = backbone(images(size))
    assert own.shape[1:] == (backbone.num_features, *backbone.map_size)
    fixed = {"img_size": size} if "vit" in name else {}
    net = timm.create_model(name, features_only=True, out_indices=(1,), **fixed, **kwargs).eval()
    own_state = {_plain(key): value for key, value in backbone.state_dict().items()}
    net.load_state_dict({key: own_state.get(_plain(key), value) for key, value in net.state_dict().items()})
    expected = net(images(size))[0]
    torch.testing.assert_close(own, expected.permute(0, 3, 1, 2) if backbone.channels_last else expected)
    assert backbone.channels_last == name.startswith("swin")


@pytest.mark.parametrize("name", [*KINDS[:4], "stem", pytest.param("hrnet_w18_small", marks=pytest.mark.slow)])
def test_each_trained_parameter_takes_part(name):
    backbone = Backbone(name, 2, 3, (64, 64))
    backbone(images()).sum().backward()
    parameters = dict(backbone.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in parameters.values())
    frozen = [key for key, p in parameters.items() if not p.requires_grad]
    assert bool(frozen) == name.startswith("hrnet"), "of these, timm cuts all but HRNet at the level"
    whole = None if name == "stem" else timm.create_model(name, device="meta")
    assert whole is None or len(parameters) < len(list(whole.parameters()))


def test_stem():
    stem = Backbone("stem", None, 1, (96, 64))
    assert isinstance(stem.net, StridedStem)
    assert (stem.level, stem.num_features, stem.map_size) == (1, 64, (24, 16))
    assert stem(torch.rand(2, 1, 96, 64)).shape == (2, 64, 24, 16)
    narrow = Backbone("stem", -1, 3, (64, 64), kwargs={"dims": [4, 6]})
    assert (narrow.num_features, narrow.map_size) == (6, (16, 16))


@pytest.mark.parametrize("name", [*KINDS[:4], "stem"])
def test_groups_are_those_of_timm(name):
    backbone = Backbone(name, 1, 3, (64, 64))
    model = torch.nn.ModuleDict(
        {"backbone": backbone, "conv1": torch.nn.Conv2d(2, 2, 1), "head": torch.nn.Conv2d(2, 2, 1)}
    )
    for coarse in (False, True):
        groups = group_parameters(model, backbone.group_matcher("backbone.", ["^conv1"], coarse), reverse=True)
        assert set(groups) == {key for key, _ in model.named_parameters()}
        numbers = sorted(set(groups.values()))
        assert numbers == list(range(len(numbers)))
        assert groups["conv1.weight"] == numbers[-2] and groups["head.weight"] == numbers[-1]
        of_backbone = [number for key, number in groups.items() if key.startswith("backbone.")]
        assert max(of_backbone) == numbers[-3] and len(set(of_backbone)) > 1
    if name == "test_resnet":
        whole = timm.create_model(name)
        known = group_parameters(whole, whole.group_matcher(), reverse=True)
        fine = group_parameters(model, backbone.group_matcher("backbone.", ["^conv1"]), reverse=True)
        assert fine["backbone.net.layer1.0.conv1.weight"] == known["layer1.0.conv1.weight"] == 1


class Hub:
    """What timm gets from Hugging Face's hub."""

    def __init__(self, state):
        self.state, self.calls = state, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.state is None:
            raise OSError("no route to the hub\nmore")
        return {key: value.clone() for key, value in self.state.items()}


def test_pretrained(monkeypatch):
    source = timm.create_model("test_resnet")
    hub = Hub(source.state_dict())
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub)
    backbone = Backbone("test_resnet", 2, 3, (64, 64), pretrained=True)
    assert hub.calls == 1
    assert torch.equal(backbone.net.layer2[0].conv1.weight, source.layer2[0].conv1.weight)
    gray = Backbone("test_resnet", 2, 1, (64, 64), pretrained=True)
    torch.testing.assert_close(gray.net.conv1[0].weight, source.conv1[0].weight.sum(1, keepdim=True))
    calls = hub.calls
    Backbone("test_resnet", 2, 3, (64, 64), pretrained=True, device="meta")
    assert hub.calls == calls, "the meta device has no values to load"
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", Hub(None))
    with pytest.raises(
        ValueError, match=r"^the weights of backbone 'test_resnet' cannot be loaded \(no route to the hub\)"
    ) as error:
        Backbone("test_resnet", 2, 3, (64, 64), pretrained=True)
    assert "\n" not in str(error.value)


ERRORS = {
    "unknown backbone 'resnet81', did you mean 'resnet.*'": dict(name="resnet81"),
    "unknown backbone 'resnet18.a9_in1k', did you mean 'resnet18.a._in1k'": dict(name="resnet18.a9_in1k"),
    "unknown backbone 'hf-hub:someone/net'": dict(name="hf-hub:someone/net"),
    "'capsnet' is a capsule network itself": dict(name="capsnet"),
    "backbone_level=5 is not possible: 'resnet18' has 5 levels, give 0 to 4, or -5 to -1": dict(level=5),
    "'resnet18' with backbone_kwargs=.* cannot be made .*depth": dict(kwargs={"depth": 3}),
    "backbone_kwargs has 'in_chans', which the model sets itself": dict(kwargs={"in_chans": 3}),
    "backbone_kwargs has 'pretrained_cfg'": dict(kwargs={"pretrained_cfg": {"file": "x"}}),
    "backbone_kwargs has 'checkpoint_path'": dict(kwargs={"checkpoint_path": "x"}),
    "backbone_kwargs cannot be kept in a file": dict(kwargs={"act_layer": torch.nn.ReLU}),
    "it takes dims": dict(name="stem", kwargs={"dims": [4, 0]}),
    "has no weights for backbone 'stem'": dict(name="stem", pretrained=True),
    "backbone 'vgg11' has no map of images of 8x8 at level 5": dict(name="vgg11", level=5, img_size=(8, 8)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message) as caught:
        Backbone(**{"name": "resnet18", "img_size": (64, 64), **ERRORS[message]})
    assert "\n" not in str(caught.value)


def test_grad_checkpointing_gives_the_same_gradients():
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        backbone = Backbone("test_resnet", 3, 3, (64, 64)).train()
        backbone.set_grad_checkpointing(enable)
        assert backbone.net.grad_checkpointing == enable
        backbone(images()).square().mean().backward()
        results.append([p.grad for p in backbone.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    getter = Backbone("test_vit", 1, 3, (64, 64))
    getter.set_grad_checkpointing(True)
    assert getter.net.model.grad_checkpointing
    assert json.dumps(getter._made_of[3])
