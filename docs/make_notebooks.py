"""Write the tutorials that are most worth playing with as notebooks, without outputs: `python docs/make_notebooks.py`.

Pages and notebooks are in step: tests/test_site.py compares them.
"""

import json
import re
from pathlib import Path

_DOCS = Path(__file__).resolve().parent
NAMES = ("first_steps", "own_network", "see_inside")
_HEADER = re.compile(r"\A---\n.*?^---\n", re.MULTILINE | re.DOTALL)
_CELL = re.compile(r"^```\{code-cell\} python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_PAGE_BESIDE = re.compile(r"\]\((\w+\.md)")


def _cell(kind: str, number: int, text: str) -> dict[str, object]:
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | {"execution_count": None, "outputs": []} if kind == "code" else cell


def notebook_of(page: str) -> str:
    """The notebook, as JSON, of a tutorial's text; links lead from docs/notebooks to where they led."""
    text = _PAGE_BESIDE.sub(r"](../tutorials/\1", _HEADER.sub("", page))
    cells: list[dict[str, object]] = []
    for number, part in enumerate(_CELL.split(text)):  # prose and code by turns
        if part.strip():
            cells.append(_cell("code" if number % 2 else "markdown", len(cells), part.strip()))
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": python, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    folder = _DOCS / "notebooks"
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        page = (_DOCS / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
        (folder / f"{name}.ipynb").write_text(notebook_of(page), encoding="utf-8")


if __name__ == "__main__":
    main()
