"""EM and variational-Bayes routing against the reference in float64, and what holds of any routing."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capszoo.kernels import em_routing, vb_routing
from capszoo.kernels.gaussian_routing import cpu, reference

FUNCTIONS = {"em": (em_routing, reference.em_routing), "vb": (vb_routing, reference.vb_routing)}
both = pytest.mark.parametrize("method", list(FUNCTIONS))


def make_inputs(B=2, I=2, h=4, w=5, P=2, J=3, kernel=(2, 3), seed=0, dtype=torch.float64, offset=True):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, I, P, P, h, w), (I, *kernel, J, P, P), (J,), (J,)
    poses, weight, beta_u, beta_a = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    activations = torch.rand(B, I, h, w, generator=generator, dtype=torch.float64)
    place = torch.randn(*kernel, P, P, generator=generator, dtype=torch.float64).to(dtype) if offset else None
    return [t.to(dtype) for t in (poses, activations, weight, beta_u, beta_a)], place


def error(actual, expected):
    difference = (actual.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if expected.any() else difference


def results(function, tensors, place, stride, num_iters):
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*tensors, place, stride, num_iters)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    used = tensors if num_iters else tensors[:3]
    grads = torch.autograd.grad(outputs, used, factors, allow_unused=True, materialize_grads=True)
    return outputs, grads


@both
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 3, 6, 6, 4, 5))),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    num_iters=st.integers(1, 3),
    tile=st.sampled_from((1, 2**21)),
    seed=st.integers(0, 99),
)
@example((2, 2, 7, 7, 4, 3), (3, 3), 2, 3, 1, 0)
@example((2, 2, 3, 3, 4, 3), (3, 3), 1, 3, 2**21, 0)
def test_numbers(method, sizes, kernel, stride, num_iters, tile, seed):
    kernel = (min(kernel[0], sizes[2]), min(kernel[1], sizes[3]))
    tensors, place = make_inputs(*sizes, kernel, seed)
    function, expected = FUNCTIONS[method]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_BYTES", tile)
        outputs, grads = results(function, tensors, place, stride, num_iters)
    wanted, wanted_grads = results(expected, tensors, place, stride, num_iters)
    for actual, right in zip((*outputs, *grads), (*wanted, *wanted_grads), strict=True):
        assert actual.shape == right.shape and error(actual, right) < 1e-10
    assert ((outputs[1] >= 0) & (outputs[1] <= 1)).all() or method == "vb"


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(method, dtype):
    tensors, place = make_inputs(3, 4, 6, 6, 4, 5, (3, 3), dtype=dtype)
    function, expected = FUNCTIONS[method]
    outputs, grads = results(function, tensors, place, 1, 3)
    wanted, wanted_grads = results(expected, [t.double() for t in tensors], place.double(), 1, 3)
    bounds = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 1e-2)
    for outcome, right, bound in ((outputs, wanted, bounds[0]), (grads, wanted_grads, bounds[1])):
        for actual, exact in zip(outcome, right, strict=True):
            assert actual.dtype == dtype and error(actual, exact) < bound


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 2), ((3, 3), 1), ((2, 3), 3), ((7, 6), 1)])
def test_couplings_of_a_child_add_up_to_one(kernel, stride):
    """Over parents and positions; children that no kernel covers have none."""
    H, W = reference.map_size((7, 6), kernel, stride)
    logits = 5 * torch.randn(2, 3 * kernel[0] * kernel[1], 4, H * W, dtype=torch.float64)
    couplings = reference.couplings(logits, (7, 6), kernel, stride).view(2, 3, *kernel, 4, H, W)
    total = torch.zeros(2, 3, 7, 6, dtype=torch.float64)
    covered = torch.zeros(7, 6)
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            place = ..., slice(y, y + stride * (H - 1) + 1, stride), slice(x, x + stride * (W - 1) + 1, stride)
            total[place] += couplings[:, :, y, x].sum(2)
            covered[place] = 1
    torch.testing.assert_close(total, covered.expand_as(total).double())


@both
def test_patches_are_patches(method):
    """Other poses outside of what a parent's kernel covers change nothing but through the competition for children;
    with equal couplings, nothing at all. Positions of children and places of the kernel go together."""
    (poses, activations, *others), _ = make_inputs(h=6, w=7, kernel=(3, 3))
    function = FUNCTIONS[method][0]
    before = function(poses, activations, *others, None, 1, 1)
    elsewhere = poses.clone()
    elsewhere[..., 3:, :] = 9.0
    after = function(elsewhere, activations, *others, None, 1, 1)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[..., 0, :], b[..., 0, :])
        assert (a[..., 1:, :] != b[..., 1:, :]).any()
    flipped = [poses.flip(4, 5), activations.flip(2, 3), others[0].flip(1, 2), *others[1:]]
    for num_iters in (1, 3):
        outputs = function(poses, activations, *others, None, 1, num_iters)
        for a, b in zip(outputs, function(*flipped, None, 1, num_iters), strict=True):
            torch.testing.assert_close(a, b.flip(-2, -1))


def test_equal_couplings_are_plain_moments():
    (poses, activations, weight, beta_u, beta_a), _ = make_inputs(h=2, w=3, kernel=(2, 3))
    means, active = em_routing(poses, activations, weight, beta_u, beta_a, None, 1, 1, final_lambda=0.3)
    votes = torch.einsum("bipkyx,iyxjkq->biyxjpq", poses, weight)
    a = activations[..., None, None, None] / 3
    mass = a.sum(dim=(1, 2, 3))
    mean = (a * votes).sum(dim=(1, 2, 3)) / mass
    torch.testing.assert_close(means[..., 0, 0], mean)
    variance = (a * (votes - mean[:, None, None, None]).square()).sum(dim=(1, 2, 3)) / mass + 5e-4
    cost = ((beta_u[:, None, None] + 0.5 * variance.log()) * mass).sum(dim=(2, 3))
    torch.testing.assert_close(active[..., 0, 0], (0.3 * (1 - 0.95) * (beta_a - cost)).sigmoid())


def test_children_that_agree_win():
    """A parent type for which all votes are alike takes the children from one whose votes are not."""
    (poses, activations, weight, *betas), _ = make_inputs(B=1, I=6, h=1, w=1, P=2, J=2, kernel=(1, 1))
    weight[:, :, :, 0] = torch.linalg.inv(poses[0, :, :, :, 0, 0])[:, None, None]  # each votes for the unit matrix
    for function, rival in ((em_routing, 0.4), (vb_routing, 0.4)):
        means, _ = function(poses, activations + 0.5, weight, *(torch.zeros(2).double() for _ in betas), None, 1, 3)
        shrink = 1 if function is em_routing else means[0, 0, 0, 0].item()
        assert shrink > rival
        torch.testing.assert_close(means[0, 0, :, :, 0, 0], shrink * torch.eye(2).double(), atol=1e-6, rtol=1e-6)


@both
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 4, 1), (1, 3, 5, 5, 4, 1), (0, 2, 3, 3, 4, 2), (2, 2, 3, 3, 1, 4)])
def test_no_nan(method, value, sizes):
    for fused in (0, 1):
        tensors, _ = make_inputs(*sizes, (min(3, sizes[2]),) * 2, dtype=torch.float32, offset=False)
        tensors[0] = torch.full_like(tensors[0], value)
        for activation in (0.0, 1.0):
            tensors[1] = torch.full_like(tensors[1], activation)
            outputs, grads = results(FUNCTIONS[method][fused], tensors, None, 1, 3)
            assert all(t.isfinite().all() for t in (*outputs, *grads))


@both
def test_autocast(method):
    tensors, place = make_inputs(h=6, w=6, P=4, kernel=(3, 3), dtype=torch.float32)
    function = FUNCTIONS[method][0]
    with torch.autocast("cpu", torch.bfloat16):
        outputs, grads = results(function, tensors, place, 1, 2)
    expected, expected_grads = results(function, tensors, place, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip((*outputs, *grads), (*expected, *expected_grads), strict=True))


@both
def test_derivatives(method):
    function = FUNCTIONS[method][0]
    (poses, *others), place = make_inputs(1, 1, 2, 1, 2, 2, (1, 1))
    tensors = [t.requires_grad_() for t in (poses, *others)]
    assert torch.autograd.gradcheck(lambda *t: function(*t, place, 1, 3), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: function(*t, place, 1, 2), tensors, fast_mode=True)
    exact = FUNCTIONS[method][1]

    def energy(function):
        return lambda p: function(p, *others, place, 1, 2)[0].square().sum()

    torch.testing.assert_close(torch.func.grad(energy(function))(poses), torch.func.grad(energy(exact))(poses))
    batch = torch.stack([poses, 2 * poses])
    torch.testing.assert_close(torch.func.vmap(energy(function))(batch), torch.stack([*map(energy(exact), batch)]))
    tangents = [torch.func.jvp(energy(f), (poses,), (poses,))[1] for f in (function, exact)]
    torch.testing.assert_close(*tangents)
    with forward_ad.dual_level():
        dual = energy(function)(forward_ad.make_dual(poses.detach(), poses.detach()))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangents[1])


def test_operator():
    (poses, activations, weight, *_), place = make_inputs(1, 1, 2, 3, 2, 2, (2, 2))
    children = [poses.permute(1, 2, 3, 0, 4, 5).contiguous(), activations.transpose(0, 1).contiguous(), weight]
    parents = [torch.randn(2, 2, 2, 1, 1, 2).double() for _ in range(2)] + [torch.randn(2, 1, 1, 2).double()]
    for priors in ((None,) * 3, (parents[0], parents[1].square(), parents[2])):
        given = [t.requires_grad_() for t in children]
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # compilation is tested below
        arguments = (*given, place, *priors, 1)
        torch.library.opcheck(torch.ops.capszoo.mixture_moments, arguments, test_utils=checks)


@both
def test_compiled_and_exported(method):
    tensors, _ = make_inputs(dtype=torch.float32)

    class Routing(torch.nn.Module):
        def forward(self, *tensors):
            return FUNCTIONS[method][0](*tensors, None, 1, 2)

    expected = Routing()(*tensors)
    compiled = torch.compile(Routing(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Routing(), tuple(tensors)).module()
    for function in (compiled, exported):
        for a, b in zip(function(*tensors), expected, strict=True):
            torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor which an operator returned has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(t.numel() for t in tree_leaves(results) if isinstance(t, torch.Tensor)), 0)
        return results


def test_votes_are_not_stored(monkeypatch):
    monkeypatch.setattr(cpu, "TILE_BYTES", 2**14)
    (poses, activations, weight, *_), _ = make_inputs(8, 8, 7, 7, 4, 8, (3, 3), dtype=torch.float32)
    children = [poses.permute(1, 2, 3, 0, 4, 5), activations.transpose(0, 1), weight]
    priors = [torch.rand(8, 4, 4, 8, 5, 5) for _ in range(2)] + [torch.rand(8, 8, 5, 5)]
    votes = 8 * 25 * 8 * 9 * 8 * 16
    with Largest() as largest:
        mass, average, scatter = cpu.moments(*children, None, *priors, 1)
        cpu.moments_backward(mass, average, scatter, *children, None, *priors, mass, average, 1)
    # One sample and one child type at a time, four buffers of them at most.
    assert largest.numbers <= max(4 * votes // 64, average.numel(), poses.numel())


ERRORS = {
    r"poses have shape \[2, 2, 2, 2, 4\]: give \[B, I, P, P, h, w\]": dict(poses=(2, 2, 2, 2, 4)),
    r"activations have shape \[2, 2, 4\], poses need": dict(activations=(2, 2, 4)),
    r"weight has shape .* with I=2, P=2": dict(weight=(3, 2, 3, 3, 2, 2)),
    r"beta_a has shape \[2\], weight needs \[J\] = \[3\]": dict(beta_a=(2,)),
    r"offset has shape \[2, 2\], weight needs": dict(offset=(2, 2)),
    r"a map of 4x5 is too small for a kernel of 5x3": dict(weight=(2, 5, 3, 3, 2, 2), offset=(5, 3, 2, 2)),
}


@both
def test_errors(method):
    names = ("poses", "activations", "weight", "beta_u", "beta_a")
    tensors, place = make_inputs()
    given = {**dict(zip(names, tensors, strict=True)), "offset": place}
    function = FUNCTIONS[method][0]
    for message, shapes in ERRORS.items():
        with pytest.raises(ValueError, match=message):
            function(**{**given, **{name: torch.zeros(shape).double() for name, shape in shapes.items()}})
    for message, kwargs in {"stride=0 is": dict(stride=0), "at least 1 iteration": dict(num_iters=0)}.items():
        with pytest.raises(ValueError, match=message):
            function(**given, **kwargs)
    with pytest.raises(ValueError, match="floating-point tensors, but activations is torch.int64"):
        function(**{**given, "activations": given["activations"].long()})
