"""The files of the page: hand-written, and none from anywhere else."""

import importlib.resources

__all__ = ["CONTENT_TYPES", "POLICY", "page_files"]

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Neither inline code nor another host; browsers count the compilation of WebAssembly as code, too.
POLICY = (
    "default-src 'none'; script-src 'self'{scripts}; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
_SHARED = ("style.css", "icon.svg", "page.js", "panel.js", "couplings.js", "drawing.js", "digits.js")


def page_files(engine: str) -> dict[str, bytes]:
    """Files of the page by name.

    Args:
        engine: What computes: 'http' for the server, 'onnx' for the browser itself.
    """
    folder = importlib.resources.files("capszoo.explorer") / "page"
    files = {name: (folder / name).read_bytes() for name in (*_SHARED, f"{engine}.js")}
    policy = POLICY.format(scripts=" 'wasm-unsafe-eval'" if engine == "onnx" else "")
    html = (folder / "index.html").read_text(encoding="utf-8")
    files["index.html"] = html.replace("ENGINE", engine).replace("POLICY", policy).encode()
    return files
