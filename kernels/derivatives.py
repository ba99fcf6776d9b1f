"""What operators take from the reference: second and higher derivatives, and what transforms of torch.func ask for.

They store the votes, as the reference does.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from . import reference


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Half precision is stored as it comes and computed in float32."""
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """An operator chooses its precision itself; the matrix products in it are not for autocast to lower."""
    device = "cpu" if x.is_meta else x.device.type  # the meta device has none
    # To enter and leave it takes 20 us, which counts where few samples are routed.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def squash_reference(x: Tensor, approximate: bool) -> Tensor:
    with no_autocast(x):
        return reference.squash(x, approximate)


def routing_reference(x: Tensor, weight: Tensor, bias: Tensor, num_iters: int, approximate_squash: bool) -> Tensor:
    with no_autocast(x):
        return reference.dynamic_routing(x, weight, bias, num_iters, approximate_squash)


def second_gradients(function: Callable, cotangents: tuple[Tensor, ...], *tensors: Tensor) -> tuple:
    """Gradients, by `tensors`, of the product of `cotangents` and the gradients of `function` by its inputs.

    They can be differentiated further if the caller's mode says so (create_graph).

    Args:
        function: Of as many inputs as there are cotangents.
        cotangents: One for each gradient.
        *tensors: The gradients by the function's outputs, then its inputs.
    """
    create_graph = torch.is_grad_enabled()
    num_outputs = len(tensors) - len(cotangents)
    with torch.enable_grad(), no_autocast(tensors[0]):
        # Views, since a gradient may itself depend on the inputs, and a path through it would be counted twice. They
        # keep the graph of the inputs, without which higher derivatives would be zero.
        views = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        grads, inputs = views[:num_outputs], views[num_outputs:]
        gradients = torch.autograd.grad(function(*inputs), inputs, grads, create_graph=True)
        return torch.autograd.grad(gradients, views, cotangents, create_graph=create_graph, materialize_grads=True)


# Where a transform of torch.func is active (grad, vmap, jvp ...), the dispatcher asks at this key first. Were it
# renamed, grad would raise an error, vmap go sample by sample, and jvp show its tangents to the kernels, which refuse.
_TRANSFORMS = "FuncTorchDynamicLayerFrontMode"
_library = torch.library.Library("capszoo", "FRAGMENT")


def register_transforms(**functions: Callable) -> None:
    """Register what takes the place of the operators of these names where a transform is active."""
    if hasattr(torch._C.DispatchKey, _TRANSFORMS):
        for name, function in functions.items():
            _library.impl(name, function, _TRANSFORMS)


def transformed_gradients(function: Callable, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function` by all inputs, as transforms can see through."""
    _, pull_back = torch.func.vjp(function, *inputs)
    return pull_back(grad)


def squash_backward_transformed(grad, x, approximate):
    return transformed_gradients(partial(squash_reference, approximate=approximate), grad, x)[0]


def routing_transformed(x, weight, bias, num_iters, approximate_squash, tf32=False):
    with no_autocast(x):
        sums = reference.dynamic_routing_sums(x, weight, bias, num_iters, approximate_squash)
        return reference.squash(sums[-1], approximate_squash).to(x.dtype), sums


def routing_backward_transformed(grad, x, weight, bias, sums, approximate_squash, tf32):
    options = {"num_iters": sums.shape[0], "approximate_squash": approximate_squash}
    return transformed_gradients(partial(routing_reference, **options), grad, x, weight, bias)
