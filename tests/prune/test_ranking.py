"""Scores find what matters."""

import pytest
import torch
from prune.networks import PER_TYPE, assert_same, batches, every_model, small

import capszoo
from capszoo.data import Loader, load_data
from capszoo.errors import TrainingError
from capszoo.layers import capsule_lengths, fold_scales
from capszoo.losses import MarginLoss, margin_loss, reconstruction_loss
from capszoo.prune import SCORES, prune, scores


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
    weights["primary_caps.conv.weight"] -= weights["primary_caps.conv.weight"].mean((1, 2, 3), keepdim=True)  # centred
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
    model = fold_scales(small())  # weights of centred filters that are 0 are not
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


def test_every_score_is_listed():
    assert set(SCORES) == {"magnitude", "taylor", "coupling", "look_ahead"}


def test_images_normalised_otherwise_than_the_model_takes_them_are_refused():
    model = capszoo.create_model("capsnet_tiny", conv_dim=8, num_types=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.13,), "std": (0.3,)}
    data = load_data("digits")
    images = Loader(data.val, 16, "cpu")
    with pytest.raises(TrainingError, match=r"normalised by mean=.* the model takes those of mean=\(0.13,\)"):
        scores(model, "types", "taylor", images)
    data.normalize((0.13,), (0.3,))
    assert scores(model, "types", "taylor", images).shape == (2,)
