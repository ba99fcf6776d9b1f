"""Inverted dot-product attention routing of class capsules and of convolutional capsules, an operator of its own."""

from . import reference

__all__ = ["reference"]
