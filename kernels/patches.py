"""Patches of maps of capsules, for every operator on convolutional capsules."""

from torch import Tensor


def capsule_patches(x: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """What an unpadded kernel covers at each of its positions: whole capsules. A view, nothing is copied.

    Args:
        x: A map of capsules `[B, I, K..., H, W]`; K... are the dimensions of a capsule: one of a vector, two of a
            matrix, none of an activation.
        kernel_size: k, the side of the kernel.
        stride: Its stride.

    Returns:
        `[B, I, K..., H', W', k, k]`, where `[..., h, w, p, q]` is the input at `[..., h * stride + p, w * stride + q]`.
    """
    return x.unfold(-2, kernel_size, stride).unfold(-2, kernel_size, stride)
