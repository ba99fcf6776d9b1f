"""What operators ask before they compute: whether Triton can run there, and whether a tangent would be lost."""

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .switches import set_fused_routing

# Why Triton's kernels could not be imported, if so.
TRITON_PROBLEM: str | None = None


def triton_module(name: str) -> ModuleType | None:
    """Import a module of Triton kernels, named from this package as in ".squash"; None where Triton cannot be used."""
    global TRITON_PROBLEM
    try:
        return importlib.import_module(name, __package__)
    except (ImportError, AttributeError, TypeError) as error:  # no Triton, or one without what the kernels use
        TRITON_PROBLEM = f"Triton cannot be used here ({error})"
        return None


# Imported here and not at first use: importing a submodule puts it into the package under its name, where the functions
# of the same names must come after it.
triton_routing = triton_module(".dynamic_routing")
triton_squash = triton_module(".squash")

# Types of what is fused into one launch.
_FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton has no code for GPUs before it.
LEAST_CAPABILITY = (7, 0)


@functools.cache
def _warn(problem: str) -> None:
    warnings.warn(f"{problem}: capsule operators run as PyTorch operators, more slowly", stacklevel=2)


@functools.cache
def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot run on this GPU, if it cannot."""
    if TRITON_PROBLEM:
        return TRITON_PROBLEM
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY and not torch.version.hip:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"The GPU has compute capability {found}, Triton needs {least}"
    try:  # the least kernel shows whether it can compile and launch: without a C compiler, say, it cannot
        triton_squash.squash_forward(torch.zeros(1, 1, device=device), False)
    except Exception as error:
        return f"Triton cannot be used here ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton computes in this dtype there; warns once if only the machine prevents it."""
    if dtype != torch.float32:
        return False
    problem = triton_problem(device)
    if problem:
        _warn(problem)
    return problem is None


def fuses(x: Tensor, *others: Tensor) -> bool:
    """Whether Triton takes these on a GPU in a plain call, where several of PyTorch's operators are fused into one."""
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in (x, *others)):  # such as a proxy of torch.fx
        return False
    if not _is_on_gpu(x) or x.dtype not in _FUSED_TYPES or not set_fused_routing.enabled:
        return False
    if any(tensor.device != x.device for tensor in others) or is_looked_at(x, *others):
        return False
    return runs_triton(x.device, torch.float32)


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def is_looked_at(*tensors: Tensor) -> bool:
    """Whether something else than a plain call computes with these."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or has_tangent(*tensors)
    )


def is_plain_pass(grad: Tensor) -> bool:
    """Whether a backward pass computes one gradient, and none of higher order or of forward mode."""
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None or has_tangent(grad):
        return False
    return "Batched" not in str(torch._C._dispatch_keys(grad))  # by `is_grads_batched`


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of them carries a derivative of forward mode."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def kernel(function: Callable) -> Callable:
    """Make a kernel refuse tangents, which it would drop in silence, and keep autocast out of it: an operator chooses
    its precision itself."""

    @functools.wraps(function)
    def checked(*args):
        if has_tangent(*(arg for arg in args if isinstance(arg, Tensor))):
            raise NotImplementedError(
                "a capszoo operator was called with forward-mode tangents, which it cannot pass on: call it as "
                "its function in capszoo.kernels, or script and export with capszoo.set_fused_routing(False)"
            )
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*args)
        torch.set_autocast_enabled(device, False)  # the context manager takes 20 us
        try:
            return function(*args)
        finally:
            torch.set_autocast_enabled(device, True)

    return checked
