"""CUDA pretended on a CPU, for tests: graphs that replay on the CPU, and a device named cuda whose tensors lie there.

As a plugin, `PYTHONPATH=tests python -m pytest -p pretended_cuda -m gpu`, it runs the tests that need a GPU, so that
their errors are found where there is none. The CPU's operators compute the numbers; times and memory mean nothing.
"""

import contextlib
import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(values):
    return {value.untyped_storage().data_ptr() for value in tree_leaves(values) if isinstance(value, torch.Tensor)}


class Graph(TorchDispatchMode):
    """`torch.cuda.CUDAGraph`: keeps the operators of a capture, and runs them in the capture's memory at each replay.

    As on a GPU, a capture leaves no numbers behind, a replay runs nothing of the Python that was captured, and what
    waits for a number is refused.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.overwritten = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                self.overwritten += [(t, t.clone()) for t in tree_leaves(written) if isinstance(t, torch.Tensor)]
        inputs, results = storages((args, kwargs)), function(*args, **kwargs)
        # What lies in memory of its own, by its place: a replay writes it there.
        own = {
            place: leaf
            for place, leaf in enumerate(tree_leaves(results))
            if isinstance(leaf, torch.Tensor) and not storages(leaf) <= inputs
        }
        self.calls.append((function, args, kwargs, own))
        return results

    @torch.inference_mode()
    def restore(self):
        """Undo what the capture has written."""
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)
        self.overwritten.clear()

    @torch.inference_mode()
    def replay(self):
        with torch._C.DisableTorchFunction():
            for function, args, kwargs, own in self.calls:
                results = tree_leaves(function(*args, **kwargs))
                for place, kept in own.items():
                    kept.copy_(results[place])


class NoWaiting(TorchFunctionMode):
    """Refuses what waits for a number. Python's calls alone: checks inside of operators are those of a CPU."""

    waiting = {getattr(torch.Tensor, name) for name in ("__bool__", "__float__", "__int__", "cpu", "item", "tolist")}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.waiting:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def capture(graph, pool=None, stream=None, capture_error_mode="global"):
    """`torch.cuda.graph`."""
    state = torch.get_rng_state()
    with NoWaiting(), graph:
        yield
    graph.restore()
    torch.set_rng_state(state)


class Stream:
    """`torch.cuda.Stream`: all work is done in order anyway."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


def pretend_graphs(monkeypatch):
    """Let code capture and replay graphs where there is no GPU; return the list that all graphs go into."""
    graphs = []

    def make_graph():
        graphs.append(Graph())
        return graphs[-1]

    for name, replacement in {
        "CUDAGraph": make_graph,
        "graph": capture,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return graphs


# ---- as a plugin ----


class OnCPU(TorchFunctionMode):
    """Puts what is meant for a GPU on the CPU, and says of tensors that they lie on the GPU."""

    facts = {torch.Tensor.device.__get__: torch.device("cuda", 0), torch.Tensor.is_cuda.__get__: True}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.facts and not args[0].is_meta:
            return self.facts[function]
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        kwargs = kwargs or {}
        if function is not torch.device:
            args, kwargs = map(self.on_cpu, args), {key: self.on_cpu(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    @staticmethod
    def on_cpu(value):
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class Event:
    """`torch.cuda.Event`: what is timed first takes the least."""

    times = (10 * 1.5**n for n in itertools.count())

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return next(self.times)


def pytest_configure():
    torch.cuda.is_available = lambda: True  # asked when the tests are collected


def operators():
    """Each operator, and its kernel for CUDA."""
    from capszoo.kernels import ops
    from capszoo.kernels.gaussian_routing import ops as gaussian_routing
    from capszoo.kernels.inverted_attention import ops as inverted_attention
    from capszoo.kernels.self_attention import ops as self_attention

    return [
        (ops.squash_op, ops._squash_cuda),
        (ops.squash_backward_op, ops._squash_backward_cuda),
        (ops.dynamic_routing_op, ops._routing_cuda),
        (ops.dynamic_routing_backward_op, ops._routing_backward_cuda),
        (gaussian_routing.mixture_moments_op, gaussian_routing._moments_cuda),
        (gaussian_routing.mixture_moments_backward_op, gaussian_routing._moments_backward_cuda),
        (inverted_attention.forward_op, inverted_attention._forward_cuda),
        (inverted_attention.backward_op, inverted_attention._backward_cuda),
        (self_attention.forward_op, self_attention._forward_cuda),
        (self_attention.backward_op, self_attention._backward_cuda),
    ]


def launchers():
    """Modules of Triton kernels, the names of their launchers, and the PyTorch operators that take their places."""
    from capszoo.kernels import centering, class_scores, dispatch, ops
    from capszoo.kernels.gaussian_routing import ops as gaussian_routing
    from capszoo.kernels.inverted_attention import ops as inverted_attention
    from capszoo.kernels.self_attention import ops as self_attention

    return [
        (centering.triton_filters, "centered", centered),
        (class_scores.launchers, "lengths", lengths_and_units),
        (class_scores.launchers, "margin_losses", margin_losses),
        (dispatch.triton_squash, "squash_forward", ops._squash),
        (dispatch.triton_squash, "squash_backward", ops._squash_backward),
        (dispatch.triton_routing, "dynamic_routing", ops._routing),
        (dispatch.triton_routing, "dynamic_routing_backward", routing_backward),
        (gaussian_routing.launchers, "moments", gaussian_routing._moments),
        (gaussian_routing.launchers, "moments_backward", gaussian_routing._moments_backward),
        (inverted_attention.launchers, "forward", inverted_attention._forward),
        (inverted_attention.launchers, "backward", inverted_attention._backward),
        (self_attention.launchers, "forward", self_attention._forward),
        (self_attention.launchers, "backward", self_attention._backward),
    ]


@pytest.fixture(autouse=True, scope="session")
def operators_of_the_gpu():
    """Register for the CPU's tensors what is registered for CUDA's."""
    for operator, kernel in operators():
        operator.register_kernel("cpu")(kernel)


@pytest.fixture(autouse=True)
def cuda_on_cpu(request, monkeypatch):
    """Run a test on the CPU, and let it think that it is on a GPU."""
    from capszoo.benchmark import steps

    pretend_graphs(monkeypatch)
    peaks = (2**10 * 32**n for n in itertools.count())  # what is measured first takes the least
    for name, replacement in {
        "Event": Event,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (7, 5),  # has no TF32
        "get_device_name": lambda device=None: "pretended GPU",
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda device=None: next(peaks),
        "mem_get_info": lambda device=None: (2**36, 2**36),
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_device": lambda device: None,
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda optimizer: None, raising=False)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)

    # The operators take the path of a GPU as far as to the launchers of the kernels.
    for module, name, replacement in launchers():
        monkeypatch.setattr(module, name, replacement)

    if hasattr(request.module, "make_inputs"):
        monkeypatch.setattr(request.module, "make_inputs", smaller_inputs(request.module.make_inputs))
    for name in ("routing_step", "training_step", "inference_step", "layer_step"):
        monkeypatch.setattr(steps, name, smaller_step(getattr(steps, name)))
    with OnCPU():
        yield


def routing_backward(grad, x, weight, sums, approximate, tf32):
    from capszoo.kernels import ops

    bias = sums.new_zeros(sums.shape[2:])  # gives its gradient the type
    return ops._routing_backward(grad, x, weight, bias, sums, approximate, tf32)


def centered(filters, centered, scale, dtype):
    from capszoo.kernels.centering import less_means

    return less_means(filters, centered) * scale  # in no other type: there is no autocast to convert images


def lengths_and_units(x, dtype, with_units=True):
    lengths = torch.linalg.vector_norm(x.float(), dim=-1)
    inverses = torch.where(lengths == 0, 0.0, 1 / lengths)
    return lengths.to(dtype), x.float() * inverses[..., None], inverses


def margin_losses(lengths, target, m_plus, m_minus, lambda_):
    if target.ndim == 1:  # an index out of range leaves a row of NaN
        table = torch.eye(lengths.shape[1] + 1)[:, :-1]
        table[-1] = torch.nan
        target = table[torch.where((target < 0) | (target >= lengths.shape[1]), lengths.shape[1], target.long())]
    present, lengths = target.float(), lengths.float()
    absent = lambda_ * (1 - present)
    short, long = (m_plus - lengths).relu(), (lengths - m_minus).relu()
    losses = (present * short.square() + absent * long.square()).sum(1)
    curvatures = 2 * (present * (short > 0) + absent * (long > 0))
    return losses, 2 * (absent * long - present * short), curvatures


def smaller_inputs(make_inputs):
    """Make the inputs of a test of the operators no larger than a CPU takes well."""
    most = 4, 8, 3, 300, 10, 16  # B, T, P, K, J, D
    return lambda *sizes, **options: make_inputs(*map(min, sizes, most), *sizes[6:], **options)


def smaller_step(make_step):
    """Make a step that capszoo.benchmark times; its last two arguments are batch size and device."""
    return lambda *args: make_step(*args[:-2], min(args[-2], 3), args[-1])
