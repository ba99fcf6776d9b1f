"""Inverted attention, EM and VB routing on a CUDA GPU: numbers against float64, repeated bits, graphs."""

import copy

import pytest
import torch
from families import sizes_of

import capszoo
from capszoo.engine import CapsuleTask
from capszoo.kernels import em_routing, inverted_attention_routing, vb_routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Ratios of norms, for the output and for the gradients.
EXACT, HALF = (1e-5, 1e-4), (1e-2, 2e-2)
# Samples, types, pose, map, kernel, parents, stride: the least, odd ones, a class layer and a convolutional one.
ATTENTION = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (3, 5, 3, 7, 6, 3, 7, 2),
    (128, 32, 4, 1, 1, 1, 10, 1),
    (16, 32, 4, 8, 8, 3, 32, 2),
]
# Samples, types, map, pose, parents, kernel, stride.
GAUSSIAN = [
    ((1, 1, 1, 1, 1, 1), (1, 1), 1),
    ((3, 2, 5, 7, 3, 5), (2, 3), 2),
    ((16, 8, 12, 12, 4, 16), (3, 3), 2),
    ((32, 16, 4, 4, 4, 10), (4, 4), 1),
]


def error(actual, expected):
    difference = (actual.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if expected.norm() > 1e-6 else difference


def with_gradients(function, tensors):
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, tensors, factors, allow_unused=True, materialize_grads=True)
    return [*(o.detach() for o in outputs), *grads]


def check(function, tensors, bounds, num_outputs):
    """Compare with the same operator in float64, which is PyTorch's algorithm and which tests on a CPU hold right."""
    found = with_gradients(function, tensors)
    wanted = with_gradients(function, [t.double() for t in tensors])
    for place, (actual, right) in enumerate(zip(found, wanted, strict=True)):
        assert actual.isfinite().all() and actual.shape == right.shape, place
        assert error(actual, right) <= bounds[place >= num_outputs], (place, error(actual, right))
    return found


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def attention(sizes, dtype=torch.float32):
    B, T, P, H, W, k, J, stride = sizes
    parents = B, J, P, P, (H - k) // stride + 1, (W - k) // stride + 1
    tensors = draw((B, T, P, P, H, W), (k, k, T, P, P, J), parents)
    return (lambda *t: inverted_attention_routing(*t, stride)), [t.to("cuda", dtype) for t in tensors]


def gaussian(method, sizes, kernel, stride):
    B, num_types, h, w, P, J = sizes
    poses, weight, beta_u, beta_a, place, logits = draw(
        (B, num_types, P, P, h, w), (num_types, *kernel, J, P, P), (J,), (J,), (*kernel, P, P), (B, num_types, h, w)
    )
    function = {"em": em_routing, "vb": vb_routing}[method]
    tensors = [t.to("cuda") for t in (poses, logits.sigmoid(), weight, beta_u, beta_a, place)]
    return (lambda *t: function(*t, stride, 3)), tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", ATTENTION)
def test_inverted_attention(sizes, dtype):
    check(*attention(sizes, dtype), EXACT if dtype == torch.float32 else HALF, 1)


@pytest.mark.parametrize("method", ["em", "vb"])
@pytest.mark.parametrize("case", GAUSSIAN)
def test_gaussian(case, method):
    check(*gaussian(method, *case), (1e-4, 1e-3), 2)


@pytest.mark.parametrize("make", [lambda: attention(ATTENTION[1]), lambda: gaussian("em", *GAUSSIAN[1])])
def test_repeated_bits_and_cuda_graph(make):
    function, tensors = make()
    expected = with_gradients(function, tensors)
    assert all(map(torch.equal, expected, with_gradients(function, tensors)))
    leaves = [t.detach().requires_grad_() for t in tensors]

    def step():
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves, allow_unused=True)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].mul_(0.5)
    graph.replay()
    for some, right in zip(captured, step(), strict=True):
        assert (some is None and right is None) or torch.equal(some, right)


@pytest.mark.parametrize(
    "name",
    ["capsnet_conv_ia", "capsnet_resnet_sr", "capsnet_em_mini", "capsnet_vb_mini", "efficient_capsnet", "deepcaps"],
)
def test_a_training_step_as_on_the_cpu(name, monkeypatch):
    """Loss and gradients of each family; the CPU's in float64."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = capszoo.create_model(name, **{**sizes_of(name), "in_chans": 1, "img_size": 28, "num_classes": 5})
    exact = copy.deepcopy(model).double()
    x, target = torch.rand(8, 1, 28, 28), torch.arange(8) % 5
    loss = CapsuleTask(model.to("cuda"), verbose=False)(x.cuda(), target.cuda())["loss"]
    wanted = CapsuleTask(exact, verbose=False)(x.double(), target)["loss"]
    loss.backward()
    wanted.backward()
    assert error(loss.detach().cpu(), wanted.detach()) < 1e-4
    assert len(list(model.parameters())) == len(list(exact.parameters()))
    for (path, actual), right in zip(model.named_parameters(), exact.parameters(), strict=True):
        if right.grad is None:
            assert actual.grad is None, path
        elif right.grad.norm() > 1e-6:  # of a bias before a BatchNorm it is rounding
            assert error(actual.grad.cpu(), right.grad) < 5e-3, path
