"""The zoo's models by family: names, which begin alike in several, and keywords that make a network small."""

from typing import Any

import capszoo
from capszoo.models import CapsNet, CNNBaseline, DeepCaps, EfficientCapsNet, InvertedAttentionCapsNet, SelfRoutingNet
from capszoo.registry import family_of

CAPSNETS = [name for name in capszoo.list_models() if family_of(name) is CapsNet]

_SMALL_SIZES: dict[type, dict[str, Any]] = {
    CapsNet: dict(conv_dim=8),
    CNNBaseline: dict(conv_dim=8),
    DeepCaps: dict(conv_dim=6, num_types=2, class_dim=5),
    EfficientCapsNet: dict(conv_dims=[4, 5, 6]),
    InvertedAttentionCapsNet: dict(stem_dims=[6], stem_depths=[1], num_types=3, pose_size=2),
    SelfRoutingNet: dict(conv_dims=[4, 5, 6], num_blocks=1, num_types=3, caps_dim=4),
}


def small_sizes(name: str) -> dict[str, Any]:
    """Widths of a small network of the family of a name."""
    return dict(_SMALL_SIZES[family_of(name)])
