"""Model families; importing one registers its models with timm."""

from .capsnet import CapsNet
from .cnn_baseline import CNNBaseline
from .deepcaps import DeepCaps
from .efficient_capsnet import EfficientCapsNet
from .inverted_attention import InvertedAttentionCapsNet
from .self_routing import SelfRoutingNet

__all__ = ["CNNBaseline", "CapsNet", "DeepCaps", "EfficientCapsNet", "InvertedAttentionCapsNet", "SelfRoutingNet"]
