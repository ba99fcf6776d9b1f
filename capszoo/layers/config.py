"""Switch between the fused routing operators and their plain PyTorch reference."""

import os

import torch
from timm.layers import is_exportable

__all__ = ["set_fused_routing", "use_fused_routing"]

_USE_FUSED_ROUTING = os.environ.get("CAPSZOO_FUSED_ROUTING", "1") != "0"


def set_fused_routing(enable: bool = True) -> None:
    """Choose between the fused operators (the default) and the plain PyTorch reference, for every model.

    The environment variable ``CAPSZOO_FUSED_ROUTING=0`` does the same from outside, as ``TIMM_FUSED_ATTN`` does
    for attention in timm. The reference computes the same numbers to rounding, slower and with far more memory.

    Args:
        enable: True for the fused operators, False for the reference.
    """
    global _USE_FUSED_ROUTING
    _USE_FUSED_ROUTING = bool(enable)


def use_fused_routing() -> bool:
    """Whether models call the fused operators now. ONNX has no such operators, so its export gets the reference."""
    return _USE_FUSED_ROUTING and not is_exportable() and not torch.onnx.is_in_onnx_export()
