"""Looking into networks: couplings, perturbations, maps, attributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capszoo
from capszoo import inspect
from capszoo.errors import InspectionError
from capszoo.kernels import reference, routing_couplings


def make(name="capsnet_tiny", **kwargs):
    torch.manual_seed(0)
    return capszoo.create_model(name, **{"img_size": 20, "decoder": True, **kwargs}).eval()


def images(count=3, size=20):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1))


def couplings_of_the_reference(x, weight, bias, num_iters, approximate):
    """The procedure, with all votes."""
    votes = torch.einsum("btpk,tkjd->btpjd", x.unflatten(1, (len(weight), -1)), weight).flatten(1, 2)
    logits, found = torch.zeros(votes.shape[:3], dtype=votes.dtype), []
    for _ in range(num_iters):
        found.append(logits.softmax(dim=2))
        v = reference.squash((found[-1].unsqueeze(3) * votes).sum(dim=1) + bias, approximate)
        logits = logits + (votes * v.unsqueeze(1)).sum(dim=3)
    return torch.stack(found)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (4, 5, 4, 6, 5, 7))),
    num_iters=st.integers(1, 4),
    approximate=st.booleans(),
)
def test_couplings_are_those_of_the_procedure(sizes, num_iters, approximate):
    B, T, P, K, J, D = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T * P, K), (T, K, J, D), (J, D)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    expected = couplings_of_the_reference(x, weight, bias, num_iters, approximate)
    torch.testing.assert_close(routing_couplings(x, weight, bias, num_iters, approximate), expected)
    plain = reference.dynamic_routing_couplings(x, weight, bias, num_iters, approximate)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-12)
    actual = routing_couplings(x.float(), weight.float(), bias.float(), num_iters, approximate)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_couplings_without_capsules():
    found = routing_couplings(torch.rand(2, 0, 3), torch.rand(1, 3, 4, 5), torch.rand(4, 5))
    assert found.shape == (3, 2, 0, 4)


@pytest.mark.parametrize(("name", "iterations"), [("capsnet_tiny", 3), ("capsnet", 3), ("efficient_capsnet", 1)])
def test_couplings_of_a_model(name, iterations):
    model = make(name)
    x = images()
    every = model.couplings(x, iteration=None)
    assert len(every) == iterations and torch.equal(model.couplings(x), every[-1])
    torch.testing.assert_close(every.sum(dim=-1), torch.ones(every.shape[:-1]))
    with pytest.raises(IndexError, match=f"^iteration={iterations} is not possible: there are {iterations}, "):
        model.couplings(x, iteration=iterations)


def test_the_couplings_give_the_class_capsules():
    """Votes weighed by the couplings of the last iteration are what the layer squashes."""
    model, x = make(), images()
    capsules, _ = model.forward_capsules(x)
    primary, weight, bias = model.to_capsules(model.forward_features(x)), model.class_caps.weight, model.class_caps.bias
    votes = torch.einsum("btpk,tkjd->btpjd", primary.unflatten(1, (len(weight), -1)), weight).flatten(1, 2)
    summed = torch.einsum("bij,bijd->bjd", model.couplings(x), votes) + bias
    torch.testing.assert_close(reference.squash(summed), capsules, rtol=1e-4, atol=1e-5)


def test_a_model_without_classes():
    with pytest.raises(RuntimeError, match="has num_classes=0 and no class capsules"):
        make(num_classes=0, decoder=False).couplings(images())


def test_perturb():
    model, x = make(), images()
    drawn = inspect.perturb(model, x, dims=[0, 5], values=[-0.1, 0.0, 0.2])
    assert drawn.shape == (3, 2, 3, 1, 20, 20)
    torch.testing.assert_close(drawn[:, 0, 1], model.reconstruct(x))
    capsules, scores = model.forward_capsules(x)
    index = scores[1].argmax()
    capsules[1, index, 5] += 0.2
    torch.testing.assert_close(drawn[1, 1, 2], model.decoder(capsules, scores.argmax(dim=1))[1])
    assert inspect.perturb(model, x[:1]).shape == (1, 16, 11, 1, 20, 20)
    assert not torch.equal(inspect.perturb(model, x, [0], [0.0], torch.tensor([1, 1, 1])), drawn[:, :1, 1:2])
    with pytest.raises(InspectionError, match="^dims has 16: a capsule has 16 numbers, counted from 0$"):
        inspect.perturb(model, x, dims=[16])
    with pytest.raises(InspectionError, match="^this model has no decoder to draw with: make it with decoder=True"):
        inspect.perturb(make(decoder=False), x)


def test_entropy():
    model, x = make(), images()
    found = inspect.coupling_entropy(model, x)
    assert found.shape == (3,) and found[0].item() == pytest.approx(1.0, abs=1e-6) and found[2] < found[1] < 1
    with torch.no_grad():
        model.class_caps.weight *= 1e4  # each capsule is for one class
    assert inspect.coupling_entropy(model, x)[2] < 0.05


def test_agreement():
    model, x = make(), images()
    assert inspect.agreement(model, x).shape == (3, model.num_types * 4, 10)
    torch.testing.assert_close(inspect.agreement(model, x), model.couplings(x) * 10)
    for name in "cnn_baseline_tiny", "cnn_baseline":
        with pytest.raises(InspectionError, match="has no couplings to look at: give a model with capsule layers"):
            inspect.agreement(capszoo.create_model(name, img_size=20), x)


def test_receptive_fields():
    """Two convolutions of 9, of which the second has stride 2: 17 pixels, 2 apart."""
    fields = inspect.receptive_fields(make(img_size=(20, 24)))
    assert fields.shape == (2, 4, 4)
    assert fields[1, 3].tolist() == [2, 6, 19, 23]
    assert fields[0, 0].tolist() == [0, 0, 17, 17]
    assert inspect.receptive_fields(make("efficient_capsnet")).tolist() == [[[0, 0, 19, 19]]]


def test_part_maps():
    model, x = make(img_size=28), images(size=28)
    maps = inspect.part_maps(model, x)
    assert maps.shape == (3, 10, 28, 28)
    torch.testing.assert_close(maps[:, :, 14, 14].sum(dim=1), torch.ones(3))  # a mean of shares of the classes
    assert (maps >= 0).all() and (maps <= 1 + 1e-6).all()
    first = inspect.part_maps(model, x, iteration=0)
    assert first[:, :, 14, 14].sub(0.1).abs().max() < 1e-6


def test_a_part_votes_where_it_is():
    """Capsules of the left half that vote for class 3 are seen at the left."""
    model, x = make(img_size=28), images(1, 28)

    def couplings_of(features):
        shares = torch.full((1, 1, model.num_types, 6, 6, 10), 0.1)
        shares[..., :3, 3] = 0.9
        return shares.flatten(2, 4)

    model.couplings_of = couplings_of
    maps = inspect.part_maps(model, x)
    assert maps[0, 3, 14, 3] > 0.85 and maps[0, 3, 14, 25] < 0.15


def test_couplings_of_places():
    """Means over the types at a place, which count by their lengths."""
    model, x = make(img_size=28), images(size=28)
    shares, presence = inspect.place_couplings(model, x)
    types = model.num_types
    assert shares.shape == (3, 3, 36, 10) and presence.shape == (3, 36)
    lengths = model.to_capsules(model.forward_features(x)).norm(dim=2).unflatten(1, (types, 36))
    torch.testing.assert_close(presence, lengths.mean(dim=1).detach())
    couplings = model.couplings(x, iteration=None).unflatten(2, (types, 36))
    expected = (couplings * lengths.unsqueeze(-1)).sum(dim=2) / lengths.sum(dim=1).unsqueeze(-1)
    torch.testing.assert_close(shares, expected.detach())
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(3, 3, 36))
    with capszoo.set_fused_routing(False):  # what exporters trace
        torch.testing.assert_close(inspect.place_couplings(model, x)[0], shares, rtol=1e-4, atol=1e-6)


def test_centers_of_places():
    """Receptive fields of 17 pixels, 2 apart."""
    centers = inspect.place_centers(make(img_size=(20, 24)))
    expected = torch.cartesian_prod(torch.tensor([8.5, 10.5]), torch.tensor([8.5, 10.5, 12.5, 14.5]))
    torch.testing.assert_close(centers, expected)
    pruned = make(img_size=28, keep_capsules=[0, 5, 40])
    kept = [0, 4, 5]  # the places of the capsules that are left; the others look nowhere
    off = inspect.place_centers(pruned) - inspect.place_centers(make(img_size=28))
    assert off[kept].abs().max() < 2
    assert inspect.part_maps(pruned, images(size=28)).shape == (3, 10, 28, 28)
    shares, presence = inspect.place_couplings(pruned, images(size=28))
    assert shares.shape == (3, 3, 36, 10) and (presence > 0).any(dim=0).nonzero().flatten().tolist() == kept
    with pytest.raises(InspectionError):
        inspect.place_centers(capszoo.create_model("cnn_baseline_tiny", img_size=20))


@pytest.mark.parametrize("name", ["capsnet_em_mini", "capsnet_vb_mini"])
def test_places_of_networks_whose_parts_compete(name):
    """Each part depends on the whole image, by its competitors: derivatives tell where it looks most."""
    torch.manual_seed(0)
    model = capszoo.create_model(name, img_size=28).eval()
    centers = inspect.place_centers(model).unflatten(0, (3, 3))
    assert (centers[1:, :, 0] - centers[:-1, :, 0]).min() > 1 and (centers[:, 1:, 1] - centers[:, :-1, 1]).min() > 1
    maps = inspect.part_maps(model, images(2, 28))
    assert (maps.amax(dim=(2, 3)) > 1.01 * maps.amin(dim=(2, 3))).any()


def test_attribution_adds_up():
    model, x = make(), images()
    found = inspect.attribution(model, x, steps=64)
    target = model(x).argmax(dim=1)
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(found.sum(dim=(1, 2, 3)), difference, rtol=0.02, atol=1e-3)


def test_dead_capsules():
    model, x = make(), images()
    with torch.no_grad():
        model.primary_caps.conv.weight[8:16] = 0  # the second type
        model.primary_caps.conv.bias[8:16] = 0
    dead = inspect.dead_capsules(model, [x, (x, torch.zeros(3))], threshold=1e-4)
    assert dead.tolist() == [place // 4 == 1 for place in range(32)]
    with pytest.raises(InspectionError, match="^there are no images"):
        inspect.dead_capsules(model, [])


def test_capsules_of_zeros_that_stand_for_pruned_ones_do_not_count():
    model, x = make(share_weights=True, num_types=2, keep_capsules=[0, 1, 2, 5]), images()
    assert len(model.capsule_index) > 4, "types have equally many, for their shared matrix"
    assert inspect.dead_capsules(model, [x]).shape == (4,) and inspect.agreement(model, x).shape == (3, 4, 10)
    live = model.couplings(x, iteration=None)[:, :, model.capsule_index < model.num_primary]
    entropy = -torch.special.xlogy(live, live).sum(dim=-1).mean(dim=(1, 2)) / math.log(10)
    torch.testing.assert_close(inspect.coupling_entropy(model, x), entropy)


def test_the_model_is_left_as_it_was():
    model = make().train()
    model.decoder.eval()
    model.conv1.weight.requires_grad_(False)
    before = [module.training for module in model.modules()]
    for look in inspect.perturb, inspect.part_maps, inspect.attribution, inspect.coupling_entropy:
        look(model, images())
    assert [module.training for module in model.modules()] == before
    assert not model.conv1.weight.requires_grad and model.class_caps.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not math.isnan(inspect.coupling_entropy(model, images()).sum())
