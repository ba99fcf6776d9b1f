"""capszoo.benchmark.steps and the variants of routing in them."""

import pytest
import torch

from capszoo.benchmark import steps
from capszoo.benchmark.measuring import peak_bytes
from capszoo.benchmark.planning import LARGE
from capszoo.benchmark.variants import plain_bytes
from capszoo.layers import use_fused_routing

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(288, 8, 8, 10, 16), (288, 288, 8, 30, 16), (200, 200, 4, 10, 12)])
def test_estimated_memory_of_plain_routing_is_near_the_measured(shape):
    step = steps.routing_step(shape, torch.float32, "plain", 16, CPU)
    assert plain_bytes(16, shape) == pytest.approx(peak_bytes(step, CPU), rel=0.2)


def test_plain_form_is_not_tried_without_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 10 << 30))
    with pytest.raises(torch.OutOfMemoryError, match="needs some 66 GiB, 5 GiB are free"):
        steps.routing_step(LARGE, torch.float32, "plain", 128, torch.device("cuda", 0))


@pytest.mark.parametrize("shape", [(72, 72, 8, 10, 16), (72, 8, 8, 10, 16)])
def test_plain_routing_has_the_numbers_of_ours(shape):
    ours, plain = (steps.routing_step(shape, torch.float32, v, 5, CPU)() for v in ("fused", "plain"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


LAYERS = {
    "capsnet_tiny": ["conv1", "act1", "primary_caps", "routing", "decoder", "losses", "optimizer"],
    "efficient_capsnet": [
        "conv1", "conv2", "conv3", "conv4", "primary_caps", "routing", "decoder", "losses", "optimizer",
    ],
    "cnn_baseline_tiny": ["conv1", "act1", "conv2", "act2", "fc", "losses", "optimizer"],
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_what_the_model_calls(name):
    assert steps.layer_names(name) == LAYERS[name]
    convolutions = [layer for layer in LAYERS[name] if steps.has_convolution(name, layer)]
    assert convolutions == (["conv1", "primary_caps"] if name == "capsnet_tiny" else [])


@pytest.mark.parametrize("name, layer", [(name, layer) for name in LAYERS for layer in LAYERS[name]])
def test_layers_are_timed_on_what_the_model_gives_them(name, layer, monkeypatch):
    """In bfloat16, where the parts hand on different types: each gives its own parameters a gradient."""
    grads = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: grads.extend(real(*args)))
    steps.layer_step(name, layer, torch.bfloat16, "fused", 2, CPU)()
    assert all(grad is not None and grad.isfinite().all() for grad in grads) and bool(grads) == (layer != "optimizer")


def test_variants_of_a_family_route_as_their_names_say(monkeypatch):
    seen, forward = [], steps.CapsuleTask.forward

    def recorded(task, *args):
        seen.append((use_fused_routing(), task.model.arguments()["num_routing"]))
        return forward(task, *args)

    monkeypatch.setattr(steps.CapsuleTask, "forward", recorded)
    for variant in ("fused", "unfused", "uniform"):
        steps.training_step("capsnet_vb_mini", None, variant, 2, CPU)()
    assert seen == [(True, 2), (False, 2), (True, 1)] and use_fused_routing()
