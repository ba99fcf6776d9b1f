"""The splits of a data set, where their images are, and the choice of the validation images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from capszoo.errors import DataError

from .decoding import Size
from .readers import Reader
from .seeding import seeded_generator

# Mean and standard deviation over so many images are those of all to a percent or so.
_STATISTICS_IMAGES = 2048
_IMAGES_AT_ONCE = 64


@dataclass(eq=False, repr=False)
class Split:
    """The training, validation or test images of a data set.

    Args:
        labels: Class indices, int64 `[N]`, or weights of the classes, float `[N, J]`, where an image may show several
            or none; on the same device as `images`.
        images: uint8 `[N, C, H, W]`, or None for a split that is read from disk while it is used.
        reader: Where the images of such a split come from.
        indices: int64 `[N]`, the place of each image in `reader`.
        mean: Subtracted from images in [0, 1], one number a channel or one for all.
        std: What is left is divided by this, one number a channel or one for all.
        parts: uint8 `[N, P, C, H, W]` beside `images` that are composed of P others: these, in the order of the P
            classes that their labels show.
    """

    labels: Tensor
    images: Tensor | None = None
    reader: Reader | None = None
    indices: Tensor | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    parts: Tensor | None = None
    _on_device: dict[torch.device, Split] = field(default_factory=dict, init=False)
    _padded: dict[bool, tuple[int, Tensor]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of {'x'.join(map(str, self.image_shape))})"

    @property
    def multi_label(self) -> bool:
        """Whether labels are weights of the classes."""
        return self.labels.ndim == 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        if self.images is None:
            assert self.reader is not None
            return self.reader.image_shape
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Split:
        """Return this split with its tensors on `device`; the copy is made once and kept."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if device == self.labels.device:
            return self
        if device not in self._on_device:
            images, parts = (None if some is None else some.to(device) for some in (self.images, self.parts))
            self._on_device[device] = Split(self.labels.to(device), images, self.reader, self.indices, parts=parts)
        self._on_device[device].mean, self._on_device[device].std = self.mean, self.std
        return self._on_device[device]

    def padded(self, margin: int, of_parts: bool = False) -> Tensor:
        """Return the images with `margin` zeros on each side, uint8 `[N, C, H + 2 margin, W + 2 margin]`.

        The result for the last `margin` above 0 is kept. That of parts has those of an image as its channels, P C.
        """
        assert self.images is not None
        images = self.parts.flatten(1, 2) if of_parts and self.parts is not None else self.images
        if margin == 0:
            return images.contiguous()
        if of_parts not in self._padded or self._padded[of_parts][0] != margin:
            self._padded[of_parts] = margin, F.pad(images, [margin] * 4)
        return self._padded[of_parts][1]


@dataclass
class DataSplits:
    """A data set.

    Args:
        name: The name it was asked for by.
        train: Training images, without those of `val`.
        val: Validation images, or None.
        test: Test images, for reporting only.
        class_names: Name of each class, in the order of the labels.
        num_classes: How many there are.
        in_chans: Channels of an image: 1 grey, 2 stereo, 3 colour.
        img_size: Height and width of an image.
    """

    name: str
    train: Split
    val: Split | None
    test: Split
    class_names: list[str]
    num_classes: int
    in_chans: int
    img_size: Size

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes or none; its label is then 0 or 1 for each, float32 `[J]`."""
        return self.train.multi_label

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training images by channel, of pixels in [0, 1].

        Of a set that is read while it is used, those of some thousand images. A channel of one value has 1 as its
        standard deviation.
        """
        train = self.train
        parts: Iterable[Tensor]
        if train.images is not None:
            parts = [train.images]
        else:
            reader, indices = train.reader, train.indices
            assert reader is not None and indices is not None
            some = torch.randperm(len(train), generator=seeded_generator(0))[:_STATISTICS_IMAGES].sort().values
            # Together they might not fit into the memory.
            parts = (reader.read(part.tolist()) for part in indices[some].split(_IMAGES_AT_ONCE))
        counts = torch.zeros(self.in_chans, 256, dtype=torch.int64, device="cpu")
        for images in parts:
            for count, channel in zip(counts, images.unbind(1), strict=True):
                count += torch.bincount(channel.flatten(), minlength=256).cpu()
        values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
        mean, std = [], []
        for count in counts:
            share = count.double() / count.sum()
            mean.append(float(share @ values))
            std.append(float((share @ (values - mean[-1]).square()).sqrt()) or 1.0)
        return tuple(mean), tuple(std)

    def normalize(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Have loaders of all splits give images less `mean`, divided by `std`.

        Args:
            mean: One number a channel, or one for all.
            std: Likewise, above 0.

        Raises:
            DataError: If their number or a value is not possible.
        """
        mean, std = (tuple(float(value) for value in values) for values in (mean, std))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self.in_chans):
                raise DataError(
                    f"{name} has {len(values)} numbers, images have {self.in_chans} channels: give 1 or {self.in_chans}"
                )
            if not all(math.isfinite(value) and (name == "mean" or value > 0) for value in values):
                wanted = "finite numbers" + (" above 0" if name == "std" else "")
                raise DataError(f"{name}={' '.join(map(str, values))} is out of range: give {wanted}")
        for split in (self.train, self.val, self.test):
            if split is not None:
                split.mean, split.std = mean, std


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose `count` images, each class in proportion (largest remainder), leaving one of each class at least.

    Args:
        labels: int64 `[N]`, or 0 and 1 `[N, J]`, see :func:`_stratified_by_sets`.
        count: How many; fewer are chosen if the classes have no more to spare.
        seed: Decides which.

    Returns:
        int64 `[count]`, ascending.
    """
    generator = seeded_generator(seed)
    if labels.ndim == 2:
        return _stratified_by_sets(labels, count, generator)
    present = torch.bincount(labels).double()
    spare = (present - 1).clamp(min=0)
    exact = present * count / len(labels)
    quota = exact.floor().minimum(spare)
    while quota.sum() < count and (quota < spare).any():
        quota[torch.where(quota < spare, exact - quota, -torch.inf).argmax()] += 1
    chosen = []
    for label, share in enumerate(quota.long().tolist()):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:share]])
    return torch.cat(chosen).sort().values


def _stratified_by_sets(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Choose `count` images that each show a set of classes, so that each class is there in proportion.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011): class by class, the one with the fewest images
    left first, each of its images goes to that part, chosen or kept, which lacks most images of the class. Images that
    show nothing come last, and make up the number.

    Args:
        labels: 0 and 1 `[N, J]`.
        count: How many; fewer are chosen if the classes have no more to spare.
        generator: Draws the order of the images.

    Returns:
        int64 `[count]`, ascending.
    """
    labels = torch.cat([labels > 0, (labels == 0).all(dim=1, keepdim=True)], dim=1)
    shown = [row.nonzero().flatten().tolist() for row in labels]
    images_of: list[list[int]] = [[] for _ in range(labels.shape[1])]
    for image in torch.randperm(len(labels), generator=generator).tolist():
        for label in shown[image]:
            images_of[label].append(image)
    left = list(map(len, images_of))
    lacking = [number * count / len(labels) for number in left]  # of each class, among the chosen ones
    kept_of = [0] * len(left)
    chosen: set[int] = set()
    kept: dict[int, None] = {}  # in the order in which they were placed

    def share_out(label: int) -> None:
        for image in images_of[label]:
            if image in chosen or image in kept:
                continue
            # What the other part lacks is the rest of the images that are left; the last of a class is never chosen.
            wanted = lacking[label] > left[label] - lacking[label] and len(chosen) < count
            if wanted and all(kept_of[other] + left[other] > 1 for other in shown[image]):
                chosen.add(image)
            else:
                kept[image] = None
            for other in shown[image]:
                left[other] -= 1
                lacking[other] -= image in chosen
                kept_of[other] += image in kept

    while any(left[:-1]):
        share_out(min((label for label, number in enumerate(left[:-1]) if number), key=left.__getitem__))
    share_out(-1)
    for image in reversed(kept):  # those of no class, and of the most frequent ones
        if len(chosen) < count and all(kept_of[other] > 1 for other in shown[image]):
            chosen.add(image)
            for other in shown[image]:
                kept_of[other] -= 1
    return torch.tensor(sorted(chosen), dtype=torch.int64)
