"""Couplings of every family and head against plain loops or their sums, and what `capszoo.inspect` makes of them."""

import math

import pytest
import torch
from families import sizes_of

import capszoo
from capszoo import inspect, report
from capszoo.contract import has_couplings
from capszoo.errors import InspectionError

# Model, keywords, passes of routing, keywords of the uniform twin.
CASES = {
    "dynamic": ("capsnet", {"num_types": 2}, 3, {"num_routing": 1}),
    "self-attention": ("efficient_capsnet", {}, 1, {"couplings": "uniform"}),
    "inverted attention": ("capsnet_resnet_ia", {"num_passes": 3}, 3, {"num_passes": 1}),
    "one after the other": ("capsnet_conv_ia", {"concurrent": False}, 2, {"num_passes": 1}),
    "self-routing": ("capsnet_resnet_sr", {}, 1, {"couplings": "uniform"}),
    "two layers": ("capsnet_resnet_sr", {"num_layers": 2}, 1, {"couplings": "uniform"}),
    "DeepCaps": ("deepcaps", {}, 3, {"num_routing": 1}),
    "EM": ("capsnet_em_mini", {"num_routing": 3}, 3, {"num_routing": 1}),
    "variational Bayes": ("capsnet_vb_mini", {}, 2, {"num_routing": 1}),
    "dynamic head": ("capsnet_head", {}, 3, {"head_kwargs": {"num_routing": 1}}),
    "self-attention head": ("capsnet_head", {"head": "self_attention"}, 1, {"head_kwargs": {"couplings": "uniform"}}),
    "inverted attention head": ("capsnet_head", {"head": "inverted_attention"}, 2, {"head_kwargs": {"num_passes": 1}}),
    "self-routing head": ("capsnet_head", {"head": "self_routing"}, 1, {"head_kwargs": {"couplings": "uniform"}}),
}
every_case = pytest.mark.parametrize("case", CASES)


def make(name, **kwargs):
    torch.manual_seed(0)
    model = capszoo.create_model(name, **{**sizes_of(name), "in_chans": 1, "img_size": 20, "num_classes": 4, **kwargs})
    layer = model.get_classifier()
    if hasattr(layer, "uniform") or (
        name == "capsnet_head" and hasattr(layer, "weight")
    ):  # zeros, or votes nearly equal
        torch.nn.init.normal_(layer.weight)
    if hasattr(layer, "beta_u"):  # poses of a small network are nearly zero at first, and votes equal
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter)
    return model.eval()


def images(count=2, size=20):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1))


@every_case
def test_of_every_family(case):
    name, kwargs, passes, uniform = CASES[case]
    model, x = make(name, **kwargs), images()
    every = model.couplings(x, iteration=None)
    capsules, activations = inspect._routed_capsules(model, model.forward_features(x))
    assert has_couplings(model) and every.shape == (passes, 2, capsules.shape[1], 4) and not every.requires_grad
    torch.testing.assert_close(every.sum(dim=3), torch.ones(every.shape[:3]))
    assert torch.equal(model.couplings(x), every[-1]) and torch.equal(model.couplings(x, 0), every[0])
    with pytest.raises(IndexError, match=f"^iteration={passes} is not possible: there are {passes}, "):
        model.couplings(x, iteration=passes)
    entropy = inspect.coupling_entropy(model, x)
    assert (
        entropy.shape == (passes,) and entropy[-1] < 1 - 1e-9 and inspect.agreement(model, x).shape == every.shape[1:]
    )
    twin = make(name, **{**kwargs, **uniform})
    torch.testing.assert_close(inspect.coupling_entropy(twin, x), torch.ones(1))
    torch.testing.assert_close(inspect.agreement(twin, x), torch.ones(every.shape[1:]))
    assert activations is None or (activations >= 0).all()


@every_case
def test_maps_and_dead_capsules(case):
    name, kwargs, passes, _ = CASES[case]
    model, x = make(name, **kwargs), images()
    maps = inspect.part_maps(model, x, iteration=None)
    assert maps.shape == (passes, 2, 4, 20, 20) and (maps >= 0).all()
    torch.testing.assert_close(maps[:, :, :, 10, 10].sum(dim=2), torch.ones(passes, 2))  # means of shares
    torch.testing.assert_close(inspect.part_maps(model, x), maps[-1])
    if "inverted" in case or "other" in case:
        message = "^capsules of .* have neither lengths nor activations: none of them can be dead$"
        with pytest.raises(InspectionError, match=message):
            inspect.dead_capsules(model, [x])
    else:
        count = model.couplings(x).shape[1]
        assert inspect.dead_capsules(model, [x], threshold=2).tolist() == [True] * count
        assert inspect.dead_capsules(model, [x], threshold=0).tolist() == [False] * count


@pytest.mark.parametrize("case", ["inverted attention", "self-routing", "DeepCaps", "inverted attention head"])
def test_a_part_votes_where_it_is(case):
    """Capsules of the left column of each map vote for class 3, and it is seen at the left."""
    name, kwargs, _, _ = CASES[case]
    size = {"capsnet_head": 32, "deepcaps": 48}.get(name, 20)
    model, x = make(name, **kwargs, img_size=size).double(), images(4, size).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(x)  # statistics of normalisations, without which maps are nearly zero
    model.eval()
    grids, places = model.capsule_places()
    left, first = torch.zeros(len(places), dtype=torch.bool), 0
    for height, width in grids:
        inside = (places >= first) & (places < first + height * width)
        left |= inside & ((places - first) % width == 0)
        first += height * width
    shares = torch.full((1, len(x), len(places), 4), 0.1)
    shares[:, :, left, 3] = 0.7
    model.couplings_of = lambda features: shares
    maps = inspect.part_maps(model, x)[:, 3].mean(dim=(0, 1))  # over images and rows
    assert maps[:2].min() > maps[-2:].max() + 0.1


def test_places_of_two_maps():
    """Those of DeepCaps: the map of the last cell, then that of the cell before; each sees its own part."""
    model = make("deepcaps", img_size=64)
    grids, places = model.capsule_places()
    assert grids == [(4, 4), (8, 8)] and places.tolist() == [*range(80)] * 2
    assert inspect.receptive_fields(model).shape == (80, 1, 4)


def test_places_of_a_pruned_network():
    """Of the 3x3 capsules of a type the left and the right column are left; the left one votes for class 3."""
    model, x = make("capsnet", num_types=1, img_size=22, keep_capsules=[0, 2, 3, 5, 6, 8]), images(size=22)
    shares = torch.full((1, 2, 6, 4), 0.1)
    shares[:, :, ::2, 3] = 0.7
    model.couplings_of = lambda features: shares
    maps = inspect.part_maps(model, x)
    torch.testing.assert_close(maps[:, 3, 1:-1, :4], torch.full((2, 20, 4), 0.7))
    torch.testing.assert_close(maps[:, 3, 1:-1, 17:21], torch.full((2, 20, 4), 0.1))


def test_no_place_in_the_image():
    model, x = make("capsnet_resnet_ia", num_hidden=5), images()
    assert model.couplings(x).shape == (2, 5, 4)
    with pytest.raises(
        InspectionError, match="^the capsules that InvertedAttentionCapsNet routes are not those of a map"
    ):
        inspect.part_maps(model, x)
    found = report.find(model, [(x, torch.tensor([0, 1]))], [*"abcd"], changes=False)
    assert len(found.entropy) == 2 and found.part_maps is None


def test_without_capsule_layers():
    model, x = make("capsnet_resnet_sr", num_layers=0), images()
    with pytest.raises(RuntimeError, match="^this model was made without capsule layers and has no couplings"):
        model.couplings(x)
    for look in inspect.part_maps, inspect.coupling_entropy, inspect.agreement:
        with pytest.raises(InspectionError, match="^SelfRoutingNet has no couplings to look at"):
            look(model, x)
    found = report.find(model, [(x, torch.tensor([0, 1]))], [*"abcd"], changes=False)
    assert found.entropy == () and found.part_maps is None
    assert inspect.receptive_fields(model).shape == (5, 5, 4)
    with pytest.raises(InspectionError, match="has no capsules to look at"):
        inspect.dead_capsules(capszoo.create_model("cnn_baseline", conv_dim=4, img_size=20), [x])


def class_couplings_by_loops(layer, below, parents):
    """Procedure 1 of Tsai et al. 2020 for class capsules: poses ``[B, I, P, P]`` and those of the pass before."""
    num_capsules, side, _, num_classes = layer.weight.shape
    found = torch.zeros(len(below), num_capsules, num_classes, dtype=below.dtype)
    for b in range(len(below)):
        for i in range(num_capsules):
            votes = [below[b, i] @ layer.weight[i, :, :, j] for j in range(num_classes)]
            logits = [float((vote * parents[b, j]).sum()) / side for j, vote in enumerate(votes)]
            exponentials = [math.exp(logit) for logit in logits]
            found[b, i] = torch.tensor(exponentials, dtype=below.dtype) / sum(exponentials)
    return found


@pytest.mark.parametrize("concurrent", [True, False])
@torch.no_grad()
def test_passes_of_inverted_attention(concurrent):
    """Each pass against loops over capsules and classes, with all layers run by the paper's procedures."""
    kwargs = dict(stem_dims=[4], stem_depths=[1], num_types=2, pose_size=2, img_size=7, num_classes=3, in_chans=1)
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_resnet_ia", num_passes=3, concurrent=concurrent, **kwargs).double().eval()
    x = torch.rand(2, 1, 7, 7, dtype=torch.float64)
    primary = model.primary_caps.to_capsules(model.forward_features(x))
    layers = [*model.caps, model.class_caps]
    poses, expected = [primary], []
    for layer in layers:
        poses.append(layer(poses[-1]))
    maps = [poses]  # after each pass, of all layers
    for _ in range(2):
        maps.append([primary, *(layer(maps[-1][i], maps[-1][i + 1]) for i, layer in enumerate(layers))])
    if not concurrent:
        below = primary
        for layer in model.caps:
            above = layer(below)
            for _ in range(2):
                above = layer(below, above)
            below = above
        passes = [(below, model.class_caps(below))]
        for _ in range(2):
            passes.append((below, model.class_caps(below, passes[-1][1])))
    else:
        # In pass r the class capsules take what was below them after pass r - 1.
        passes = [(maps[0][-2], maps[0][-1]), *((maps[r - 1][-2], maps[r][-1]) for r in (1, 2))]
    for number, (below, _) in enumerate(passes):
        poses = below.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
        before = passes[number - 1][1] if number else torch.zeros_like(passes[0][1])
        parents = before.flatten(4).squeeze(4)
        expected.append(class_couplings_by_loops(model.class_caps, poses, parents))
    found = model.couplings(x, iteration=None)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(passes[-1][1].flatten(2), model.forward_capsules(x)[0].flatten(2))


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_self_routing(num_layers):
    """Equation 4 of Hahn, Pyeon and Kim 2019, one capsule after the other."""
    model = make("capsnet_resnet_sr", num_layers=num_layers, img_size=8).double()
    torch.nn.init.normal_(model.class_caps.bias)
    x = images(size=8).double()
    features = model.forward_features(x)
    types, dim = 3, 4
    activations, poses = features[:, :types].exp(), features[:, types:].unflatten(1, (types, dim))
    expected, capsule = torch.zeros(2, model.class_caps.num_capsules, 4, dtype=torch.float64), 0
    scores = torch.zeros(2, 4, dtype=torch.float64)
    for row in range(features.shape[2]):
        for column in range(features.shape[3]):
            for i in range(types):
                for b in range(2):
                    weight, bias = model.class_caps.weight[capsule], model.class_caps.bias[capsule]
                    logits = [float(weight[j] @ poses[b, i, :, row, column] + bias[j]) for j in range(4)]
                    exponentials = [math.exp(logit) for logit in logits]
                    expected[b, capsule] = torch.tensor(exponentials, dtype=torch.float64) / sum(exponentials)
                    scores[b] += activations[b, i, row, column] * expected[b, capsule]
                capsule += 1
    torch.testing.assert_close(model.couplings(x, iteration=None), expected[None], rtol=1e-10, atol=1e-10)
    shares = scores / activations.flatten(1).sum(1, keepdim=True)
    torch.testing.assert_close(model(x), shares.log(), rtol=1e-10, atol=1e-10)
    found = model.routed_capsules(features)[1]
    torch.testing.assert_close(found, activations.permute(0, 2, 3, 1).flatten(1))


@torch.no_grad()
def test_heads_are_asked_as_the_families():
    """A head's couplings are those of its class layer for the capsules of the map."""
    model, x = make("capsnet_head"), images()
    expected = model.head.class_caps.couplings(model.head.to_capsules(model.forward_features(x)))
    assert torch.equal(model.couplings(x, iteration=None), expected)
    with pytest.raises(RuntimeError, match="has num_classes=0"):
        make("capsnet_head", num_classes=0).couplings(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@every_case
def test_on_a_gpu(case):
    name, kwargs, _, _ = CASES[case]
    model, x = make(name, **kwargs), images()
    expected, maps = model.couplings(x, iteration=None), inspect.part_maps(model, x)
    moved = model.cuda()
    torch.testing.assert_close(moved.couplings(x.cuda(), iteration=None).cpu(), expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(inspect.part_maps(moved, x.cuda()).cpu(), maps, rtol=1e-2, atol=1e-3)
