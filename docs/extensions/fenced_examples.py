"""Docstrings fence their examples as Markdown does, which editors show; reStructuredText has a directive for them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # tests run without Sphinx
    from sphinx.application import Sphinx

_FENCE = re.compile(r"^(\s*)```(\w*)$")


def to_code_blocks(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Write the fenced blocks of a docstring's lines as code blocks, in place."""
    result: list[str] = []
    inside = False
    for line in lines:
        fence = _FENCE.match(line)
        if fence:
            inside = not inside
            result += [f"{fence[1]}.. code-block:: {fence[2] or 'text'}", ""] if inside else [""]
        else:
            result.append(f"    {line}" if inside and line else line)
    lines[:] = result


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", to_code_blocks, priority=400)  # napoleon has 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
