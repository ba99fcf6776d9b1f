"""Links of the pages out of docs/, which lead somewhere on GitHub, lead somewhere in the site, too.

`../CONTRIBUTING.md` and `../CHANGELOG.md` are pages of the site. A folder of the repository has no page: its link
becomes its name. Files are downloads, which is what MyST makes of them.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

_PAGES = {"CONTRIBUTING.md": "project/contributing.md", "CHANGELOG.md": "project/changelog.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def within_site(text: str, page: Path, docs: Path) -> str:
    """Rewrite the links of a page (a path in the folder `docs`) so that they stay in the site."""

    def rewrite(match: re.Match[str]) -> str:
        title, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (page.parent / target).resolve()
        if path.is_dir():
            return title if title.startswith("`") else f"`{title}`"
        if path.parent == docs.parent and path.name in _PAGES:
            ups = "../" * len(page.parent.relative_to(docs).parts)
            return f"[{title}]({ups}{_PAGES[path.name]}{anchor})"
        return match[0]

    return _LINK.sub(rewrite, text)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md":
        source[0] = within_site(source[0], page, Path(app.srcdir))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
