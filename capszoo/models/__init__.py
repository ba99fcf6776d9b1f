"""Model families; importing one registers its models with timm."""
from .capsnet import CapsNet

__all__ = ["CapsNet"]
