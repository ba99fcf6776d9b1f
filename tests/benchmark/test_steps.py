"""capszoo.benchmark.steps and the variants of routing in them."""

import pytest
import torch

from capszoo.benchmark import steps
from capszoo.benchmark.measuring import peak_bytes
from capszoo.benchmark.planning import LARGE
from capszoo.benchmark.variants import plain_bytes

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


@pytest.mark.parametrize("layer", steps.LAYERS)
def test_layers_are_timed_on_what_the_model_gives_them(layer):
    """In bfloat16, where the parts hand on different types."""
    assert steps.layer_step("capsnet_tiny", layer, torch.bfloat16, "fused", 2, CPU)() is None
