"""Products of matrices for convolutions on a CPU, by the library that multiplies faster on this processor."""

import torch
from torch import Tensor

from .processor import is_zen5

__all__ = ["multiply", "product"]

# Multiplications of one product, for each thread, from which oneDNN's is faster: 1.0 to 2.0 times on one core of Zen 5,
# and 1.4 to 2.0 times for the 2^23 and 2^25 of CapsNet at 16 and 128 images. Smaller ones take longer to call than to
# compute; and MKL has a product for each thread, where all threads share one of oneDNN's.
MIN_PRODUCT = 2**22

# Rows of the first matrix, and of the second, from which that holds: with ten of each, as a transform of columns has
# them, it takes 1.5 times as long.
MIN_ROWS = 16


def _takes_onednn() -> bool:
    """Whether oneDNN uses vectors of 512 bits where MKL, which is PyTorch's in float32, uses 256: AMD from Zen 5 on."""
    return is_zen5() and torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


TAKES_ONEDNN = _takes_onednn()


def _is_faster(a: Tensor, N: int) -> bool:
    """PyTorch itself leaves products of bfloat16 to oneDNN."""
    M, K = a.shape
    large = min(M, K) >= MIN_ROWS and M * K * N >= MIN_PRODUCT * torch.get_num_threads()
    return TAKES_ONEDNN and large and a.dtype == torch.float32


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    b = b if b.t().is_contiguous() else b.contiguous()  # with gaps between its rows it takes a thousand times as long
    return torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.t(), None, "none", [], "")


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Of two matrices, `[M, K]` by `[K, N]`; written to `out`, if that is given."""
    if not _is_faster(a, b.shape[1]):
        return torch.mm(a, b, out=out)
    result = _by_onednn(a, b)
    return result if out is None else out.copy_(result)


def multiply(a: Tensor, b: Tensor, into: Tensor, adds: bool = False) -> None:
    """Products of matrices, `[n, M, K]` by `[n, K, N]`, added to what is in `[n, M, N]` or written over it."""
    if not _is_faster(a[0], b.shape[2]):
        torch.baddbmm(into, a, b, beta=int(adds), out=into)
        return
    for left, right, place in zip(a, b, into, strict=True):
        result = _by_onednn(left, right)
        place.add_(result) if adds else place.copy_(result)
