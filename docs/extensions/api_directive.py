"""The directive `api`: a table of some names of a module, then what their docstrings say.

    .. api:: capszoo.explore

       Space
       OBJECTIVES: What a search may be for.

A constant has no docstring, hence the text, which also stands for that of a class with very many fields.
"""

import importlib
import inspect
from collections.abc import Iterable, Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def _described(name: str, value: object) -> list[str]:
    if not inspect.isclass(value):
        return [f".. autofunction:: {name}", ""]
    if issubclass(value, BaseException):
        return [f".. autoexception:: {name}", "   :show-inheritance:", ""]
    return [f".. autoclass:: {name}", ""]


def entries_of(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names, and their texts or "", of the lines of a directive."""
    for line in lines:
        if line.strip():
            name, _, text = line.strip().partition(": ")
            yield name, text


class Api(SphinxDirective):
    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        module = importlib.import_module(self.arguments[0])
        table, described = [".. autosummary::", "   :nosignatures:", ""], []
        for name, text in entries_of(self.content):
            value = getattr(module, name)
            if text and inspect.isclass(value):
                described += [f".. py:class:: {name}", "", f"   {text}", ""]
            elif text:
                described += [f".. py:data:: {name}", f"   :value: {value!r}", "", f"   {text}", ""]
            else:
                table.append(f"   {name}")
                described += _described(name, value)
        lines = [f".. currentmodule:: {module.__name__}", "", *(table if len(table) > 3 else ()), "", *described]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
