"""What comes before the capsules of Tsai et al. 2020 (arXiv 2002.04764): one convolution, or a residual network."""

from typing import Any

from timm.models.resnet import BasicBlock
from torch import Tensor, nn

__all__ = ["ConvStem", "ResNetStem", "create_stem"]

BACKBONES = ("resnet", "conv")


class ConvStem(nn.Module):
    """The paper's simple backbone: one convolution of stride 2 with bias, and ReLU."""

    def __init__(self, in_chans: int, out_chans: int, **dd: Any):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride=2, padding=1, **dd)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class ResNetStem(nn.Module):
    """The paper's ResNet backbone: a convolution and stages of basic blocks; all stages but the first halve the map."""

    def __init__(self, in_chans: int, dims: tuple[int, ...], depths: tuple[int, ...], **dd: Any):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dims[0], 3, padding=1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dims[0], **dd)
        self.act = nn.ReLU(inplace=True)
        blocks: list[nn.Module] = []
        channels = dims[0]
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage and block == 0 else 1
                shortcut = None
                if stride > 1 or channels != dim:
                    conv = nn.Conv2d(channels, dim, 1, stride=stride, bias=False, **dd)
                    shortcut = nn.Sequential(conv, nn.BatchNorm2d(dim, **dd))
                blocks.append(BasicBlock(channels, dim, stride, shortcut, **dd))
                channels = dim
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.act(self.norm(self.conv(x))))


def create_stem(
    name: str, in_chans: int, dims: tuple[int, ...], depths: tuple[int, ...], **dd: Any
) -> ConvStem | ResNetStem:
    """Make a stem.

    Args:
        name: 'conv' or 'resnet'.
        in_chans: Channels of the images.
        dims: Filters of the convolution, one number, or of each stage.
        depths: Blocks of each stage.
        **dd: `device` and `dtype` of the parameters.

    Raises:
        ValueError: If the name is unknown or the numbers do not fit it.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}. Known: {', '.join(BACKBONES)}")
    if name == "conv" and (len(dims) != 1 or min(dims) < 1):
        raise ValueError(f"stem_dims={dims} is not possible: backbone='conv' takes one number of filters of 1 or more")
    if name == "resnet" and (not dims or len(dims) != len(depths) or min(*dims, *depths) < 1):
        raise ValueError(
            f"stem_dims={dims} and stem_depths={depths} are not possible: give a number of filters and of blocks, "
            f"each 1 or more, for each stage"
        )
    return ConvStem(in_chans, dims[0], **dd) if name == "conv" else ResNetStem(in_chans, dims, depths, **dd)
