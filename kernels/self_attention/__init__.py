"""Self-attention routing (Mazzia, Salvetti and Chiaberge 2021): every vote is weighed once, and nothing is iterated."""

from . import reference
from .ops import self_attention_routing

__all__ = ["reference", "self_attention_routing"]
