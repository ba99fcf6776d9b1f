"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of batches, as timm's `Mixup` mixes them.

Image i of a batch of B is mixed with image B - 1 - i. What an epoch needs is drawn at once, from (seed, epoch), where
timm draws batch by batch from numpy's global generator: any batch can be made again, and a process that has a part of a
batch mixes it as the whole would be.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import Augmentation
from .batch_transforms import Places, inside_boxes
from .seeding import seeded_numpy

__all__ = ["Mixing"]

_MIXING = 8  # the key of what is drawn, beside (seed, epoch)


class Mixing:
    """How the images of one epoch are mixed.

    Args:
        augmentation: The options.
        size: Height and width of the images.
        count: Images of the epoch.
        batch_size: Images in a batch; the last one holds the rest.
        num_classes: J.
        seed: Together with `epoch` decides what is drawn.
        epoch: The epoch, from 0.
        device: Where the images are.

    Attributes:
        partners: The place in the epoch of the image that each is mixed with, int64 `[N]`, on the CPU.
        shares: The share of each image in its mixed form, float32 `[N]`.
        boxes: What is pasted from the partner `[N, 4]` (top, bottom, left, right); of images that are blended nothing.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        size: tuple[int, int],
        count: int,
        batch_size: int,
        num_classes: int,
        seed: int,
        epoch: int,
        device: torch.device,
    ):
        self.num_classes, self.size = num_classes, size
        off = augmentation.mixup_off_epoch
        self.enabled = not (off and epoch >= off)
        places = torch.arange(count)
        begins = places // batch_size * batch_size
        sizes = (count - begins).clamp(max=batch_size)
        self.partners = 2 * begins + sizes - 1 - places
        if not self.enabled:
            return
        shares, boxes = _draw(augmentation, size, count, seeded_numpy(seed, epoch, _MIXING))
        # All images of a batch, or both of a pair, have the draw of the first of them.
        drawn = {"batch": begins, "pair": places.minimum(self.partners), "elem": places}[augmentation.mixup_mode]
        self.shares = torch.from_numpy(shares)[drawn].float().to(device)
        self.boxes = torch.from_numpy(boxes)[drawn].to(device)

    def images(self, images: Tensor, partners: Tensor, places: Places) -> Tensor:
        """Mix images ``[B, C, H, W]`` with their partners, those at these places of the epoch."""
        if not self.enabled:
            return images
        boxes, shares = self.boxes[places], self.shares[places]
        blended = (boxes[:, 1] == boxes[:, 0])[:, None, None]
        own = torch.where(blended, shares[:, None, None], (~inside_boxes(boxes, self.size)).float())
        return torch.lerp(partners, images, own[:, None].to(images.dtype))

    def targets(self, labels: Tensor, places: Places) -> Tensor:
        """The weights of the classes ``[B, J]`` of mixed images, of the labels of the epoch in its order."""
        own, partners = (self._weights(labels[rows]) for rows in (places, self.partners[places].to(labels.device)))
        return torch.lerp(partners, own, self.shares[places][:, None]) if self.enabled else own

    def _weights(self, labels: Tensor) -> Tensor:
        return labels if labels.ndim == 2 else F.one_hot(labels, self.num_classes).float()


def _draw(
    augmentation: Augmentation, size: tuple[int, int], count: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the shares `[N]` of images and the boxes `[N, 4]` pasted into them, as timm's `Mixup` does."""
    height, width = size
    # A range of sides takes the place of alpha, which then decides nothing but whether to mix.
    alphas = augmentation.mixup, 1.0 if augmentation.cutmix_minmax else augmentation.cutmix
    mixup, cutmix = (random.beta(alpha, alpha, count) if alpha else np.ones(count) for alpha in alphas)
    cuts = random.rand(count) < (augmentation.mixup_switch_prob if all(alphas) else float(alphas[1] > 0))
    shares = np.where(random.rand(count) < augmentation.mixup_prob, np.where(cuts, cutmix, mixup), 1.0)
    cuts &= shares != 1.0
    if augmentation.cutmix_minmax:
        least, most = augmentation.cutmix_minmax
        high, wide = (random.randint(int(side * least), int(side * most), count) for side in size)
        top, left = (random.randint(0, side - box + 1) for side, box in ((height, high), (width, wide)))
        boxes = np.stack([top, top + high, left, left + wide], axis=1)
    else:
        part = np.sqrt(1 - shares)
        sides = [(side, (side * part).astype(np.int64), random.randint(0, side, count)) for side in size]
        edges = [(centre - box // 2, centre + (box + 1) // 2) for _, box, centre in sides]
        boxes = np.stack([edge.clip(0, side) for side, pair in zip(size, edges, strict=True) for edge in pair], axis=1)
    boxes = np.where(cuts[:, None], boxes, 0)
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    return np.where(cuts, 1 - area / (height * width), shares), boxes
