"""The page without a server: files for any web host, with the networks as ONNX graphs that run in the browser."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capszoo.errors import UsageError, WriteError
from capszoo.files import write_atomically

from .graphs import export_graphs
from .looking import Network
from .page_files import page_files

__all__ = ["write_static"]


def write_static(folder: str | Path, networks: Sequence[Network], runtime: Mapping[str, bytes]) -> list[Path]:
    """Write the page.

    Args:
        folder: Where to; made if it is not there. What an earlier export left is written over.
        networks: The networks, on the CPU.
        runtime: Files of ONNX Runtime Web, see :func:`capszoo.explorer.runtime_from_folder`.

    Returns:
        The files that were written, the page first.

    Raises:
        UsageError: If the folder holds something else, or a network cannot be exported.
        WriteError: If a file cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    try:
        for part in ("models", "onnxruntime"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"folder {str(folder)!r} cannot be made ({error.strerror}): give another --export") from None
    described: list[dict[str, Any]] = []
    for number, network in enumerate(networks):
        stem = f"{number + 1}-{re.sub(r'[^0-9A-Za-z_-]+', '-', network.name).strip('-')[-60:]}"
        described.append({**network.describe(), **export_graphs(network, folder / "models", stem)})
    files = {**page_files("onnx"), "models.json": json.dumps(described).encode()}
    files |= {f"onnxruntime/{name}": data for name, data in runtime.items()}
    for name, data in files.items():
        write_atomically(folder / name, lambda temporary, data=data: Path(temporary).write_bytes(data))  # type: ignore[misc]
    graphs = [folder / "models" / item[key] for item in described for key in ("look", "draw") if item[key]]
    return [folder / "index.html", *(folder / name for name in files if name != "index.html"), *graphs]


def check_folder(folder: Path) -> None:
    """Check that a page may be written to a folder.

    Raises:
        UsageError: If it is a file, or holds something else than a page.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / "models.json").is_file():
            raise UsageError(
                f"--export {str(folder)!r} holds other files: give a folder that is empty or not there yet"
            )
    elif folder.exists():
        raise UsageError(f"--export {str(folder)!r} is not a folder: give one that is empty or not there yet")
