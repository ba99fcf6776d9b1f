"""The parts that capsule networks are made of."""

from .backbone import Backbone, StridedStem
from .class_caps import ClassCaps, DynamicRouting, create_routing, list_routings
from .config import set_fourier_conv, set_fused_routing, use_fourier_conv, use_fused_routing
from .conv_caps import capsule_patches, conv_caps_size
from .decoder import Decoder
from .deep_caps import ConvCaps, ConvDynamicRouting, DeconvDecoder
from .depthwise import DepthwiseConv2d
from .functional import (
    capsule_lengths,
    dynamic_routing,
    em_routing,
    inverted_attention_routing,
    squash,
    vb_routing,
)
from .inverted_attention import InvertedAttentionCaps, InvertedAttentionConvCaps, MatrixPrimaryCaps
from .large_conv import LargeConv2d
from .matrix_caps import (
    ClassMatrixCaps,
    ConvMatrixCaps,
    PosePrimaryCaps,
    join_matrix_capsules,
    split_matrix_capsules,
)
from .primary_caps import PrimaryCaps
from .scaled_conv import ScaledConv2d, fan_in_scale, fold_scales, unfold_scales
from .self_attention import SelfAttentionRouting, exponential_squash, self_attention_routing
from .self_routing import (
    ConvSelfRouting,
    PoseCaps,
    SelfRouting,
    drop_capsules,
    join_capsules,
    self_routing_scores,
    split_capsules,
)

__all__ = [
    "Backbone",
    "ClassCaps",
    "ClassMatrixCaps",
    "ConvCaps",
    "ConvDynamicRouting",
    "ConvMatrixCaps",
    "ConvSelfRouting",
    "Decoder",
    "DeconvDecoder",
    "DepthwiseConv2d",
    "DynamicRouting",
    "InvertedAttentionCaps",
    "InvertedAttentionConvCaps",
    "LargeConv2d",
    "MatrixPrimaryCaps",
    "PoseCaps",
    "PosePrimaryCaps",
    "PrimaryCaps",
    "ScaledConv2d",
    "SelfAttentionRouting",
    "SelfRouting",
    "StridedStem",
    "capsule_lengths",
    "capsule_patches",
    "conv_caps_size",
    "create_routing",
    "drop_capsules",
    "dynamic_routing",
    "em_routing",
    "exponential_squash",
    "fan_in_scale",
    "fold_scales",
    "inverted_attention_routing",
    "join_capsules",
    "join_matrix_capsules",
    "list_routings",
    "self_attention_routing",
    "self_routing_scores",
    "set_fourier_conv",
    "set_fused_routing",
    "split_capsules",
    "split_matrix_capsules",
    "squash",
    "unfold_scales",
    "use_fourier_conv",
    "use_fused_routing",
    "vb_routing",
]
