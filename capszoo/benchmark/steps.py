"""The steps that are timed: each function returns one, ready to be called."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from capszoo.engine.task import CapsuleTask
from capszoo.layers import capsule_lengths, set_fourier_conv
from capszoo.losses import reconstruction_loss
from capszoo.precision import autocast
from capszoo.registry import create_model, model_keywords

from .variants import VARIANTS, Routing, plain_bytes, require_memory, routing_function, routing_shape

LAYERS = ("conv1", "primary_caps", "squash", "routing", "losses", "decoder", "optimizer")


def make_model(
    name: str, variant: str, batch_size: int, device: torch.device, decoder: bool = True
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with the routing of a variant, images and labels."""
    if VARIANTS[variant].routing == "plain":
        require_memory(variant, plain_bytes(batch_size, routing_shape(name), backward=decoder), device)
    torch.manual_seed(0)
    layout = torch.channels_last if VARIANTS[variant].channels_last else torch.contiguous_format
    kwargs = {"decoder": decoder} if "decoder" in model_keywords(name) else {}
    model = create_model(name, **kwargs).to(device, memory_format=layout)
    if VARIANTS[variant].routing != "fused":
        model.class_caps.routing = Routing(routing_function(variant))
    images = torch.rand(batch_size, model.in_chans, *model.img_size, device=device)
    return model, images, torch.randint(model.num_classes, (batch_size,), device=device)


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
        with set_fourier_conv(chosen.fourier_conv), autocast(device, amp):
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
        with set_fourier_conv(VARIANTS[variant].fourier_conv), autocast(device, amp):
            model(images)

    return step


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

    primary = model.primary_caps
    parts = {
        "conv1": (lambda x: model.act1(model.conv1(x)), model.conv1),
        "primary_caps": (primary.conv, primary.conv),
        "squash": (lambda x: primary.to_capsules(primary.squash_map(x)), None),
        "routing": (model.class_caps, model.class_caps),
        "decoder": (lambda x: model.decoder(x, labels), model.decoder),
    }
    inputs = [images]
    with torch.no_grad(), autocast(device, amp):
        for part, (function, _) in parts.items():
            if part == layer:
                break
            inputs = [function(inputs[0]), *inputs]
    if layer == "losses":  # inputs are now the drawn images, the class capsules and what came before
        inputs, module = inputs[:2], None
        task = CapsuleTask(model, device=device, verbose=False)

        def function(drawn: Tensor, capsules: Tensor) -> Tensor:
            loss = task.criterion(capsule_lengths(capsules), labels)
            return loss + task.reconstruction_weight * reconstruction_loss(drawn, images)
    else:
        inputs, (function, module) = inputs[:1], parts[layer]
    inputs = [tensor.detach().requires_grad_(layer != "conv1") for tensor in inputs]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    wanted += [] if module is None else module.parameters()
    with torch.no_grad(), autocast(device, amp):
        grad = torch.ones_like(function(*inputs))

    def step() -> None:
        with set_fourier_conv(VARIANTS[variant].fourier_conv), autocast(device, amp):
            out = function(*inputs)
        torch.autograd.grad(out, wanted, grad)

    return step
