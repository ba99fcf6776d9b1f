"""Model families; importing one registers its models with timm."""

from .capsnet import CapsNet
from .cnn_baseline import CNNBaseline

__all__ = ["CNNBaseline", "CapsNet"]
