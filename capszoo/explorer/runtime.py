"""The files of ONNX Runtime Web, which computes in the browser: from a folder, or from the npm registry."""

import base64
import hashlib
import io
import json
import os
import tarfile
import urllib.request
from pathlib import Path

from capszoo.errors import UsageError, first_line

__all__ = ["RUNTIME_VERSION", "runtime_from_folder", "runtime_from_registry"]

RUNTIME_VERSION = "1.30.0"
# sha512 of the package as the registry has it.
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
_LARGEST = 64 << 20
# Files of the package, and their names in the page: some hosts do not know that .mjs is JavaScript.
_FILES = {
    "dist/ort.wasm.bundle.min.mjs": "ort.js",
    "dist/ort-wasm-simd-threaded.wasm": "ort.wasm",
}
_LICENSE = b"""ONNX Runtime Web, https://github.com/microsoft/onnxruntime

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def runtime_from_folder(folder: str | Path) -> dict[str, bytes]:
    """Files of an unpacked npm package `onnxruntime-web`, by their names in the page.

    Raises:
        UsageError: If the folder does not hold the package.
    """
    folder = Path(folder)
    try:
        package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        if not isinstance(package, dict) or package.get("name") != "onnxruntime-web":
            raise ValueError("its package.json is of another package")
        return _with_license({name: (folder / path).read_bytes() for path, name in _FILES.items()})
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(
            f"--onnxruntime-web {str(folder)!r} is not the unpacked npm package onnxruntime-web ({reason}): run "
            f"`npm install onnxruntime-web@{RUNTIME_VERSION}` and give node_modules/onnxruntime-web"
        ) from None


def runtime_from_registry(registry: str | None = None) -> dict[str, bytes]:
    """Fetch the package from the npm registry, check its integrity, and take the files by their names in the page.

    Args:
        registry: Address of the registry; npm's own if None, or that of `npm_config_registry`, as npm takes it.

    Raises:
        UsageError: If it cannot be fetched, or is not what capszoo knows.
    """
    registry = registry or os.environ.get("npm_config_registry") or "https://registry.npmjs.org"
    address = f"{registry.rstrip('/')}/onnxruntime-web/-/onnxruntime-web-{RUNTIME_VERSION}.tgz"
    otherwise = "give --onnxruntime-web FOLDER of the unpacked package"
    if not address.startswith(("https://", "http://")):
        raise UsageError(f"npm_config_registry={registry!r} is not an address: mend it, or {otherwise}")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            data = answer.read(_LARGEST + 1)
    except OSError as error:
        raise UsageError(
            f"{address} cannot be fetched ({first_line(error)}): check the network, or {otherwise}"
        ) from None
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != INTEGRITY:
        raise UsageError(f"{address} is not the package that capszoo knows (its sha512 differs): {otherwise}")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as package:
        found = {}
        for path, name in _FILES.items():
            member = package.extractfile(f"package/{path}")
            assert member is not None  # the hash says so
            found[name] = member.read()
    return _with_license(found)


def _with_license(files: dict[str, bytes]) -> dict[str, bytes]:
    return {**files, "LICENSE.txt": _LICENSE}
