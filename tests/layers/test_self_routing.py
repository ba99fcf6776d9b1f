"""Self-routing layers against loops over capsules and parents in float64; patches, limits, memory."""

import math

import pytest
import torch
from families import sizes_of

import capszoo
from capszoo import set_fused_routing
from capszoo.layers import ConvSelfRouting, PoseCaps, SelfRouting, drop_capsules, join_capsules, split_capsules


def fill(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


def capsules(batch=2, types=3, dim=4, grid=(4, 5), **kwargs):
    generator = torch.Generator().manual_seed(1)
    poses = torch.randn(batch, *grid, types, dim, generator=generator, dtype=torch.float64)
    activations = torch.rand(batch, *grid, types, generator=generator, dtype=torch.float64)
    return join_capsules(poses, activations.log())


def by_loops(x, layer):
    """Equations 4 to 6 of Hahn, Pyeon and Kim 2019, one parent position, parent and capsule at a time."""
    k, stride, parents = layer.kernel_size, layer.stride, layer.num_parents
    poses, log_activations = split_capsules(x, layer.num_types)
    activations = log_activations.exp()
    batch, height, width = activations.shape[:3]
    out_height, out_width = -(-height // stride), -(-width // stride)
    scores = torch.zeros(batch, parents, out_height, out_width, dtype=x.dtype)
    sums = torch.zeros(batch, parents, layer.parent_dim, out_height, out_width, dtype=x.dtype)
    for b in range(batch):
        for h in range(out_height):
            for w in range(out_width):
                below, terms = 0.0, [[] for _ in range(parents)]
                for p in range(k):
                    for q in range(k):
                        row, column = h * stride + p - k // 2, w * stride + q - k // 2
                        if not (0 <= row < height and 0 <= column < width):
                            continue
                        for t in range(layer.num_types):
                            i, pose = (p * k + q) * layer.num_types + t, poses[b, row, column, t]
                            share = torch.ones(parents, dtype=x.dtype) / parents
                            if layer.weight is not None:
                                share = (layer.weight[i] @ pose + layer.bias[i]).softmax(0)
                            below = below + activations[b, row, column, t]
                            for j in range(parents):
                                routed = activations[b, row, column, t] * share[j]
                                terms[j].append((routed, layer.vote_weight[i, j] @ pose))
                for j in range(parents):
                    total = sum(routed for routed, _ in terms[j])
                    scores[b, j, h, w] = total / below
                    sums[b, j, :, h, w] = sum(routed * vote for routed, vote in terms[j]) / total
    return torch.cat([scores.log(), layer.norm(sums.flatten(1, 2))], dim=1)


@pytest.mark.parametrize("couplings", ["self", "uniform"])
@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (3, 1), (3, 2)])
@torch.no_grad()
def test_convolutional_layer_as_in_the_paper(couplings, kernel_size, stride):
    layer = fill(ConvSelfRouting(3, 4, 2, 5, kernel_size, stride, couplings, dtype=torch.float64)).eval()
    x = capsules()
    torch.testing.assert_close(layer(x), by_loops(x, layer), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_class_layer_as_in_the_paper():
    layer, x = fill(SelfRouting(3, 4, 6, (4, 5), dtype=torch.float64)), capsules()
    poses, log_activations = (
        part.flatten(1, 3) for part in (*split_capsules(x, 3)[:1], split_capsules(x, 3)[1][..., None])
    )
    shares = (torch.einsum("bik,ijk->bij", poses, layer.weight) + layer.bias).softmax(dim=2)
    activations = log_activations.exp()
    expected = (activations * shares).sum(dim=1) / activations.sum(dim=1)
    torch.testing.assert_close(layer(x).exp(), expected, rtol=1e-12, atol=1e-12)
    uniform = SelfRouting(3, 4, 6, (4, 5), "uniform", dtype=torch.float64)
    uniform.load_state_dict(layer.state_dict())
    logits = torch.einsum("bik,ijk->bij", poses, layer.weight) + layer.bias
    mean = (activations * logits).sum(dim=1) / activations.sum(dim=1)
    torch.testing.assert_close(uniform(x), mean.log_softmax(dim=1), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_patches_are_patches():
    """A kernel of one position commutes with any order of positions; one changed position reaches its parents alone."""
    layer, x = fill(ConvSelfRouting(3, 4, 2, 5, 1, dtype=torch.float64)).eval(), capsules()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))

    def permuted(t):
        return t.flatten(2)[..., order].unflatten(2, (4, 5))

    torch.testing.assert_close(layer(permuted(x)), permuted(layer(x)))
    layer = fill(ConvSelfRouting(3, 4, 2, 5, 3, dtype=torch.float64)).eval()
    changed = x.clone()
    changed[:, :, 0, 0] -= 0.5
    differs = (layer(changed) - layer(x)).abs().amax(dim=(0, 1)) > 1e-9
    assert differs.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("couplings", ["self", "uniform"])
def test_derivatives(couplings):
    conv = fill(ConvSelfRouting(1, 2, 2, 2, 3, 2, couplings, dtype=torch.float64)).eval()
    head = fill(SelfRouting(2, 2, 2, (1, 2), couplings, dtype=torch.float64))
    x = capsules(2, 1, 2, (2, 3)).detach().requires_grad_()
    inputs = [x, *conv.parameters(), *head.parameters()]

    def scores(*_):
        return head(conv(x))

    assert torch.autograd.gradcheck(scores, inputs)
    assert torch.autograd.gradgradcheck(scores, inputs, fast_mode=True)
    found = torch.autograd.grad(scores().sin().sum(), inputs)
    with set_fused_routing(False):
        torch.testing.assert_close(found, torch.autograd.grad(scores().sin().sum(), inputs))
    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: head(conv(x)).sin().sum(), (x.detach(),), (tangent,))
    torch.testing.assert_close(slope, (found[0] * tangent).sum())
    by_sample = torch.vmap(torch.func.grad(lambda x: head(conv(x[None])).sin().sum()))(x.detach())
    torch.testing.assert_close(by_sample, found[0])


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, -1e4])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 4), (3, 4, 1)], ids=str)
def test_finite_at_the_limits(value, shape):
    types, dim, parents = shape
    primary, conv = (
        fill(PoseCaps(2, types, dim)).eval(),
        fill(ConvSelfRouting(types, dim, parents, dim, stride=2)).eval(),
    )
    head = fill(SelfRouting(parents, dim, 3, (2, 3)))
    for batch in (0, 1, 2):
        x = torch.full((batch, 2, 4, 5), value, requires_grad=True)
        scores = head(conv(primary(x)))
        scores.square().sum().backward()
        assert scores.shape == (batch, 3) and scores.isfinite().all() and x.grad.isfinite().all()
        torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(batch))


def test_scores_of_certain_capsules():
    """Of a capsule that is sure of one class the others keep a finite score, whose gradient leads back."""
    layer = SelfRouting(1, 1, 2, (1, 1))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1e3], [-1e3]]]))
    scores = layer(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(scores, torch.tensor([[0.0, -2e3]]))
    scores[0, 1].backward()
    assert layer.weight.grad.flatten().tolist() == [-1, 1]


def test_autocast_and_half():
    layer, x = fill(SelfRouting(3, 4, 6, (4, 5))), capsules().float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = layer(x)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, layer(x), rtol=0.05, atol=0.05)
    half = fill(ConvSelfRouting(3, 4, 2, 5)).eval()
    torch.testing.assert_close(half.bfloat16()(x.bfloat16()).float(), fill(half.float())(x), rtol=0.2, atol=0.3)


def test_votes_are_not_stored():
    """What autograd keeps for the backward pass is smaller than the votes, in all."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    layer, x = ConvSelfRouting(8, 16, 8, 16), capsules(4, 8, 16, (6, 6)).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    votes = 9 * 8 * 8 * 16 * 4 * 36 * 4
    assert 0 < sum(sizes.values()) < votes


def test_start():
    layer = ConvSelfRouting(32, 16, 32, 16)
    assert not layer.weight.any() and not layer.bias.any()
    assert layer.vote_weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 16)), rel=0.01)


def test_errors():
    for build in lambda: SelfRouting(3, 4, 6, (4, 5), "even"), lambda: ConvSelfRouting(3, 4, 2, 5, couplings="even"):
        with pytest.raises(ValueError, match="^unknown couplings 'even'. Known: self, uniform$"):
            build()
    with pytest.raises(AssertionError, match="class capsules of 3 capsules got 60: make the model for this img_size"):
        SelfRouting(3, 4, 6, (1, 1))(capsules())


def test_capsules_that_are_left_out_have_no_share_in_the_classes():
    torch.manual_seed(0)
    x = join_capsules(torch.randn(400, 1, 1, 6, 4), -torch.rand(400, 1, 1, 6) * 9)
    _, log_activations = split_capsules(drop_capsules(x, 6, 0.5, training=True), 6)
    shares, before = log_activations.flatten(1).softmax(dim=1), split_capsules(x, 6)[1].flatten(1)
    left = log_activations.flatten(1) == before
    assert 0.45 < left.double().mean() < 0.55 and (shares[~left & left.any(dim=1, keepdim=True)] == 0).all()
    assert torch.equal(split_capsules(drop_capsules(x, 6, 0.5, training=True), 6)[0], split_capsules(x, 6)[0])
    assert torch.equal(drop_capsules(x, 6, 0.5, training=False), x)
    every = drop_capsules(x.half(), 6, 1.0, training=True)
    assert torch.equal(split_capsules(every, 6)[1].softmax(dim=-1), torch.full((400, 1, 1, 6), 1 / 6).half())


@pytest.mark.parametrize("name, more", [("capsnet_resnet_sr", {}), ("capsnet_head", {"head": "self_routing"})])
def test_dropout_of_networks_leaves_capsules_out(name, more):
    model = capszoo.create_model(name, **{**sizes_of(name), **more}, img_size=12, in_chans=3, drop_rate=0.5)
    layer = fill(model.get_classifier())
    x = model.eval().forward_features(torch.rand(2, 3, 12, 12))
    torch.manual_seed(5)
    found = model.train().forward_head(x)
    torch.manual_seed(5)
    assert torch.equal(found, layer(drop_capsules(x, layer.num_types, 0.5, training=True)))
    assert not torch.equal(found, model.eval().forward_head(x))
