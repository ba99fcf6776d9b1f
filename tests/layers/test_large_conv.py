"""A convolution that takes the fastest form is `torch.nn.Conv2d` in all else."""

import pytest
import torch

import capszoo
from capszoo.kernels import fourier_conv, unfolded_conv
from capszoo.layers import LargeConv2d


@pytest.mark.parametrize(("images", "form"), [(1, unfolded_conv), (32, fourier_conv)])
def test_baselines_compute_as_capsnet_does(images, form, monkeypatch):
    torch.manual_seed(0)
    model, x = capszoo.create_model("cnn_baseline_tiny").eval(), torch.rand(images, 1, 28, 28)
    with capszoo.set_fourier_conv(False):
        expected = model(x)
    calls = []
    forward = form.forward
    monkeypatch.setattr(form, "forward", lambda *args: calls.append(args) or forward(*args))
    found = model(x)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_is_torchs_convolution():
    torch.manual_seed(0)
    conv = LargeConv2d(64, 64, 9, 2)
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(64, 64, 9, 2)
    assert conv.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 64, 12, 12)
    for layer in (conv, torch.jit.script(conv), torch.fx.symbolic_trace(conv)):
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(conv.double()(x.double()), plain.double()(x.double()))
