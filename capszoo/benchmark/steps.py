"""The steps that are timed: each function returns one, ready to be called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from capszoo.contract import decoder_of
from capszoo.engine.memory import keep_freed_memory
from capszoo.engine.task import CapsuleTask
from capszoo.layers import ScaledConv2d, set_fourier_conv, set_fused_routing
from capszoo.losses import reconstruction_loss
from capszoo.precision import autocast
from capszoo.registry import create_model, family_of, model_keywords, uniform_arguments

from .variants import VARIANTS, Routing, Variant, plain_bytes, require_memory, routing_function, routing_shape


def make_model(
    name: str, variant: str, batch_size: int, device: torch.device, decoder: bool = True
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with the routing of a variant, images and labels."""
    if VARIANTS[variant].routing == "plain":
        require_memory(variant, plain_bytes(batch_size, routing_shape(name), backward=decoder), device)
    torch.manual_seed(0)
    layout = torch.channels_last if VARIANTS[variant].channels_last else torch.contiguous_format
    kwargs: dict[str, Any] = {"decoder": decoder} if "decoder" in model_keywords(name) else {}
    if VARIANTS[variant].routing == "uniform":
        kwargs |= uniform_arguments(name)
    model = create_model(name, **kwargs).to(device, memory_format=layout)
    if VARIANTS[variant].routing in ("plain", "compiled", "none"):
        model.class_caps.routing = Routing(routing_function(variant))
    images = torch.rand(batch_size, model.in_chans, *model.img_size, device=device)
    return model, images, torch.randint(model.num_classes, (batch_size,), device=device)


@contextmanager
def _switched(variant: Variant) -> Iterator[None]:
    """The zoo's switches as a variant has them."""
    with set_fourier_conv(variant.fourier_conv), set_fused_routing(variant.routing != "unfused"):
        yield


def make_optimizer(model: nn.Module, device: torch.device, fused: bool = True) -> torch.optim.Optimizer:
    """Adam as recipes/train.py has it, whose step a CUDA graph can hold; or PyTorch's own choice."""
    on_gpu = device.type == "cuda"
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused or None, capturable=on_gpu)


def routing_step(
    shape: tuple[int, ...], dtype: torch.dtype, variant: str, batch_size: int, device: torch.device
) -> Callable:
    """Forward and backward pass of routing, for poses and matrices of type `dtype`."""
    require_memory(variant, plain_bytes(batch_size, shape, size=dtype.itemsize), device)
    torch.manual_seed(0)
    capsules, types, caps_dim, num_classes, class_dim = shape
    x = torch.randn(batch_size, capsules, caps_dim, device=device).to(dtype).requires_grad_()
    weight = torch.randn(types, caps_dim, num_classes, class_dim, device=device).mul_(0.1).to(dtype).requires_grad_()
    bias = torch.full((num_classes, class_dim), 0.1, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch_size, num_classes, class_dim, device=device).to(dtype)
    route = routing_function(variant)
    return lambda: torch.autograd.grad(route(x, weight, bias), [x, weight, bias], grad)


def training_step(name: str, amp: torch.dtype | None, variant: str, batch_size: int, device: torch.device) -> Callable:
    """A training step as recipes/train.py takes it: losses, backward pass, Adam."""
    model, images, labels = make_model(name, variant, batch_size, device)
    chosen = VARIANTS[variant]
    amp = amp if chosen.low_precision else None
    task = CapsuleTask(model, device=device, verbose=False)
    optimizer = make_optimizer(model, device, chosen.fused_optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

    def step() -> None:
        keep_freed_memory(chosen.keeps_memory, device)
        with _switched(chosen), autocast(device, amp):
            loss = task(images, labels)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # At the end, so that a step starts without gradients and its peak memory counts them.
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_step(name: str, amp: torch.dtype | None, variant: str, batch_size: int, device: torch.device) -> Callable:
    """A forward pass in inference mode."""
    model, images, _ = make_model(name, variant, batch_size, device, decoder=False)
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        with _switched(VARIANTS[variant]), autocast(device, amp):
            model(images)

    return step


@dataclass(frozen=True)
class _Call:
    """A call of one of a model's modules."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _layer_calls(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, _Call]:
    """The first call of each module of a model's top level in a training step, by the layer's name.

    A layer has the name of its module; the one that routes, where a model has but one, is called 'routing'.
    """
    routing = list(model.capsule_layers().values())
    calls: dict[str, _Call] = {}
    hooks = []
    for name, module in model.named_children():
        if routing == [module]:
            name = "routing"

        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
            calls.setdefault(name, _Call(module, args, kwargs))

        hooks.append(module.register_forward_pre_hook(record, with_kwargs=True))
    task = CapsuleTask(model, device=images.device, verbose=False)
    with torch.no_grad():
        task(images, labels)
    for hook in hooks:
        hook.remove()
    return calls


def layer_names(name: str) -> list[str]:
    """The layers of a training step that :func:`layer_step` takes apart: modules, then losses and optimizer."""
    model, images, labels = make_model(name, "fused", 2, torch.device("cpu"))
    return [*_layer_calls(model, images, labels), "losses", "optimizer"]


def has_convolution(name: str, layer: str) -> bool:
    """Whether a layer convolves by :func:`capszoo.set_fourier_conv`'s choice."""
    module = dict(create_model(name, device="meta").named_children()).get(layer)
    return module is not None and any(isinstance(part, ScaledConv2d) for part in module.modules())


def own_variants(name: str) -> list[str]:
    """Variants of a model whose routing is not dynamic: by operators, by their references, and without routing."""
    model = create_model(name, device="meta")
    direct = ["direct"] if any(isinstance(part, ScaledConv2d) for part in model.modules()) else []
    routed = ["unfused", "uniform"] if hasattr(family_of(name), "uniform_arguments") else []
    return ["fused", *direct, *routed]


def layer_step(
    name: str, layer: str, amp: torch.dtype | None, variant: str, batch_size: int, device: torch.device
) -> Callable:
    """Forward and backward pass of one part of a training step, on what the parts before it give."""
    model, images, labels = make_model(name, variant, batch_size, device)
    if layer == "optimizer":
        optimizer = make_optimizer(model, device)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return optimizer.step

    with autocast(device, amp):
        if layer == "losses":
            call = _losses_call(model, images, labels)
        else:
            call = _layer_calls(model, images, labels)[layer]
    args, inputs = [], []
    for value in call.args:
        if isinstance(value, Tensor) and value.is_floating_point():
            # No gradient goes to the images.
            value = value.detach().requires_grad_(value.data_ptr() != images.data_ptr())
            inputs += [value] if value.requires_grad else []
        args.append(value)
    for module in call.module.modules():
        if hasattr(module, "inplace"):  # which leaves of the graph refuse
            module.inplace = False
    wanted = [*inputs, *call.module.parameters()]
    with autocast(device, amp), _switched(VARIANTS[variant]):
        outs = [out for out in tree_leaves(call.module(*args, **call.kwargs)) if out.requires_grad]
    grads = [torch.ones_like(out) for out in outs]

    def step() -> None:
        with _switched(VARIANTS[variant]), autocast(device, amp):
            outs = [out for out in tree_leaves(call.module(*args, **call.kwargs)) if out.requires_grad]
        torch.autograd.grad(outs, wanted, grads)

    return step


def _losses_call(model: nn.Module, images: Tensor, labels: Tensor) -> _Call:
    """The losses of a step, of class scores and reconstructions."""
    task = CapsuleTask(model, device=images.device, verbose=False)

    class Losses(nn.Module):
        def forward(self, scores: Tensor, drawn: Tensor | None = None) -> Tensor:
            loss = task.criterion(scores, labels)
            if drawn is not None:
                loss = loss + task.reconstruction_weight * reconstruction_loss(drawn, images)
            return loss

    decoder = decoder_of(model)
    with torch.no_grad():
        if decoder is None:
            return _Call(Losses(), (model(images),), {})
        capsules, scores = model.forward_capsules(images)
        return _Call(Losses(), (scores, decoder(capsules, labels)), {})
