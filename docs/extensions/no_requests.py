"""A built site asks no other host for anything: its fonts, styles, scripts and pictures are its own."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tests run without Sphinx
    from sphinx.application import Sphinx

_REMOTE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
_IN_STYLES = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)
_LOADED = {"src", "srcset", "data", "poster"}
_RELATIONS_NOT_LOADED = {"canonical", "author", "license", "next", "prev", "search", "index"}


class _Requests(HTMLParser):
    """Addresses on other hosts that a page would load by itself; links that a reader follows are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        loaded = [given[name] for name in _LOADED & given.keys()]
        if tag == "link" and not set(given.get("rel", "").lower().split()) & _RELATIONS_NOT_LOADED:
            loaded.append(given.get("href", ""))
        if tag in ("image", "use"):  # of SVG
            loaded += [given.get("href", ""), given.get("xlink:href", "")]
        self.found += [address for address in loaded if _REMOTE.match(address)]
        self.found += _IN_STYLES.findall(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.found += _IN_STYLES.findall(data)


def requests_of(page: str) -> list[str]:
    """Addresses on other hosts that a page of HTML loads."""
    parser = _Requests()
    parser.feed(page)
    return parser.found


def requests_below(folder: Path) -> dict[str, list[str]]:
    """Addresses on other hosts that the pages and style sheets in a folder load, by file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".html":
            addresses = requests_of(path.read_text(encoding="utf-8"))
        elif path.suffix == ".css":
            addresses = _IN_STYLES.findall(path.read_text(encoding="utf-8"))
        else:
            continue
        if addresses:
            found[str(path.relative_to(folder))] = addresses
    return found


def _check(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        found = requests_below(Path(app.outdir))
        if found:
            from sphinx.errors import ExtensionError

            page, addresses = next(iter(found.items()))
            raise ExtensionError(f"{len(found)} built pages load from elsewhere, {page} from {addresses[0]}: bundle it")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
