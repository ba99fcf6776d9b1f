"""Inverted dot-product attention routing (Tsai, Srivastava, Goh and Salakhutdinov 2020), one pass of it."""

from . import reference
from .ops import inverted_attention_routing, uniform_routing

__all__ = ["inverted_attention_routing", "reference", "uniform_routing"]
