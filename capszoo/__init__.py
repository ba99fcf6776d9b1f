"""capszoo: capsule networks for timm, with fused dynamic routing.

    import capszoo

    model = capszoo.create_model("capsnet_ws", num_classes=10)

Importing capszoo also registers its models with timm, so that `timm.create_model("capsnet_ws")` works.
"""

from . import _moved, inspect
from ._version import __version__
from .costs import ModelInfo, model_info
from .layers import set_fourier_conv, set_fused_routing
from .prediction import Prediction, predict
from .registry import create_model, is_model, list_models, list_pretrained, load_model, save_model

_moved.install()

__all__ = [
    "ModelInfo",
    "Prediction",
    "__version__",
    "create_model",
    "inspect",
    "is_model",
    "list_models",
    "list_pretrained",
    "load_model",
    "model_info",
    "predict",
    "save_model",
    "set_fourier_conv",
    "set_fused_routing",
]
