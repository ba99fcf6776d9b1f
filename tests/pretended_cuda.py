"""CUDA pretended on a CPU, for tests: graphs that replay on the CPU, and a device named cuda whose tensors lie there.

As a plugin, `PYTHONPATH=tests python -m pytest -p pretended_cuda -m gpu`, it runs the tests that need a GPU, so that
their errors are found where there is none. The CPU's operators compute the numbers; times and memory mean nothing.
"""

import contextlib

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
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results

    @torch.no_grad()
    def restore(self):
        """Undo what the capture has written."""
        for tensor, before in reversed(self.overwritten):
            tensor.copy_(before)
        self.overwritten.clear()

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self.calls:
            inputs, again = storages((args, kwargs)), function(*args, **kwargs)
            for kept, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and not storages(kept) <= inputs:
                    kept.copy_(new)


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
