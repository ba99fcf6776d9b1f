"""Pruning: what is left computes what the whole computes with the rest held at zero; scores find what matters."""

import copy
import inspect
import json
import shutil
import warnings

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import create_feature_extractor
from timm.models import save_for_hf
from torch.utils.flop_counter import FlopCounterMode

import capszoo
from capszoo.checkpoint import save_weights
from capszoo.layers import capsule_lengths
from capszoo.losses import MarginLoss, margin_loss, reconstruction_loss
from capszoo.models import CapsNet
from capszoo.prune import SCORES, PruneReport, cost, count_parts, prune, scores, target_counts

# 4 types of 2x3 positions, 24 capsules.
SMALL = dict(conv_dim=6, num_types=4, caps_dim=4, class_dim=5, num_classes=3, img_size=(20, 22), decoder_dims=(7, 9))
PER_TYPE = 6
MODELS = {
    "capsnet": {},
    "capsnet_ws": {},
    "capsnet_pruned": dict(keep_types=4, num_types=8),
    "capsnet_tiny": {},
    "capsnet with chosen types": dict(keep_types=(6, 1, 2, 4), num_types=8),
    "capsnet_tiny with approximate squash": dict(squash="approx", num_routing=2),
}
every_model = pytest.mark.parametrize("name", MODELS)


def small(name="capsnet", **kwargs):
    torch.manual_seed(0)
    options = {**SMALL, "decoder": True, "dtype": torch.float64, **MODELS.get(name, {}), **kwargs}
    model = capszoo.create_model(name.split(" ")[0], **options).eval()
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


def images(batch_size=4, dtype=torch.float64, size=(20, 22)):
    return torch.rand(batch_size, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def batches(num=3, **kwargs):
    return [(images(4, **kwargs).roll(i, 0) * (1 - i / 7), (torch.arange(4) + i) % 3) for i in range(num)]


def hold_at_zero(model, conv1=None, types=None, capsules=None, decoder=None):
    """A copy in which the activations of all parts but those kept are zero."""
    model = copy.deepcopy(model)
    num_types = model.primary_caps.num_types
    with torch.no_grad():
        if conv1 is not None:
            gone = [c for c in range(model.conv1.out_channels) if c not in conv1]
            model.conv1.weight[gone], model.conv1.bias[gone] = 0, 0
        if types is not None:
            gone = [t for t in range(num_types) if t not in types]
            conv = model.primary_caps.conv
            conv.weight.unflatten(0, (num_types, -1))[gone] = 0
            conv.bias.unflatten(0, (num_types, -1))[gone] = 0
        if decoder is not None:
            for fc, kept in zip((model.decoder.fc1, model.decoder.fc2), decoder, strict=True):
                gone = [u for u in range(fc.out_features) if u not in kept]
                fc.weight[gone], fc.bias[gone] = 0, 0
    if capsules is not None:
        there = model.keep_capsules or range(model.num_primary)
        mask = torch.zeros(model.num_primary, dtype=torch.float64)
        mask[[there[i] for i in capsules]] = 1
        mask = mask.view(num_types, 1, *model.grid_size)
        model.primary_caps.register_forward_hook(
            lambda module, args, x: (x.unflatten(1, (num_types, -1)) * mask.to(x.dtype)).flatten(1, 2)
        )
    return model


def assert_same(found, expected, atol=1e-12):
    x = images(dtype=found.conv1.weight.dtype, size=found.img_size)
    with torch.no_grad():
        torch.testing.assert_close(found.forward_capsules(x)[0], expected.forward_capsules(x)[0], rtol=0, atol=atol)
        if found.decoder is not None:
            target = torch.arange(4) % found.num_classes
            drawn, whole = found.reconstruct(x, target), expected.reconstruct(x, target)
            torch.testing.assert_close(drawn, whole, rtol=0, atol=atol)


def as_created(model):
    """The network that the saved arguments make, with these weights."""
    arguments = json.loads(json.dumps(model.creation_args))
    again = capszoo.create_model(model.pretrained_cfg["architecture"], dtype=torch.float64, **arguments).eval()
    again.load_state_dict(model.state_dict())
    return again


KEPT = {
    "conv1": dict(conv1=(0, 2, 5)),
    "types": dict(types=(1, 3)),
    "capsules": dict(capsules=(0, 3, 4, 7, 12, 13, 14, 15, 17, 23)),
    "capsules of three types": dict(capsules=(0, 1, 2, 12, 23)),
    "decoder": dict(decoder=((1, 2, 6), (0, 8))),
    "all": dict(conv1=(1, 4), types=(0, 2, 3), decoder=((0, 5), (3, 4, 5))),
}


@every_model
@pytest.mark.parametrize("parts", KEPT)
def test_the_rest_held_at_zero(name, parts):
    model = small(name)
    before = copy.deepcopy(model.state_dict())
    smaller, report = prune(model, KEPT[parts])
    assert_same(smaller, hold_at_zero(model, **KEPT[parts]))
    assert_same(as_created(smaller), smaller, atol=0)
    assert report.kept.items() >= KEPT[parts].items()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), smaller.parameters(), strict=True))


def indices_below(total):
    return st.sets(st.integers(0, total - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("share_weights", [False, True])
def test_any_parts_twice(share_weights, data):
    """Pruned, and pruned again: indices count in the network at hand, and the report's in the first one."""
    model = small(share_weights=share_weights)
    once, first = prune(model, {"capsules": data.draw(indices_below(24))})
    counts = count_parts(once)
    keep = {"types": data.draw(indices_below(counts["types"])), "conv1": data.draw(indices_below(6))}
    keep["decoder"] = tuple(data.draw(indices_below(n)) for n in (7, 9))
    twice, second = prune(once, keep)
    last, third = prune(twice, {"capsules": data.draw(indices_below(count_parts(twice)["capsules"]))})
    assert_same(twice, hold_at_zero(once, **keep))
    assert_same(last, hold_at_zero(twice, capsules=third.kept["capsules"]))
    types_left = first.kept.get("types", range(4))
    of_types = [i for i in first.kept["capsules"] if types_left.index(i // PER_TYPE) in keep["types"]]
    assert count_parts(twice)["capsules"] == len(of_types)
    kept_of_first = [of_types[i] for i in third.kept["capsules"]]
    held = hold_at_zero(model, conv1=keep["conv1"], capsules=kept_of_first, decoder=keep["decoder"])
    assert_same(last, held)
    assert_same(as_created(last), last, atol=0)


def test_types_then_capsules_in_one_call():
    model = small("capsnet_ws")
    smaller, report = prune(model, {"capsules": (0, 1, 5, 8), "types": (1, 3)})
    # Capsules count among those of types 1 and 3.
    assert report.kept == {"types": (1, 3), "capsules": (6, 7, 11, 20)}
    assert_same(smaller, hold_at_zero(model, capsules=(6, 7, 11, 20)))
    smaller, report = prune(model, {"capsules": (7, 8), "types": (1, 3)})
    assert report.kept == {"types": (3,), "capsules": (19, 20)} and smaller.primary_caps.num_types == 1


def test_named_types_select_the_same_of_full_weights(tmp_path):
    full = small(img_size=28, num_classes=10)  # as the default configuration says
    full.float()
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    smaller, _ = prune(full, {"types": (3, 1), "capsules": range(5, 40)})
    assert smaller.arguments()["keep_types"] == [1, 3]
    overlay = dict(file=str(tmp_path / "full.safetensors"))
    loaded = timm.create_model("capsnet", pretrained=True, pretrained_cfg_overlay=overlay, **smaller.creation_args)
    assert_same(loaded.eval(), smaller, atol=1e-6)
    again, _ = prune(smaller, {"types": [1]})
    assert again.keep_types == (3,)
    unnamed, _ = prune(small("capsnet_pruned"), {"types": (0, 2, 3)})
    assert unnamed.arguments()["keep_types"] == 3


@every_model
def test_saved_and_loaded(name, tmp_path):
    smaller, _ = prune(small(name).float(), {"conv1": 3, "capsules": 13, "decoder": (2, 3)}, "magnitude")
    header = {"model": smaller.pretrained_cfg["architecture"], "model_args": smaller.creation_args}
    save_weights(tmp_path / "pruned.safetensors", smaller, header)
    assert_same(capszoo.load_model(tmp_path / "pruned.safetensors").eval(), smaller, atol=0)
    assert capszoo.load_model(tmp_path / "pruned.safetensors", decoder=False).decoder is None
    save_for_hf(smaller, tmp_path / "folder", safe_serialization=True)
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval(), smaller, atol=0)


def test_other_size_of_chosen_capsules(tmp_path):
    smaller, _ = prune(small().float(), {"capsules": 13}, "magnitude")
    save_for_hf(smaller, tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="^keep_capsules chooses positions of 20x22 images.*means others at") as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=24)
    assert "\n" not in str(error.value)
    with pytest.raises(AssertionError, match="a choice of 24 capsules got 80: make the model for this img_size"):
        smaller(images(dtype=torch.float32, size=(24, 26)))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=24, num_classes=0)
    assert features(images(dtype=torch.float32, size=(24, 24))).shape == (4, features.head_hidden_size)


def test_weights_with_fewer_capsules_are_not_cut_as_if_whole(tmp_path):
    smaller, _ = prune(small(img_size=28, num_classes=10).float(), {"capsules": range(96)})
    assert smaller.primary_caps.num_types == 3
    save_file(smaller.state_dict(), tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"))
    arguments = {**smaller.creation_args, "keep_types": [0, 1], "keep_capsules": list(range(48))}
    with pytest.raises(ValueError, match="these weights do not fit 'capsnet'"):
        timm.create_model("capsnet", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def test_what_the_network_keeps_beside_its_weights():
    model = small(dtype=torch.float32, drop_rate=0.25).train()
    model.primary_caps.eval()
    model.conv1.requires_grad_(False)
    model.class_caps.bias.requires_grad_(False)
    model.set_grad_checkpointing()
    model.to(memory_format=torch.channels_last)
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "mnist", "url": "https://x", "file": "w", "license": "mit"}
    torch.manual_seed(3)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    smaller, _ = prune(model, {"types": 2, "capsules": 5}, "taylor", batches(dtype=torch.float32))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(smaller) is CapsNet and smaller.training and not smaller.primary_caps.training
    assert modes == [module.training for module in model.modules()] and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in (*model.modules(), *smaller.modules()))
    frozen = {name for name, p in smaller.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight", "conv1.bias", "class_caps.bias"}
    assert all(p.is_leaf and p.dtype == torch.float32 for p in smaller.parameters())
    assert smaller.grad_checkpointing and smaller.drop_rate == 0.25
    assert smaller.primary_caps.conv.weight.is_contiguous(memory_format=torch.channels_last)
    cfg = smaller.pretrained_cfg
    assert (cfg["architecture"], cfg["num_classes"], cfg["input_size"]) == ("capsnet", 3, (1, 20, 22))
    assert cfg["pool_size"] == (2, 3) and cfg["license"] == "mit" and not {"tag", "url", "file"} & set(cfg)
    assert smaller.default_cfg is cfg and model.pretrained_cfg["tag"] == "mnist"


def test_after_reset_and_on_the_meta_device():
    model = small(num_classes=10)
    model.reset_classifier(4)
    smaller, _ = prune(model, {"types": (0, 2)})
    assert smaller.num_classes == 4 and smaller(images()).shape == (4, 4)
    meta, _ = prune(small(device="meta"), {"conv1": (0, 1), "types": (0, 2), "capsules": range(7)})
    assert meta(images().to("meta")).shape == (4, 3)
    meta.to_empty(device="cpu")
    whole, _ = prune(small(), {"conv1": (0, 1), "types": (0, 2), "capsules": range(7)})
    meta.load_state_dict(whole.state_dict())
    assert_same(meta, whole, atol=0)


def test_reset_classifier_of_chosen_capsules():
    smaller, _ = prune(small("capsnet_ws"), {"capsules": (0, 1, 2, 9, 23)})
    smaller.reset_classifier(0)
    assert smaller(images()).shape == (4, smaller.head_hidden_size)
    smaller.reset_classifier(7)
    assert smaller(images()).shape == (4, 7) and smaller.class_caps.num_capsules == 3 * 3
    assert as_created(
        type(
            "",
            (),
            dict(
                creation_args=smaller.arguments(), pretrained_cfg=smaller.pretrained_cfg, state_dict=smaller.state_dict
            ),
        )
    )(images()).equal(smaller(images()))


# Scores


@pytest.fixture(scope="module")
def data():
    return batches()


@every_model
@pytest.mark.parametrize("part", ["conv1", "types", "capsules", "decoder"])
def test_taylor_is_the_definition(name, part, data):
    """By perturbation: the loss of an image when the part's activations shrink by a small fraction."""
    model = small(name)
    found = scores(model, part, "taylor", data)
    factor = torch.ones((), dtype=torch.float64)
    expected = torch.zeros_like(found)
    count = 0
    for x, labels in data:
        for one, label in zip(x.split(1), labels.split(1), strict=True):
            for p in range(len(found)):
                step = 1e-4
                losses = [loss_with_scaled(model, part, p, factor + sign * step, one, label) for sign in (1, -1)]
                expected[p] += abs(losses[0] - losses[1]) / (2 * step)
            count += 1
        if count >= 4:
            break
    torch.testing.assert_close(scores(model, part, "taylor", data[:1]), expected / count, rtol=1e-4, atol=1e-9)
    assert found.dtype == torch.float64 and found.shape == expected.shape


@torch.no_grad()
def loss_with_scaled(model, part, p, factor, x, label):
    x1 = model.act1(model.conv1(x))
    if part == "conv1":
        x1 = torch.cat([x1[:, :p], x1[:, p : p + 1] * factor, x1[:, p + 1 :]], dim=1)
    features = model.primary_caps(x1)
    scale = torch.ones(model.num_primary, dtype=torch.float64)
    if part == "types":
        scale[p * PER_TYPE : (p + 1) * PER_TYPE] = factor
    if part == "capsules":
        scale[p] = factor
    capsules = model.class_caps(model.to_capsules(features) * scale[:, None])
    hidden = model.decoder.act1(model.decoder.fc1(decoder_input(model, capsules, label)))
    width = hidden.shape[1]
    if part == "decoder" and p < width:
        hidden[:, p] *= factor
    hidden = model.decoder.act2(model.decoder.fc2(hidden))
    if part == "decoder" and p >= width:
        hidden[:, p - width] *= factor
    drawn = model.decoder.fc3(hidden).sigmoid().view_as(x)
    return margin_loss(capsule_lengths(capsules), label) + 0.0005 * reconstruction_loss(drawn, x)


def test_taylor_takes_the_criterion_of_the_task(data):
    model, criterion = small(), MarginLoss(0.7, 0.3, 0.9)
    found = scores(model, "conv1", "taylor", data, criterion)
    assert not torch.allclose(found, scores(model, "conv1", "taylor", data))
    assert torch.equal(scores(model, "conv1", "taylor", data, MarginLoss()), scores(model, "conv1", "taylor", data))
    smaller, _ = prune(model, {"conv1": 3}, data=data, criterion=criterion)
    best = found.argsort(descending=True, stable=True)[:3].sort().values
    assert torch.equal(smaller.conv1.weight, model.conv1.weight[best])


def decoder_input(model, capsules, label):
    if model.decoder.small:
        return capsules[torch.arange(len(label)), label]
    mask = torch.nn.functional.one_hot(label, model.num_classes)
    return (capsules * mask[..., None]).flatten(1)


def test_taylor_and_coupling_sum_over_types(data):
    model = small()
    coupling = scores(model, "capsules", "coupling", data)
    torch.testing.assert_close(scores(model, "types", "coupling", data), coupling.view(4, PER_TYPE).sum(dim=1))


@pytest.mark.parametrize("name", ["capsnet", "capsnet_ws"])
@pytest.mark.parametrize("num_routing", [1, 3])
def test_coupling_is_the_definition(name, num_routing, data):
    model = small(name, num_routing=num_routing)
    votes_of = model.class_caps.weight.detach()
    expected = torch.zeros(24, dtype=torch.float64)
    for x, labels in data:
        poses = model.to_capsules(model.forward_features(x)).detach()
        for b, label in enumerate(labels):
            logits = torch.zeros(24, 3, dtype=torch.float64)
            for r in range(num_routing):
                c = logits.softmax(dim=1)
                sums = model.class_caps.bias.detach().clone()
                for i in range(24):
                    vote = torch.einsum("k,kjd->jd", poses[b, i], votes_of[i // PER_TYPE if "ws" in name else i])
                    sums += c[i][:, None] * vote
                v = capszoo.layers.squash(sums)
                if r == num_routing - 1:
                    # The class capsule of these couplings is the network's own.
                    torch.testing.assert_close(v, model.forward_capsules(x)[0][b].detach())
                for i in range(24):
                    vote = torch.einsum("k,kjd->jd", poses[b, i], votes_of[i // PER_TYPE if "ws" in name else i])
                    logits[i] += (vote * v).sum(dim=1)
            expected += c[:, label] * poses[b].norm(dim=1)
    torch.testing.assert_close(scores(model, "capsules", "coupling", data), expected / 12)


@pytest.mark.parametrize("score", ["taylor", "coupling"])
def test_several_classes(score, data):
    """One class as weights of the classes scores as its index does; of several, the couplings are added up."""
    model = small()
    one_hot = [(x, torch.nn.functional.one_hot(labels, 3).float()) for x, labels in data]
    found = scores(model, "types", score, data)
    torch.testing.assert_close(scores(model, "types", score, one_hot), found)
    both = [(x, (labels + labels.roll(1, dims=1)).bool()) for x, labels in one_hot]
    several = scores(model, "types", score, both)
    if score == "coupling":
        other = scores(model, "types", score, [(x, (labels + 1) % 3) for x, labels in data])
        torch.testing.assert_close(several, found + other)
    assert (several > 0).all() and not torch.allclose(several, found)
    assert prune(model, {"types": 2}, score, both)[0].primary_caps.num_types == 2


@pytest.mark.parametrize("name", ["capsnet", "capsnet_ws"])
def test_norms_are_the_definition(name):
    model = small(name)
    weights = {key: value.detach() for key, value in model.named_parameters()}
    shared = name == "capsnet_ws"
    for conv in ("conv1", "primary_caps.conv"):
        weights[f"{conv}.weight"] = weights[f"{conv}.weight"] * model.get_submodule(conv).scale
    filters = weights["primary_caps.conv.weight"].view(4, 4, 6, 9, 9)
    biases, votes = weights["primary_caps.conv.bias"].view(4, 4), weights["class_caps.weight"]
    for c in range(6):
        own = torch.cat([weights["conv1.weight"][c].flatten(), weights["conv1.bias"][c : c + 1]]).norm()
        torch.testing.assert_close(scores(model, "conv1", "magnitude")[c], own)
        far = weights["conv1.weight"][c].norm() * filters[:, :, c].norm()
        torch.testing.assert_close(scores(model, "conv1", "look_ahead")[c], far)
    for t in range(4):
        matrices = votes[t : t + 1] if shared else votes[t * PER_TYPE : (t + 1) * PER_TYPE]
        own = torch.cat([filters[t].flatten(), biases[t], matrices.flatten()]).norm()
        torch.testing.assert_close(scores(model, "types", "magnitude")[t], own)
        looked = [
            filters[t, k, c] * weights["conv1.weight"][c].norm() * matrices[:, k].norm()
            for k in range(4)
            for c in range(6)
        ]
        torch.testing.assert_close(scores(model, "types", "look_ahead")[t], torch.stack(looked).norm())
    for i in (0, 5, 6, 23):
        t, matrix = i // PER_TYPE, votes[i // PER_TYPE if shared else i]
        own = torch.cat([filters[t].flatten(), biases[t], matrix.flatten()]).norm()
        torch.testing.assert_close(scores(model, "capsules", "magnitude")[i], own)
        looked = torch.stack([matrix[k] * filters[t, k].norm() for k in range(4)]).norm()
        torch.testing.assert_close(scores(model, "capsules", "look_ahead")[i], looked)
    fc1, fc2, fc3 = (weights[f"decoder.fc{n}.weight"] for n in (1, 2, 3))
    far = scores(model, "decoder", "look_ahead")
    before = torch.stack([votes[:, :, u // 5, u % 5].norm() for u in range(15)])
    if shared:  # the small decoder takes the values of any one class
        before = torch.stack([votes[..., d].norm() for d in range(5)])
    torch.testing.assert_close(far[2], (fc1[2] * before).norm() * fc2[:, 2].norm())
    torch.testing.assert_close(far[7 + 4], (fc2[4] * fc1.norm(dim=1)).norm() * fc3[:, 4].norm())
    near = scores(model, "decoder", "magnitude")
    torch.testing.assert_close(near[7 + 4], torch.cat([fc2[4], weights["decoder.fc2.bias"][4:5]]).norm())


@pytest.mark.parametrize("score", ["taylor", "magnitude", "look_ahead", "coupling"])
@pytest.mark.parametrize("name", ["capsnet", "capsnet_ws"])
def test_finds_what_was_made_irrelevant(name, score, data):
    """A filter, a type and a unit that say nothing are the first to go, and nothing changes."""
    model = small(name)
    with torch.no_grad():
        model.conv1.weight[4], model.conv1.bias[4] = 0, 0
        for parameter in (model.primary_caps.conv.weight, model.primary_caps.conv.bias, model.class_caps.weight):
            parameter.unflatten(0, (4, -1))[2] = 0
        for fc, unit in ((model.decoder.fc1, 1), (model.decoder.fc2, 3)):
            fc.bias += 1  # all others fire
            fc.weight[unit], fc.bias[unit] = 0, 0
    keep = {"types": 3} if score == "coupling" else {"conv1": 5, "types": 3, "decoder": (6, 8)}
    smaller, report = prune(model, keep, score, data)
    assert report.kept["types"] == (0, 1, 3)
    if score != "coupling":
        assert report.kept["conv1"] == (0, 1, 2, 3, 5)
        assert report.kept["decoder"] == ((0, 2, 3, 4, 5, 6), (0, 1, 2, 4, 5, 6, 7, 8))
    assert_same(smaller, model)
    _, report = prune(model, {"capsules": 18}, score, data)
    assert report.kept["types"] == (0, 1, 3)


@pytest.mark.parametrize("where", ["conv1", "types", "capsules"])
def test_taylor_sees_what_norms_do_not(where, data):
    """Large weights behind which nothing follows."""
    model = small()
    with torch.no_grad():
        if where == "conv1":
            model.conv1.weight[2] *= 10
            model.primary_caps.conv.weight[:, 2] = 0
        else:
            model.primary_caps.conv.weight.unflatten(0, (4, -1))[1] *= 10
            model.class_caps.weight.unflatten(0, (4, -1))[1] = 0
    lost = range(6, 12) if where == "capsules" else [2] if where == "conv1" else [1]
    assert scores(model, where, "taylor", data)[lost].max() == 0
    assert scores(model, where, "magnitude")[lost].min() >= scores(model, where, "magnitude").median()


@every_model
def test_units_that_never_fire(name, data):
    model = small(name)
    with torch.no_grad():
        for fc in (model.decoder.fc1, model.decoder.fc2):
            fc.bias += 1
        model.decoder.fc1.bias[[0, 3]] = -100
        model.decoder.fc2.bias[[1, 5, 6]] = -100
    found = scores(model, "decoder", "taylor", data)
    assert found[[0, 3, 7 + 1, 7 + 5, 7 + 6]].max() == 0 and (found > 0).sum() == 5 + 6
    smaller, report = prune(model, {"decoder": (5, 6)}, "taylor", data)
    assert report.kept["decoder"] == ((1, 2, 4, 5, 6), (0, 2, 3, 4, 7, 8))
    assert_same(smaller, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    smaller, _ = prune(small().to(dtype), {"types": 2, "capsules": 8, "decoder": 0.5}, "taylor", batches())
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    assert scores(small().to(dtype), "types", "coupling", batches()).isfinite().all()


def test_data_may_be_read_once():
    keep = {"conv1": 4, "capsules": 9}
    _, report = prune(small(), keep, "taylor", iter(batches()))
    assert report == prune(small(), keep, "taylor", batches())[1]


@settings(max_examples=30, deadline=None)
@given(fraction=st.floats(0, 1, exclude_min=True), number=st.integers(1, 24))
def test_numbers_and_fractions(fraction, number):
    model = small()
    keep = {"conv1": fraction, "capsules": number, "decoder": (fraction, 3)}
    targets = target_counts(model, keep)
    smaller, report = prune(model, keep, "magnitude")
    assert targets == {part: count_parts(smaller)[part] for part in keep}
    assert abs(targets["conv1"] - 6 * fraction) <= 0.5 or targets["conv1"] == 1
    best = scores(model, "conv1", "magnitude").topk(targets["conv1"]).indices.sort().values
    assert report.kept["conv1"] == tuple(best.tolist())
    assert len(report.kept["capsules"]) == number


def test_one_is_a_number_and_a_whole_a_fraction():
    assert count_parts(prune(small(), {"types": 1}, "magnitude")[0])["types"] == 1
    smaller, report = prune(small(), {"types": 1.0, "conv1": 1.0, "decoder": 1.0, "capsules": 24}, "magnitude")
    assert report.before == report.after and smaller.arguments() == small().arguments()
    assert_same(smaller, small(), atol=0)


# The report


@every_model
def test_costs(name):
    model = small(name, dtype=torch.float32)
    keep = {"conv1": 4, "capsules": (0, 1, 2, 9, 10, 18), "decoder": (3, 4)}
    smaller, report = prune(model, keep, "magnitude")
    for network, found in ((model, report.before), (smaller, report.after)):
        weights = [w for key, w in network.named_parameters() if not key.startswith("decoder.")]
        assert found.parameters == sum(map(torch.numel, weights))
        assert found.parameters_with_decoder == sum(map(torch.numel, network.parameters()))
        assert (found.float32_bytes, found.float16_bytes) == (4 * found.parameters, 2 * found.parameters)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.forward_features(images(1, torch.float32))  # convolutions alone
        capsules, iterations = network.class_caps.num_capsules, network.class_caps.routing.num_iters
        assert found.routing_macs == capsules * 3 * 5 * (4 + 2 * iterations - 1)
        assert found.macs == counter.get_total_flops() // 2 + found.routing_macs
        assert found == cost(network)
    assert smaller.class_caps.num_capsules == (9 if model.share_weights else 6)  # 3 + 2 + 1, filled up to 3 each
    text = str(report)
    assert isinstance(report, PruneReport) and f"{report.after.parameters:,}" in text and "routing macs" in text
    assert "capsules kept" in text and "3 and 4" in text


def test_costs_count_frozen_parameters():
    model = small().requires_grad_(False)
    assert cost(model) == cost(small())


def test_paper_size():
    model = capszoo.create_model("capsnet", decoder=True, device="meta")
    assert cost(model).parameters == 6_804_384 and cost(model).parameters_with_decoder == 8_215_728
    smaller, report = prune(model, {"types": range(8)})
    expected = capszoo.create_model("capsnet", keep_types=8, decoder=True, device="meta")
    assert report.after == cost(expected) and smaller.class_caps.num_capsules == 288
    assert report.after.routing_macs * 4 == report.before.routing_macs


# Wrong arguments

WRONG = {
    "unknown part": (dict(keep={"type": 2}), "unknown part 'type', did you mean 'types'"),
    "unknown score": (dict(keep={"types": 2}, score="tailor"), "unknown score 'tailor', did you mean 'taylor'"),
    "nothing": (dict(keep={}), "keep is empty"),
    "zero": (dict(keep={"types": 0}), "types=0 is not possible: there are 4, keep 1 to 4"),
    "too many": (dict(keep={"capsules": 25}), "capsules=25 is not possible: there are 24"),
    "too many of few types": (dict(keep={"types": 2, "capsules": 13}), "capsules=13 is not possible: there are 12"),
    "negative": (dict(keep={"conv1": -1}), "conv1=-1 is not possible"),
    "fraction of nothing": (dict(keep={"conv1": 0.0}), "conv1=0.0 is not possible: a fraction"),
    "fraction above one": (dict(keep={"conv1": 1.5}), "conv1=1.5 is not possible: a fraction"),
    "not a number": (dict(keep={"conv1": float("nan")}), "conv1=nan is not possible: a fraction"),
    "boolean": (dict(keep={"conv1": True}), "conv1=True is not possible: give a number"),
    "text": (dict(keep={"conv1": "8"}), "conv1='8' is not possible"),
    "none": (dict(keep={"conv1": None}), "conv1=None is not possible"),
    "no indices": (dict(keep={"types": []}), "keep at least one"),
    "twice": (dict(keep={"types": [1, 2, 1]}), "types holds index 1 twice"),
    "out of range": (dict(keep={"types": [0, 4]}), "types holds index 4: there are 4, give indices from 0 to 3"),
    "broken indices": (dict(keep={"types": [0, 1.5]}), "indices are whole numbers"),
    "one number for two layers": (dict(keep={"decoder": 5}), "decoder=5 is not possible: give a pair"),
    "three layers": (dict(keep={"decoder": (5, 5, 5)}), "give a pair"),
    "wide decoder": (dict(keep={"decoder": (8, 5)}), "decoder=8 is not possible: there are 7"),
    "no data": (dict(keep={"types": 2}, score="taylor"), "score 'taylor' needs data"),
    "no data for couplings": (dict(keep={"types": 2}, score="coupling"), "score 'coupling' needs data"),
    "no images": (dict(keep={"types": 2}, data=[]), "data holds no images"),
    "couplings of filters": (dict(keep={"conv1": 2}, score="coupling"), "ranks types and capsules, not 'conv1'"),
    "other images": (dict(keep={"types": 2}, data=[(images(2).mT, torch.tensor([0, 1]))]), "(2, 1, 22, 20)"),
    "other classes": (dict(keep={"types": 2}, data=[(images(2), torch.tensor([0, 3]))]), "labels outside 0 to 2"),
    "weights of other classes": (dict(keep={"types": 2}, data=[(images(2), torch.rand(2, 4))]), "give class indices"),
    "broken images": (dict(keep={"types": 2}, data=[(images(2) * torch.nan, torch.tensor([0, 1]))]), "is not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError) as error:
        prune(small(), **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: torch.nn.Linear(2, 2), "Linear cannot be pruned"),
        (
            lambda: capszoo.create_model("cnn_baseline_tiny"),
            "^cnn_baseline_tiny cannot be pruned: give a CapsNet that ",
        ),
        (lambda: CapsNet(device="meta"), "that capszoo.create_model made"),
        (lambda: small(num_classes=0), "num_classes=0 and no class capsules"),
        (lambda: small(features_only=True), "cannot be pruned"),
        (lambda: small(decoder=False), "has no decoder to prune"),
    ],
)
def test_wrong_models(model, message):
    with pytest.raises(ValueError, match=message):
        prune(model(), {"decoder": (1, 1)})


@pytest.mark.parametrize(
    "kept, message",
    [
        ([], "keep_capsules is empty"),
        (5, "keep_capsules=5 is not possible: give a list"),
        ([1, 2, 1], "keep_capsules holds 1 twice"),
        ([0, 24], "keep_capsules holds 24: give indices from 0 to 23, of the 24 capsules of 20x22 images"),
        ([-1], "keep_capsules holds -1"),
    ],
)
def test_wrong_capsules(kept, message):
    with pytest.raises(ValueError, match=message) as error:
        small(keep_capsules=kept)
    assert "\n" not in str(error.value)


# Ways out of eager PyTorch

OWN, SHARED = dict(), dict(share_weights=True)
both = pytest.mark.parametrize("kind", [OWN, SHARED], ids=["own matrices", "shared matrices"])


def chosen(kind, **kwargs):
    """Types that keep 3, 2, 0 and 1 capsules."""
    return small(dtype=torch.float32, decoder=False, keep_capsules=(0, 1, 3, 8, 9, 20), **kind, **kwargs)


@both
def test_script(kind, tmp_path):
    model, x = chosen(kind), images(dtype=torch.float32)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    torch.jit.save(scripted, tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x[:1]), model(x[:1]))


@both
def test_fx(kind):
    model, x = chosen(kind), images(dtype=torch.float32)
    traced = create_feature_extractor(model, ["class_caps"])
    assert torch.equal(traced(x)["class_caps"], model.forward_capsules(x)[0])


@both
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(kind, strict, tmp_path):
    model, x = chosen(kind), images(dtype=torch.float32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x[:3]), model(x[:3]))


@both
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(kind, dynamo, tmp_path):
    import onnxruntime

    model, x = chosen(kind), images(dtype=torch.float32)
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The newer exporter of torch 2.7 does not say that it runs.
        says_so = "_is_onnx_exporting" in inspect.getsource(torch.onnx.is_in_onnx_export)
        with capszoo.set_fused_routing(says_so or not dynamo):
            torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=0, atol=1e-5)


@both
def test_compile_in_one_graph(kind):
    model, x = chosen(kind), images(dtype=torch.float32)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-6)


@both
def test_copies_devices_and_information(kind):
    model, x = chosen(kind), images(dtype=torch.float32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert "capsule_index" not in model.state_dict()
    assert model.double().capsule_index.dtype == torch.int64
    full = capszoo.model_info("capsnet", **{**SMALL, **kind})
    assert capszoo.model_info(model.float()).macs < full.macs
    timm_features = timm.create_model("capsnet", **{**SMALL, **kind, "keep_capsules": (0, 1)}, features_only=True)
    assert [f.shape[1] for f in timm_features(x)] == [6, 16, 16]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@both
def test_compile(kind):
    model, x = chosen(kind), images(dtype=torch.float32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_model
def test_cuda(name):
    model = small(name, dtype=torch.float32).cuda()
    keep = {"conv1": 4, "types": 3, "capsules": 10, "decoder": 0.5}
    for score in ("taylor", "magnitude"):
        smaller, report = prune(model, keep, score, batches(dtype=torch.float32))
        assert {p.device.type for p in smaller.parameters()} == {"cuda"}
        assert smaller(images(dtype=torch.float32).cuda()).shape == (4, 3)
        assert report.after == cost(smaller.cpu())


def test_every_score_is_listed():
    assert set(SCORES) == {"magnitude", "taylor", "coupling", "look_ahead"}
