"""Bounds and races, in Triton's interpreter: no kernel touches memory that is not its own.

A GPU runs the programs of a launch in any order. So no place may be written by two of them, or written by one and read
by another; and a place outside the tensors of the launch may belong to anybody.
"""

import os

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def test_through_the_interpreter(through_the_interpreter):
    """All tests below."""


def interpreted(test):
    asked = pytest.mark.usefixtures("interpreted_loops")(test)
    return pytest.mark.skipif(not INTERPRETING, reason="run by test_through_the_interpreter")(asked)


class Watch:
    """What the launches since it began have touched, by name of the kernel: numbers read and written."""

    def __init__(self):
        self.touched = {}
        self.extents, self.reads, self.writes = [], [], []  # of the launch that runs

    def begin(self, values):
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        self.extents = [(t.data_ptr(), t.data_ptr() + extent(t) * t.element_size()) for t in tensors]
        self.reads, self.writes = [], []

    def touch(self, accesses, program, pointers, mask):
        """Note the places that one program reads or writes; refuse, before it happens, what is outside."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].ravel().astype(np.int64)
        inside = np.zeros(places.shape, bool)
        for begin, end in self.extents:
            inside |= (places >= begin) & (places + size <= end)
        assert inside.all(), f"{(~inside).sum()} places outside the tensors of the launch"
        accesses.append(np.stack([places, np.full_like(places, hash(program))]))

    def end(self, name):
        # Each place that a program reads or writes, once.
        reads, writes = (
            np.unique(np.concatenate([np.empty((2, 0), np.int64), *accesses], axis=1), axis=1)
            for accesses in (self.reads, self.writes)
        )
        places, counts = np.unique(writes[0], return_counts=True)
        assert (counts <= 1).all(), f"{name}: {(counts > 1).sum()} places are written by two programs"
        writer = dict(zip(*writes.tolist(), strict=True))
        shared = [place for place, program in reads.T.tolist() if writer.get(place, program) != program]
        assert not shared, f"{name}: {len(shared)} places are read by one program and written by another"
        before = self.touched.get(name, (0, 0))
        self.touched[name] = before[0] + reads.shape[1], before[1] + writes.shape[1]


def extent(tensor):
    """Numbers from a tensor's first to its last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@pytest.fixture
def watch(monkeypatch):
    """Watch all launches of a test. A fault raises an error that names it."""
    from triton.runtime import interpreter

    watch = Watch()
    try:
        executor, builder = interpreter.GridExecutor, type(interpreter.interpreter_builder)
        launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    except AttributeError as error:
        pytest.skip(f"the interpreter of Triton {triton.__version__} cannot be watched: {error}")

    def watched_launch(self, *args, **kwargs):
        watch.begin([*args, *kwargs.values()])
        launch(self, *args, **kwargs)
        watch.end(self.fn.__name__)

    def watched_load(self, pointers, mask, *rest):
        watch.touch(watch.reads, self.grid_idx, pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        watch.touch(watch.writes, self.grid_idx, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "__call__", watched_launch)
    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    return watch


def kernels(module):
    return {name for name in vars(module) if name.endswith("_kernel")}


# One of all, remainders in every direction, more samples and positions than a tile has, more types than one has.
SIZES = [(1, 1, 1, 1, 1, 1, 1), (1, 3, 2, 5, 3, 6, 3), (17, 2, 5, 3, 2, 3, 2), (2, 37, 1, 8, 2, 7, 2)]


@interpreted
def test_routing(watch, form):
    from capszoo.kernels import all_classes, dispatch, per_class

    routing = dispatch.triton_routing
    for (B, T, P, K, J, D, R), dtype in [*((sizes, torch.float32) for sizes in SIZES), (SIZES[1], torch.bfloat16)]:
        generator = torch.Generator().manual_seed(0)
        shapes = (B, T * P, K), (T, K, J, D), (J, D), (B, J, D)
        x, weight, bias, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        _, sums = routing.dynamic_routing(x, weight, bias, R, False)
        routing.dynamic_routing_backward(grad, x, weight, sums, False)
    of_form = all_classes if form == "all_classes" else per_class
    assert watch.touched.keys() == kernels(routing) | kernels(of_form)
    assert all(reads > 100 and writes > 50 for reads, writes in watch.touched.values()), watch.touched


@interpreted
def test_inverted_attention(watch):
    from capszoo.kernels.inverted_attention.ops import launchers

    # B, T, P, H, W, k, J, stride
    for B, T, P, H, W, k, J, stride in [(1, 1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 5, 4, 3, 5, 2), (40, 5, 2, 1, 1, 1, 3, 1)]:
        parents = B, (H - k) // stride + 1, (W - k) // stride + 1, J, P, P
        shapes = (B, H, W, T, P, P), (k, k, T, P, P, J), parents, parents
        x, weight, parents, grad = (torch.ones(shape) for shape in shapes)
        launchers.forward(x, weight, parents, stride)
        launchers.backward(grad, x, weight, parents, stride)
    assert watch.touched.keys() == kernels(launchers)
    assert all(reads > 100 and writes > 50 for reads, writes in watch.touched.values()), watch.touched


@interpreted
def test_self_attention(watch, form):
    from capszoo.kernels.self_attention.ops import launchers

    # The kernels of dynamic routing, whose other sizes the test above has.
    B, N, K, J, D = 17, 5, 3, 2, 3
    x, weight, prior, grad = (torch.ones(shape) for shape in ((B, N, K), (N, K, J, D), (N, J), (B, J, D)))
    _, total = launchers.forward(x, weight, prior, True)
    launchers.backward(grad, x, weight, prior, total, True)
    expected = {
        "all_classes": {"uniform", "route", "gradients"},
        "per_class": {"statistics", "sum", "dposes", "dweight"},
    }
    assert watch.touched.keys() == {f"{name}_kernel" for name in expected[form]}


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (300, 5), (2, 1030)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_squash(watch, shape, dtype):
    from capszoo.kernels import dispatch

    x, grad = torch.ones(2, *shape, dtype=dtype)
    dispatch.triton_squash.squash_forward(x, False)
    dispatch.triton_squash.squash_backward(grad, x, True)
    count = x.numel()
    assert watch.touched == {"squash_kernel": (count, count), "squash_backward_kernel": (2 * count, count)}


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (300, 5), (2, 1030)])
def test_class_scores(watch, shape):
    from capszoo.kernels.class_scores import launchers

    x, (rows, width) = torch.ones(shape), shape
    launchers.lengths(x, x.dtype)
    launchers.margin_losses(x, torch.zeros(rows, dtype=torch.long), 0.9, 0.1, 0.5)
    assert watch.touched == {
        "lengths_kernel": (rows * width, rows * width + 2 * rows),
        "margin_kernel": (rows * width + rows, 2 * rows * width + rows),
    }


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 5000)])
def test_centred_filters(watch, shape):
    from capszoo.kernels.centering import triton_filters

    x, one = torch.ones(shape), torch.ones(())
    triton_filters.centered(x, one, torch.ones(()), torch.bfloat16)
    assert watch.touched == {"center_kernel": (x.numel() + 2 * len(x), x.numel())}


@triton.jit
def store_beyond(p_x, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, 1.0, mask=o < N + 1)


@triton.jit
def load_before(p_x, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o - 1, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def store_twice(p_x, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(p_x + o, 1.0, mask=o < N)


@triton.jit
def load_from_the_next(p_x, N, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o + 1, mask=o + 1 < N, other=0.0), mask=o < N)


@interpreted
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (store_beyond, "1 places outside"),
        (load_before, "1 places outside"),
        (store_twice, "store_twice: 1 places are written by two programs"),
        (load_from_the_next, "load_from_the_next: 1 places are read by one program and written by another"),
    ],
)
def test_planted_faults_are_found(watch, kernel, message):
    memory = torch.zeros(64)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError), match=message):
        kernel[(2,)](memory[16:47], 31, BLOCK=16)
    assert not memory[:16].any() and not memory[47:].any()
