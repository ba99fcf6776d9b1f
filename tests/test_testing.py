"""`check_model` passes the zoo's own models, and says what is wrong with others."""

from types import SimpleNamespace

import pytest
import torch
from timm.models import _registry, generate_default_cfgs, register_model
from torch import nn

import capszoo
from capszoo.arguments import SearchedArgument
from capszoo.contract import (
    CapsuleModel,
    Explorable,
    HasCapsules,
    HasPrimaryCapsules,
    Prunable,
    auxiliary_modules,
    decoder_of,
    keeps_contract,
)
from capszoo.models import CapsNet, CapsNetHead, CNNBaseline
from capszoo.models._builder import build_model, digits_cfg
from capszoo.models.cnn_baseline import checkpoint_filter_fn
from capszoo.testing import check_model

SMALL = {
    "capsnet": dict(conv_dim=8, num_types=2, img_size=20, decoder=True, decoder_dims=[8, 8]),
    "capsnet_ws": dict(conv_dim=8, num_types=3, img_size=(20, 22), keep_capsules=[0, 5, 9], decoder=True),
    "capsnet_tiny": dict(conv_dim=8, keep_types=[1, 2], in_chans=3, num_classes=4, drop_rate=0.0),
    "cnn_baseline": dict(conv_dim=8, img_size=20),
}


@pytest.mark.parametrize("name", SMALL)
def test_own_models_keep_the_contract(name):
    state = torch.get_rng_state()
    check_model(name, **SMALL[name])
    assert torch.equal(state, torch.get_rng_state())


def test_protocols():
    model, cnn = capszoo.create_model("capsnet_tiny"), capszoo.create_model("cnn_baseline_tiny")
    for protocol in (CapsuleModel, HasCapsules, HasPrimaryCapsules, Prunable, Explorable):
        assert isinstance(model, protocol)
    assert isinstance(cnn, CapsuleModel) and not isinstance(cnn, HasCapsules) and not cnn.capsule_layers()
    assert keeps_contract(CapsNet) and keeps_contract(CNNBaseline)
    assert not keeps_contract(nn.Linear) and not keeps_contract("CapsNet") and not keeps_contract(dict)
    assert auxiliary_modules(cnn) == {} and decoder_of(cnn) is None
    assert auxiliary_modules(model) == {"decoder": None}
    drawing = capszoo.create_model("capsnet_tiny", decoder=True)
    assert decoder_of(drawing) is drawing.decoder and decoder_of(SimpleNamespace(decoder=drawing)) is drawing
    assert decoder_of(nn.Linear(1, 1)) is None, "as models of others, without methods or decoder"


def test_parts_and_space_of_capsnet():
    model = capszoo.create_model("capsnet", num_types=4, keep_types=2, conv_dim=8, decoder=True, decoder_dims=[6, 9])
    assert model.prunable_parts() == {"conv1": 8, "types": 2, "capsules": 72, "decoder": (6, 9)}
    space = {found.keyword: found.values for found in model.search_space()}
    space = {key: list(values.values() if isinstance(values, dict) else values) for key, values in space.items()}
    assert space["decoder_dims"] == [[6, 9], [3, 4], [1, 2]] and space["keep_types"] == [None, 2, 1, 1]
    for key, values in space.items():
        for value in values:
            capszoo.create_model("capsnet", device="meta", num_types=4, conv_dim=8, **{key: value})
    model.reset_classifier(0)
    assert model.prunable_parts() == {} == model.capsule_layers()


class Broken(CNNBaseline):
    """A model that breaks the contract in the way that a test sets."""


default_cfgs = generate_default_cfgs({"broken_net": digits_cfg(first_conv="conv1", classifier="fc")})


def broken_net(pretrained: bool = False, **kwargs) -> Broken:
    """A model for these tests."""
    return build_model(Broken, checkpoint_filter_fn, "broken_net", pretrained, **kwargs)


@pytest.fixture
def broken(monkeypatch):
    """Its registration, which ends with the test."""
    for key, table in vars(_registry).items():
        if key.startswith("_mod") and isinstance(table, (dict, set)):
            monkeypatch.setattr(_registry, key, table.copy())
    register_model(broken_net)
    return monkeypatch


FAULTS = {
    "arguments": (lambda self: {"conv_dim": 9}, "network of other weights: they leave a keyword out"),
    "forward_head": (lambda self, x, pre_logits=False: x.mean((2, 3))[:, :3], r"forward\(x\) has shape \(3, 3\)"),
    "forward": (lambda self, x: self.forward_head(self.forward_features(x)) / 2, r"is not forward\(x\)"),
    "capsule_layers": (lambda self: {"fc": self.conv1}, "'fc', which is not the module of that name"),
    "auxiliary_modules": (lambda self: {"fc": self.fc}, "forward\\(x\\) uses 'fc.weight' of an auxiliary module"),
    "search_space": (lambda self: [SearchedArgument("conv_dim", ["8"])], "search_space.. has .*: conv_dim='8' is not"),
    "get_classifier": (lambda self: self.conv1, "not the module that pretrained_cfg names"),
}


@pytest.mark.parametrize("method", FAULTS)
def test_faults_are_named(broken, method):
    check_model("broken_net", conv_dim=4, img_size=20)
    fault, message = FAULTS[method]
    broken.setattr(Broken, method, fault, raising=False)
    with pytest.raises(AssertionError, match=message):
        check_model("broken_net", conv_dim=4, img_size=20)


def test_capsules_without_forward_capsules(broken):
    broken.setattr(Broken, "capsule_layers", lambda self: {"fc": self.fc}, raising=False)
    with pytest.raises(AssertionError, match=r"needs forward_capsules\(x\)"):
        check_model("broken_net", conv_dim=4, img_size=20)


COUPLING_FAULTS = {
    "no iterations": (lambda every, x: every[-1], "have shape .*, expected .R, B, I, J."),
    "other classes": (lambda every, x: every[..., :-1], "couplings.x, iteration=None. has shape"),
    "not finite": (lambda every, x: every / 0, "is not finite"),
    "other sums": (
        lambda every, x: every * x.mean((1, 2, 3))[:, None, None],
        "add up neither to 1 over the classes nor",
    ),
}


@pytest.mark.parametrize("fault", COUPLING_FAULTS)
def test_couplings_that_cannot_be(monkeypatch, fault):
    own, (change, message) = CapsNet.couplings, COUPLING_FAULTS[fault]

    def changed(self, x, iteration=-1):
        every = change(own(self, x, None), x)
        return every if iteration is None else every[iteration]

    monkeypatch.setattr(CapsNet, "couplings", changed)
    with pytest.raises(AssertionError, match=message):
        check_model("capsnet", **SMALL["capsnet"])


def test_routed_capsules_that_are_not_those_of_the_couplings(monkeypatch):
    small = dict(backbone="stem", backbone_level=0, num_types=2, caps_dim=4, class_dim=4, img_size=20)
    routed = CapsNetHead.routed_capsules
    monkeypatch.setattr(CapsNetHead, "capsule_places", lambda self: ([(1, 1)], torch.arange(18)))
    with pytest.raises(AssertionError, match="capsule_places.. has "):
        check_model("capsnet_head", **small)
    monkeypatch.setattr(CapsNetHead, "routed_capsules", lambda self, f: (routed(self, f)[0][:, 1:], None))
    with pytest.raises(AssertionError, match="the capsules of routed_capsules.features. has shape"):
        check_model("capsnet_head", **small)


def test_scores_beyond_the_margin_loss(broken):
    own = CNNBaseline.forward_head
    scaled = lambda self, *args, **kwargs: own(self, *args, **kwargs) * (9 if self.num_classes else 1)  # noqa: E731
    broken.setattr(Broken, "forward_head", scaled)
    with pytest.raises(AssertionError, match="not from 0 to 1.*default_criterion"):
        check_model("broken_net", conv_dim=4, img_size=20)
    broken.setattr(Broken, "default_criterion", lambda self: nn.CrossEntropyLoss(), raising=False)
    check_model("broken_net", conv_dim=4, img_size=20)


def test_unknown_model():
    with pytest.raises(ValueError, match="unknown model 'capsnt', did you mean 'capsnet'"):
        check_model("capsnt")
