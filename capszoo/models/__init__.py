"""Model families; importing one registers its models with timm."""

from .capsnet import CapsNet
from .cnn_baseline import CNNBaseline
from .efficient_capsnet import EfficientCapsNet
from .inverted_attention import InvertedAttentionCapsNet
from .matrix_capsnet import MatrixCapsNet

__all__ = ["CNNBaseline", "CapsNet", "EfficientCapsNet", "InvertedAttentionCapsNet", "MatrixCapsNet"]
