"""Model families; importing one registers its models with timm."""

from ._heads import list_heads
from .capsnet import CapsNet
from .capsnet_head import CapsNetHead
from .cnn_baseline import CNNBaseline
from .deepcaps import DeepCaps
from .efficient_capsnet import EfficientCapsNet
from .inverted_attention import InvertedAttentionCapsNet
from .matrix_capsnet import MatrixCapsNet
from .self_routing import SelfRoutingNet

__all__ = [
    "CNNBaseline",
    "CapsNet",
    "CapsNetHead",
    "DeepCaps",
    "EfficientCapsNet",
    "InvertedAttentionCapsNet",
    "MatrixCapsNet",
    "SelfRoutingNet",
    "list_heads",
]
