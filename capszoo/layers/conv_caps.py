"""What convolutional capsule layers share: the patches of a map of capsules, and the size of the map above."""

from capszoo.kernels.patches import capsule_patches

__all__ = ["capsule_patches", "conv_caps_size"]


def conv_caps_size(size: tuple[int, int], kernel_size: int, stride: int = 1) -> tuple[int, int]:
    """Height and width of the map that an unpadded kernel makes of one of this size; 0 or less where it is too small.

    Args:
        size: Height and width of the map.
        kernel_size: k, the side of the kernel.
        stride: Its stride.
    """
    height, width = ((side - kernel_size) // stride + 1 for side in size)
    return height, width
