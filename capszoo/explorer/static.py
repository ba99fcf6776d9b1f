"""The page without a server: files for any web host, with the networks as ONNX graphs that run in the browser."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capszoo.errors import UsageError, WriteError
from capszoo.files import write_atomically

from .graphs import check_exporter, export_graphs
from .looking import Network
from .page_files import page_files

__all__ = ["check_export", "write_static"]

# Files of networks, by the names that `export_graphs` gives them.
_GRAPH = re.compile(r"\d+-[0-9A-Za-z_-]*\.(look|draw)\.onnx")
_HALF_WRITTEN = re.compile(r"\..*\.tmp")  # by a process that was killed


def write_static(folder: str | Path, networks: Sequence[Network], runtime: Mapping[str, bytes]) -> list[Path]:
    """Write the page.

    Args:
        folder: Where to; made if it is not there. What an earlier export left is written over, and networks that are
            no longer on the page are deleted: the folder may be for anybody to read.
        networks: The networks, on the CPU.
        runtime: Files of ONNX Runtime Web, see :func:`capszoo.explorer.runtime_from_folder`.

    Returns:
        The files that were written, the page first.

    Raises:
        UsageError: If the folder holds something else, or a network cannot be exported.
        WriteError: If a file cannot be written.
    """
    folder = Path(folder)
    check_export(folder)
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
    for file in (folder / "models").iterdir():
        if _GRAPH.fullmatch(file.name) and file not in graphs:
            file.unlink()
    return [folder / "index.html", *(folder / name for name in files if name != "index.html"), *graphs]


def check_export(folder: Path) -> None:
    """Check that a page can be written to a folder, before the work for it.

    Raises:
        UsageError: If it is a file, or holds something else than a page or the beginnings of one; or if the exporter's
            packages are not installed.
    """
    check_exporter()
    if folder.is_dir():
        if not (folder / "models.json").is_file() and not all(map(_is_ours, folder.iterdir())):
            raise UsageError(
                f"--export {str(folder)!r} holds other files: give a folder that is empty or not there yet"
            )
    elif folder.exists():
        raise UsageError(f"--export {str(folder)!r} is not a folder: give one that is empty or not there yet")


def _is_ours(part: Path) -> bool:
    """Whether an export that was interrupted may have left this: `models.json` is written last."""
    if not part.is_dir():
        return part.name in page_files("onnx") or bool(_HALF_WRITTEN.fullmatch(part.name))
    if part.name == "models":
        return all(_GRAPH.fullmatch(file.name) or _HALF_WRITTEN.fullmatch(file.name) for file in part.iterdir())
    return part.name == "onnxruntime"
