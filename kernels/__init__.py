"""The operators of capsule networks: `squash` and routings, fused and recomputing, on any device.

`reference` holds the same functions in plain PyTorch, to read and to compare with. Importing this package registers the
operators `torch.ops.capszoo.*`; files saved by torch.export or torch.jit need that before they are
loaded, unless `capszoo.set_fused_routing(False)` kept the operators out of them.
"""

from . import reference
from .couplings import routing_couplings
from .gaussian_routing import em_couplings, em_routing, vb_couplings, vb_routing
from .inverted_attention import inverted_attention_couplings, inverted_attention_routing
from .ops import dynamic_routing, squash
from .self_attention import self_attention_couplings, self_attention_routing
from .weighted_votes import weighted_votes

__all__ = [
    "dynamic_routing",
    "em_couplings",
    "em_routing",
    "inverted_attention_couplings",
    "inverted_attention_routing",
    "reference",
    "routing_couplings",
    "self_attention_couplings",
    "self_attention_routing",
    "squash",
    "vb_couplings",
    "vb_routing",
    "weighted_votes",
]
