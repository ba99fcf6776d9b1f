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


def test_switch_for_a_while():
    with set_fused_routing(False):
        assert use_fused_routing() is False
        with set_fused_routing():
            assert use_fused_routing() is True
        assert use_fused_routing() is False
    assert use_fused_routing() is True
    with pytest.raises(RuntimeError, match="inside"), set_fused_routing(False):
        raise RuntimeError("inside")
    assert use_fused_routing() is True


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kwargs", [{}, {"squash": "approx"}, {"keep_capsules": [0, 3], "share_weights": True}])
def test_scripts_hold_what_was_chosen(kwargs):
    """torch.jit compiles a class once for all modules of the same constants: the choice must be one."""
    model = capszoo.create_model("capsnet", conv_dim=8, num_types=4, img_size=17, **kwargs).eval()
    x = torch.rand(2, 1, 17, 17)
    fused = torch.jit.script(model)
    with set_fused_routing(False):
        plain = torch.jit.script(model)
    again = torch.jit.script(model)
    for script, operators in (fused, True), (plain, False), (again, True):
        assert ("capszoo::" in str(script.inlined_graph)) == operators
        torch.testing.assert_close(script(x), model(x))


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
