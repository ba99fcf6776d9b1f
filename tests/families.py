"""What tests ask of a family: the names of its models, and the keywords of small ones."""

from typing import Any

from torch import nn

import capszoo
from capszoo.models import (
    CapsNet,
    CapsNetHead,
    CNNBaseline,
    DeepCaps,
    EfficientCapsNet,
    InvertedAttentionCapsNet,
    MatrixCapsNet,
    SelfRoutingNet,
)
from capszoo.registry import family_of

_SIZES = {
    CapsNet: {"conv_dim": 8},
    CapsNetHead: {"backbone": "stem", "backbone_level": 0, "num_types": 2, "caps_dim": 4, "class_dim": 4},
    CNNBaseline: {"conv_dim": 8},
    DeepCaps: {"conv_dim": 6, "num_types": 2, "class_dim": 5},
    EfficientCapsNet: {"conv_dims": [4, 5, 6]},
    InvertedAttentionCapsNet: {"stem_dims": [4, 6], "stem_depths": [1, 1], "num_types": 2, "pose_size": 3},
    MatrixCapsNet: {"conv_dim": 4, "num_types": [2, 2, 2], "pose_size": 2},
    SelfRoutingNet: {"conv_dims": [4, 5, 6], "num_blocks": 1, "num_types": 3, "caps_dim": 4},
}


def models_of(family: type[nn.Module]) -> list[str]:
    return [name for name in capszoo.list_models() if family_of(name) is family]


def sizes_of(name: str) -> dict[str, Any]:
    """Keywords that make a model small; the size of its images is not among them."""
    sizes = _SIZES[family_of(name)]
    return {**sizes, "stem_dims": [4]} if name == "capsnet_conv_ia" else sizes


CAPSNETS = models_of(CapsNet)
