"""What operators refuse before they compute. Compiled by torch.jit.script as well."""

from torch import Tensor


def check_capsules(x: Tensor, weight: Tensor) -> None:
    """Capsules `[B, I, K]` and vote matrices `[T, K, J, D]`.

    Raises:
        ValueError: If dimensions do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, I, K], but it has {x.dim()} dimensions: flatten its capsules")
    if weight.dim() != 4:
        raise ValueError(f"weight must have shape [T, K, J, D], but it has {weight.dim()} dimensions: reshape it")
    if weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"x has capsules of K={x.shape[2]} numbers, weight takes K={weight.shape[1]}: "
            "make x.shape[2] and weight.shape[1] equal"
        )


def check_types(x: Tensor, weight: Tensor, added: Tensor, name: str) -> None:
    """Floating-point tensors on one device; the third is named in messages.

    Raises:
        ValueError: If they are not.
    """
    if not (x.is_floating_point() and weight.is_floating_point() and added.is_floating_point()):
        raise ValueError(
            f"routing needs floating-point tensors, but x is {x.dtype}, weight {weight.dtype}, {name} {added.dtype}"
        )
    if x.device != weight.device or x.device != added.device:
        raise ValueError(
            f"x is on {x.device}, weight on {weight.device}, {name} on {added.device}: move them to one device"
        )
