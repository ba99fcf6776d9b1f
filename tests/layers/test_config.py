"""The switch between fused and reference operators."""

import pytest
import torch
from timm.layers import set_exportable

import capszoo
from capszoo.layers import set_fused_routing, use_fused_routing


@pytest.fixture(autouse=True)
def restore():
    yield
    set_fused_routing(True)


def test_switch():
    assert use_fused_routing() is True
    set_fused_routing(False)
    assert use_fused_routing() is False
    set_fused_routing()
    assert use_fused_routing() is True
    assert capszoo.set_fused_routing is set_fused_routing


def test_exportable_layers_use_the_reference():
    with set_exportable(True):
        assert not use_fused_routing()
    assert use_fused_routing()


def test_models_made_before_follow():
    model = capszoo.create_model("capsnet_tiny", conv_dim=8, img_size=17).eval()
    x = torch.rand(2, 1, 17, 17)
    fused = model(x)
    set_fused_routing(False)
    torch.testing.assert_close(model(x), fused, rtol=0, atol=1e-5)
