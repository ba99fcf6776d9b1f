"""Reconstruction decoder: three fully connected layers from a class capsule to an image."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """Draw the image that a class capsule stands for.

    Two inputs are known. The original takes all class capsules with all but one set to zero; the small one of
    FasTrCaps (section III) takes the chosen capsule alone, since connections from zeros carry nothing.

    Args:
        num_classes: J, the number of class capsules.
        class_dim: D, their dimension.
        image_shape: (C, H, W) of the images to draw.
        hidden_dims: Widths of the two hidden layers.
        small: Take the chosen capsule alone.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        num_classes: int,
        class_dim: int,
        image_shape: tuple[int, int, int],
        hidden_dims: tuple[int, int] = (512, 1024),
        small: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        chans, height, width = image_shape
        self.image_shape = (chans, height, width)
        self.small = small
        self.fc1 = nn.Linear(class_dim if small else num_classes * class_dim, hidden_dims[0], **dd)
        self.act1 = nn.ReLU()
        self.fc2 = nn.Linear(hidden_dims[0], hidden_dims[1], **dd)
        self.act2 = nn.ReLU()
        self.fc3 = nn.Linear(hidden_dims[1], chans * height * width, **dd)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Draw images from class capsules.

        Args:
            x: Class capsules ``[B, J, D]``.
            target: Class whose capsule is drawn, ``[B]``, int64.

        Returns:
            Images ``[B, C, H, W]`` with values in [0, 1].
        """
        index = target[:, None, None].expand(-1, 1, x.shape[2])
        chosen = x.gather(1, index)
        if not self.small:
            chosen = torch.zeros_like(x).scatter(1, index, chosen)
        x = self.act1(self.fc1(chosen.flatten(1)))
        x = self.fc3(self.act2(self.fc2(x)))
        return x.sigmoid().unflatten(1, self.image_shape)
