"""The operators of capsule networks, fused and recomputing, on any device.

`squash` and `dynamic_routing`; `em_routing` and `vb_routing` of matrix capsules, in `gaussian_routing`.

`reference` holds the same functions in plain PyTorch, to read and to compare with. Importing this package registers the
operators `torch.ops.capszoo.*`; files saved by torch.export or torch.jit need that before they are
loaded, unless `capszoo.set_fused_routing(False)` kept the operators out of them.
"""

from . import reference
from .gaussian_routing import em_routing, vb_routing
from .ops import dynamic_routing, squash

__all__ = ["dynamic_routing", "em_routing", "reference", "squash", "vb_routing"]
