"""The parts that capsule networks are made of."""

from .class_caps import ClassCaps, DynamicRouting, create_routing, list_routings
from .config import set_fourier_conv, set_fused_routing, use_fourier_conv, use_fused_routing
from .decoder import Decoder
from .functional import capsule_lengths, dynamic_routing, em_routing, squash, vb_routing
from .matrix_caps import ClassMatrixCaps, ConvMatrixCaps, MatrixPrimaryCaps, join_capsules, split_capsules
from .primary_caps import PrimaryCaps
from .scaled_conv import ScaledConv2d, fan_in_scale, fold_scales, unfold_scales
from .self_attention import SelfAttentionRouting, exponential_squash, self_attention_routing

__all__ = [
    "ClassCaps",
    "ClassMatrixCaps",
    "ConvMatrixCaps",
    "Decoder",
    "DynamicRouting",
    "MatrixPrimaryCaps",
    "PrimaryCaps",
    "ScaledConv2d",
    "SelfAttentionRouting",
    "capsule_lengths",
    "create_routing",
    "dynamic_routing",
    "em_routing",
    "exponential_squash",
    "fan_in_scale",
    "fold_scales",
    "join_capsules",
    "list_routings",
    "self_attention_routing",
    "set_fourier_conv",
    "set_fused_routing",
    "split_capsules",
    "squash",
    "unfold_scales",
    "use_fourier_conv",
    "use_fused_routing",
    "vb_routing",
]
