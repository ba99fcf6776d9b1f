"""Peak memory of the routing's forward and backward pass at the standard sizes, counted allocation by allocation."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capszoo.benchmark.variants import plain_dynamic_routing
from capszoo.kernels import cpu, dispatch, inverted_attention, ops, reference

# B, T, P, K, J, D of the standard network, with a matrix for each capsule and with one for each type.
SIZES = [(128, 1152, 1, 8, 10, 16), (128, 32, 36, 8, 10, 16)]


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, saved ones included, at the moment of most."""

    def __init__(self):
        super().__init__()
        self.living, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.living = {key: pair for key, pair in self.living.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return results


def make_inputs(B, T, P, K, J, D, device):
    return [torch.zeros(shape, device=device) for shape in ((B, T * P, K), (T, K, J, D), (J, D), (B, J, D))]


def stored_form(route, sizes):
    """Peak of a form that autograd differentiates; on the meta device, which allocates nothing."""
    x, weight, bias, grad = make_inputs(*sizes, "meta")
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    with Allocations() as allocations:
        torch.autograd.grad(route(*inputs), inputs, grad)
    return allocations.peak


def recomputing_form(module, sizes, device):
    x, weight, bias, grad = make_inputs(*sizes, device)
    with Allocations() as allocations:
        _, sums = module.dynamic_routing(x, weight, bias, 3, False)
        gradients = module.dynamic_routing_backward(grad, x, weight, sums, False)
    del gradients
    return allocations.peak


def test_the_count_itself():
    with Allocations() as allocations:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
    assert allocations.peak == 8000 and c.shape == (10, 100)


@pytest.mark.parametrize("sizes", SIZES, ids=["own", "shared"])
def test_triton_allocates_a_twentieth_of_the_plain_form(sizes, form):
    from capszoo.kernels import counts

    with counts.nothing_launched():
        ours = recomputing_form(dispatch.triton_routing, sizes, "meta")
    plain = stored_form(plain_dynamic_routing, sizes)
    print(f"Triton {ours / 2**20:.1f} MiB, plain {plain / 2**20:.1f} MiB, {plain / ours:.0f} times")
    assert ours * 20 <= plain
    # Also of the reference, which stores votes but not the product of all poses and matrices. The faster form keeps
    # couplings and their gradients during the backward pass.
    assert ours * (8 if form == "all_classes" else 10) <= stored_form(reference.dynamic_routing, sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=["own", "shared"])
def test_cpu_allocates_a_twentieth_of_the_plain_form(sizes):
    ours, plain = recomputing_form(cpu, sizes, "cpu"), stored_form(plain_dynamic_routing, sizes)
    print(f"CPU {ours / 2**20:.1f} MiB, plain {plain / 2**20:.1f} MiB, {plain / ours:.0f} times")
    assert ours * 20 <= plain


@pytest.mark.parametrize("device", ["cpu", "triton"])
def test_self_attention_allocates_a_fraction_of_the_plain_form(device, form):
    from capszoo.kernels import counts
    from capszoo.kernels.self_attention import cpu, ops, reference

    if device == "cpu" and form == "per_class":
        pytest.skip("the forms are Triton's")
    sizes = (128, 1152, 8), (1152, 8, 10, 16), (1152, 10), (128, 10, 16)
    module, place = (cpu, "cpu") if device == "cpu" else (ops.launchers, "meta")
    x, weight, prior, grad = (torch.zeros(shape, device=place) for shape in sizes)
    with counts.nothing_launched(), Allocations() as ours:
        s, total = module.forward(x, weight, prior, True)
        gradients = module.backward(grad, x, weight, prior, total, True)
    del s, gradients
    inputs = [torch.zeros(shape, device="meta", requires_grad=True) for shape in sizes[:3]]
    with Allocations() as plain:
        torch.autograd.grad(reference.self_attention_routing(*inputs), inputs, torch.zeros(sizes[3], device="meta"))
    print(f"{device} {ours.peak / 2**20:.1f} MiB, plain {plain.peak / 2**20:.1f} MiB")
    assert ours.peak * 7 <= plain.peak


@pytest.mark.parametrize("approximate", [False, True])
def test_training_saves_nothing_for_higher_derivatives(approximate):
    """A forward pass keeps its inputs and the sums of votes, a backward pass nothing."""
    x, weight, bias, _ = (t.normal_().requires_grad_() for t in make_inputs(2, 3, 2, 4, 5, 7, "cpu"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        v = ops.squash(x, approximate)
        assert saved == [(2, 6, 4)]
        v = ops.dynamic_routing(v, weight, bias, 3, approximate)
        assert saved == [(2, 6, 4), (2, 6, 4), (3, 4, 5, 7), (5, 7), (3, 2, 5, 7)]
        gradients = torch.autograd.grad(v, [x, weight, bias], torch.ones_like(v))
        assert len(saved) == 5 and not any(gradient.requires_grad for gradient in gradients)


def test_inverted_attention_takes_a_tenth_of_the_stored_votes():
    """Forward and backward pass of the first layer of `capsnet_resnet_ia`, and of its class capsules."""
    for B, T, H, k, J, stride in [(4, 32, 16, 3, 32, 2), (16, 800, 1, 1, 10, 1)]:
        places = (H - k) // stride + 1
        parents = B, J, 4, 4, places, places
        shapes = (B, T, 4, 4, H, H), (k, k, T, 4, 4, J), parents, parents

        def peak(route, device, shapes=shapes, stride=stride):
            *inputs, grad = (torch.zeros(shape, device=device) for shape in shapes)
            inputs = [t.requires_grad_() for t in inputs]
            with Allocations() as allocations:
                torch.autograd.grad(route(*inputs, stride), inputs, grad)
            return allocations.peak

        plain = peak(inverted_attention.reference.inverted_attention_routing, "meta")
        assert plain > 4 * B * places**2 * k * k * T * J * 16
        assert peak(inverted_attention.inverted_attention_routing, "cpu") < plain / 10
