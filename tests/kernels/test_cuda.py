"""The operators on a CUDA GPU: numbers against float64, memory, graphs, compilation, precision, determinism."""

import gc

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import capszoo
from capszoo.benchmark.variants import plain_dynamic_routing
from capszoo.kernels import dispatch, dynamic_routing, reference, squash

try:
    from capszoo.kernels import all_classes, per_class, tuning
except ImportError:
    pass  # no Triton, and no GPU test then

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Ratios of norms, for the output and for the gradients.
EXACT, TF32, HALF = (1e-5, 1e-4), (3e-3, 1e-2), (1e-2, 2e-2)


def make_inputs(B, T, P, K, J, D, dtype=torch.float32, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T * P, K), (T, K, J, D), (J, D), (B, J, D)
    return [(scale * torch.randn(shape, generator=generator)).to("cuda", dtype) for shape in shapes]


def with_gradients(function, x, weight, bias, grad, **options):
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    v = function(*inputs, **options)
    return v.detach(), *torch.autograd.grad(v, inputs, grad.to(v.dtype))


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def check(inputs, bounds, **options):
    results = with_gradients(dynamic_routing, *inputs, **options)
    # In float64 the operator is the PyTorch algorithm, which tests on a CPU compare with the reference.
    expected = with_gradients(dynamic_routing, *(t.double() for t in inputs), **options)
    for name, actual, wanted in zip(("v", "dx", "dweight", "dbias"), results, expected, strict=True):
        assert actual.isfinite().all() and actual.shape == wanted.shape, name
        assert error(actual, wanted) <= bounds[name != "v"], (name, error(actual, wanted))
    return results


def test_triton_is_used():
    assert dispatch.triton_problem(torch.device("cuda", torch.cuda.current_device())) is None


# Every pair of K and D is a compilation of all kernels, so they are few, and each dtype is a test of its own.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (70, 70, 9)), st.sampled_from([3, 8]), st.integers(1, 40),
                    st.sampled_from([5, 16])),
    num_iters=st.integers(1, 4),
    approximate=st.booleans(),
)  # fmt: skip
@example(sizes=(1, 1, 1, 1, 1, 1), num_iters=1, approximate=False)
@example(sizes=(2, 3, 2, 300, 2, 5), num_iters=2, approximate=False)
def test_any_shape(sizes, num_iters, approximate, dtype, form):
    # Logits stay small, so that a rounded input does not choose another class.
    scale = 0.5 if sizes[1] * sizes[2] * sizes[3] < 200 else 0.1
    bounds = EXACT if dtype == torch.float32 else HALF
    check(make_inputs(*sizes, dtype, scale=scale), bounds, num_iters=num_iters, approximate_squash=approximate)


@pytest.mark.parametrize("B", [1, 128])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("T, P", [(1152, 1), (32, 36)])
@pytest.mark.parametrize("index", range(4))
def test_all_tile_sizes_at_the_shapes_of_the_zoo(monkeypatch, index, T, P, precision, B, form):
    """Beside the numbers, this fills Triton's cache: what is tuned after these tests is compiled already."""
    for kernel in vars(all_classes if form == "all_classes" else per_class).values():
        if hasattr(kernel, "configs"):
            monkeypatch.setattr(kernel, "configs", [kernel.configs[index % len(kernel.configs)]])
    bounds = {"float32": EXACT, "tf32": TF32, "bfloat16": HALF}[precision]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "tf32"):
        check(make_inputs(B, T, P, 8, 10, 16, dtype, scale=0.1), bounds)


def test_empty_batch_zero_vectors_and_strides(form):
    x, weight, bias, grad = make_inputs(0, 4, 2, 3, 5, 6)
    results = with_gradients(dynamic_routing, x, weight, bias, grad)
    assert results[0].shape == (0, 5, 6) and not results[2].any() and not results[3].any()
    x, weight, bias, grad = make_inputs(3, 4, 2, 5, 3, 6)
    x[:, 1:3] = 0
    first = check([x, weight, bias, grad], EXACT)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, weight, bias, grad)]
    assert all(torch.equal(*pair) for pair in zip(first, check(strided, EXACT), strict=True))


def test_many_classes_and_capsules():
    check(make_inputs(2, 32, 1024, 8, 1000, 16, scale=0.05), EXACT, num_iters=2)


def test_same_bits_from_run_to_run(form):
    inputs = make_inputs(128, 1152, 1, 8, 10, 16, scale=0.1)
    first = with_gradients(dynamic_routing, *inputs)
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(first, with_gradients(dynamic_routing, *inputs), strict=True))


def test_autocast_allows_tf32_and_no_less(form):
    inputs = make_inputs(16, 256, 1, 8, 10, 16, scale=0.1)
    exact = with_gradients(dynamic_routing, *inputs)
    with torch.autocast("cuda", torch.bfloat16):
        results = check(inputs, TF32)
    assert results[0].dtype == torch.float32
    if torch.cuda.get_device_capability() >= (8, 0) and not torch.version.hip:
        assert not torch.equal(results[0], exact[0]) and not torch.equal(results[1], exact[1])


def peak(function, inputs):
    """Most bytes allocated at once by a forward and backward pass, beside what was there before."""
    with_gradients(function, *inputs)  # compiles and tunes
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with_gradients(function, *inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("T, P", [(1152, 1), (32, 36)])
def test_peak_memory(T, P):
    inputs = make_inputs(128, T, P, 8, 10, 16, scale=0.1)
    ours, plain = peak(dynamic_routing, inputs), peak(plain_dynamic_routing, inputs)
    print(f"fused {ours / 2**20:.1f} MiB, plain {plain / 2**20:.1f} MiB, {plain / ours:.0f} times")
    assert ours * 20 <= plain


def test_a_size_that_the_plain_form_cannot_hold():
    inputs = make_inputs(128, 4608, 1, 8, 100, 16, scale=0.05)
    assert peak(dynamic_routing, inputs) <= 4 * 2**30
    check(inputs, EXACT)


def test_cuda_graph(form):
    x, weight, bias, grad = make_inputs(16, 96, 1, 8, 10, 16, scale=0.1)
    inputs = x, weight, bias, grad
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            with_gradients(dynamic_routing, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(dynamic_routing, *inputs)
    x.copy_(torch.randn_like(x) / 4)
    graph.replay()
    expected = with_gradients(dynamic_routing, *inputs)
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


def test_shape_that_is_first_tuned_in_a_capture(monkeypatch, form):
    inputs = make_inputs(5, 7, 3, 8, 10, 16, scale=0.1)
    expected = with_gradients(dynamic_routing, *inputs)  # compiles the first tiles
    monkeypatch.setattr(tuning, "MAX_TILES", None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(dynamic_routing, *inputs)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


@pytest.mark.parametrize("name", ["capsnet_tiny", "capsnet_pruned"])
def test_compiled_model(name):
    torch.manual_seed(0)
    model = capszoo.create_model(name, device="cuda")
    images = torch.rand(4, 1, 28, 28, device="cuda")
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-4)
    compiled(images).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images).square().sum().backward()
    for actual, p in zip(grads, model.parameters(), strict=True):
        assert error(actual, p.grad.double()) <= 1e-2


def test_the_reference_where_triton_cannot_run(monkeypatch):
    inputs = make_inputs(4, 8, 2, 8, 10, 16)
    expected = with_gradients(reference.dynamic_routing, *inputs)
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: "A test says so")
    dispatch._warn.cache_clear()
    with pytest.warns(UserWarning, match="A test says so"):
        results = with_gradients(dynamic_routing, *inputs)
    assert all(error(a, e.double()) <= 1e-4 for a, e in zip(results, expected, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5000),
    width=st.integers(1, 256),
    approximate=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_squash(rows, width, approximate, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, grad = torch.randn(2, rows, width, generator=generator).to("cuda", dtype)
    x[rows // 2] = 0
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    v, expected = squash(x, approximate), reference.squash(exact, approximate)
    assert error(v.detach(), expected.detach()) <= bound
    (dx,), (wanted,) = torch.autograd.grad(v, x, grad), torch.autograd.grad(expected, exact, grad.double())
    assert dx.dtype == dtype and error(dx, wanted) <= bound
