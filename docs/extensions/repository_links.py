"""Links of the pages out of docs/, which lead somewhere on GitHub, lead somewhere in the site, too.

CONTRIBUTING.md and CHANGELOG.md of the repository become pages of the site: `project/contributing` and
`project/changelog`, whose own files are empty but for a comment. A folder of the repository has no page, so its link
becomes its name. Other files become downloads, which is what MyST makes of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tests run without Sphinx
    from sphinx.application import Sphinx

_PAGES = {"CONTRIBUTING.md": "project/contributing.md", "CHANGELOG.md": "project/changelog.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def within_site(text: str, written_in: Path, page: Path, docs: Path) -> str:
    """Rewrite links so that they stay in the site.

    Args:
        text: Markdown.
        written_in: The file that it is from, which its links are relative to.
        page: The file in `docs` that it is the page of.
        docs: The folder of the site's sources, below the root of the repository.
    """

    def rewrite(match: re.Match[str]) -> str:
        image, title, target, anchor = match[1], match[2], match[3], match[4] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (written_in.parent / target).resolve()
        if path.is_dir():
            return title if title.startswith("`") else f"`{title}`"
        if path.parent == docs.parent and path.name in _PAGES:
            path = docs / _PAGES[path.name]
        return f"{image}[{title}]({Path(os.path.relpath(path, page.parent)).as_posix()}{anchor})"

    return _LINK.sub(rewrite, text)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    docs, page = Path(app.srcdir), Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    written_in = page
    for name, own in _PAGES.items():
        if page == docs / own:
            written_in = docs.parent / name
            source[0] = written_in.read_text(encoding="utf-8")
            app.env.note_dependency(str(written_in))
    source[0] = within_site(source[0], written_in, page, docs)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
