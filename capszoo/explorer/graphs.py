"""A network as ONNX files: one graph from pixels to what the page shows, one of the decoder."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capszoo.errors import UsageError, first_line
from capszoo.files import write_atomically
from capszoo.layers import set_fourier_conv, set_fused_routing

from .looking import OUTPUTS, Looking, Network

__all__ = ["check_exporter", "export_graphs"]


def export_graphs(network: Network, folder: Path, stem: str) -> dict[str, Any]:
    """Write the graphs of a network.

    `STEM.look.onnx` maps `pixels` [1, C, H, W] in [0, 1] to `scores`, `capsules`, `shares` and `presence`, as
    :class:`.Looking` has them; `STEM.draw.onnx` maps `capsules` [1, J, D] and `target` [1] to `drawn` [1, C, H, W].

    Args:
        network: The network, on the CPU.
        folder: Where the files go.
        stem: What their names begin with.

    Returns:
        What the page must know of them: `look` and `draw`, names of files, the second None without a decoder, and
        `centers`, see :meth:`.Network.describe`: none where no operators of ONNX have this routing's couplings.

    Raises:
        UsageError: If the exporter's packages are not installed, or cannot express the network.
    """
    check_exporter()
    centers = network.describe()["centers"]
    pixels = torch.zeros(1, *network.shape)
    files: dict[str, Any] = {"look": f"{stem}.look.onnx", "draw": None}
    looking, names = network.looking, OUTPUTS[: 4 if centers else 2 if network.dims else 1]
    try:
        _write(looking, (pixels,), ["pixels"], list(names), folder / files["look"])
    except UsageError:
        if not centers:
            raise
        centers, looking = [], Looking(network.model, parts=False)
        _write(looking, (pixels,), ["pixels"], list(OUTPUTS[:2]), folder / files["look"])
    if network.drawing is not None:
        files["draw"] = f"{stem}.draw.onnx"
        capsules, target = torch.zeros(1, len(network.classes), network.dims), torch.zeros(1, dtype=torch.int64)
        _write(network.drawing, (capsules, target), ["capsules", "target"], ["drawn"], folder / files["draw"])
    return {**files, "centers": centers}


def check_exporter() -> None:
    """Check that the exporter's packages are installed.

    Raises:
        UsageError: If one is not.
    """
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            raise UsageError("graphs need ONNX: pip install onnx onnxscript") from None


def _write(module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], outputs: list[str], path: Path) -> None:
    # Large graphs come with a second file unless told not to; its name is in the first.
    with tempfile.TemporaryDirectory() as folder, _quiet(), torch.no_grad():
        made = Path(folder) / "graph.onnx"
        try:
            with set_fused_routing(False), set_fourier_conv(False):
                torch.onnx.export(
                    module,
                    inputs,
                    str(made),
                    input_names=names,
                    output_names=outputs,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
        except RuntimeError as error:
            raise UsageError(f"ONNX cannot express this network ({first_line(error)}): give other weights") from error
        write_atomically(path, lambda temporary: temporary.write_bytes(made.read_bytes()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of each other, and of operators that no graph here has."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
