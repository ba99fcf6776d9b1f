"""Switches between what is fast and the plain PyTorch that computes the same numbers."""

import torch
from timm.layers import is_exportable

from capszoo.kernels.switches import set_fourier_conv, set_fused_routing

__all__ = ["FollowsFusedRouting", "set_fourier_conv", "set_fused_routing", "use_fourier_conv", "use_fused_routing"]


def use_fourier_conv() -> bool:
    """Whether convolutions may go through Fourier transforms now."""
    return set_fourier_conv.enabled


def use_fused_routing() -> bool:
    """Whether models call the fused operators now. ONNX has no such operators, so its export gets the reference."""
    return set_fused_routing.enabled and not is_exportable() and not torch.onnx.is_in_onnx_export()


class FollowsFusedRouting:
    """For a module that tells torch.jit.script what is chosen: `fused`, a constant when the module is compiled."""

    __constants__ = ["fused"]
    __jit_unused_properties__ = ["fused"]

    @property
    def fused(self) -> bool:
        """Whether the fused operators are chosen now."""
        return use_fused_routing()
