"""What users switch on and off, and operators ask for."""

import os

__all__ = ["set_fourier_conv", "set_fused_routing"]


_WORDS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


def read_switch(name: str) -> bool:
    """Whether an environment variable leaves something on, as it is without one.

    Raises:
        ValueError: If its text says neither.
    """
    text = os.environ.get(name, "1")
    if text.strip().lower() not in _WORDS:
        raise ValueError(f"{name}={text!r} says neither on nor off: give 1 or 0, or unset it")
    return _WORDS[text.strip().lower()]


class _Switch:
    """A call sets it for good, a ``with`` statement restores the former choice at its end."""

    enabled: bool

    def __init__(self, enable: bool = True) -> None:
        self._before = type(self).enabled
        type(self).enabled = bool(enable)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        type(self).enabled = self._before


class set_fused_routing(_Switch):
    """Choose between the fused operators (the default) and the plain PyTorch reference, for every model.

    A call sets it for good, a ``with`` statement restores the former choice at its end. The environment variable
    ``CAPSZOO_FUSED_ROUTING=0`` does the same from outside, as ``TIMM_FUSED_ATTN`` does for attention in timm. The
    reference computes the same numbers to rounding, slower and with far more memory. What is fused around routing on a
    GPU, such as the margin loss, is PyTorch's operators then, too.

    Files of torch.export, AOTInductor and torch.jit hold what was chosen when they were made. With the fused operators
    they need ``import capszoo`` where they are loaded, with the reference only PyTorch:

        ```python
        with capszoo.set_fused_routing(False):
            torch.export.save(torch.export.export(model, (images,)), "model.pt2")
        ```

    Args:
        enable: True for the fused operators, False for the reference.
    """

    enabled = read_switch("CAPSZOO_FUSED_ROUTING")


class set_fourier_conv(_Switch):
    """Choose whether large convolutions on a CPU may go through Fourier transforms or, at small batches, one matrix
    product (the default), for every model.

    A call sets it for good, a ``with`` statement restores the former choice at its end. The environment variable
    ``CAPSZOO_FOURIER_CONV=0`` does the same from outside. Without them each convolution is PyTorch's own: the same
    numbers to rounding, in less memory, and slower; see `capszoo/kernels/fourier_conv.py` and `unfolded_conv.py` there.

    Args:
        enable: True where counts of multiplications speak for it, False for never.
    """

    enabled = read_switch("CAPSZOO_FOURIER_CONV")
