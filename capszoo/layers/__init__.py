"""The parts that capsule networks are made of."""

from .class_caps import ClassCaps, DynamicRouting, create_routing, list_routings
from .config import set_fused_routing, use_fused_routing
from .decoder import Decoder
from .functional import capsule_lengths, dynamic_routing, squash
from .primary_caps import PrimaryCaps

__all__ = [
    "ClassCaps",
    "Decoder",
    "DynamicRouting",
    "PrimaryCaps",
    "capsule_lengths",
    "create_routing",
    "dynamic_routing",
    "list_routings",
    "set_fused_routing",
    "squash",
    "use_fused_routing",
]
