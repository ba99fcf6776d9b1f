"""One page to look into capsule networks by hand: draw an image, see what its capsules say, change their numbers.

:mod:`.looking` computes what the page shows, without any of HTTP; :mod:`.server` serves the page on this machine, and
:mod:`.static` writes it with networks as ONNX files, which run in the browser.
"""

from .looking import Network
from .runtime import RUNTIME_VERSION, runtime_from_folder, runtime_from_registry
from .server import ExplorerServer
from .static import write_static

__all__ = [
    "RUNTIME_VERSION",
    "ExplorerServer",
    "Network",
    "runtime_from_folder",
    "runtime_from_registry",
    "write_static",
]
