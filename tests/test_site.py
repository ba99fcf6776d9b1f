"""docs/ as a site: the reference is complete, and what is made of other files is in step with them."""

import ast
import importlib
import importlib.util
import re
import types
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = sorted(path for path in (DOCS / "tutorials").glob("*.md") if path.stem != "index")
PUBLIC = [
    "capszoo",
    *(
        f"capszoo.{name}"
        for name in (
            "contract", "data", "engine", "explore", "explorer", "export", "figures", "inspect", "kernels", "layers",
            "losses", "models", "policies", "prediction", "prune", "report", "testing",
        )
    ),
]  # fmt: skip


def script(path):
    """A module of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented():
    """Module and name of everything that a page of the reference describes."""
    for page in (DOCS / "api").glob("*.rst"):
        for module, names in re.findall(r"^\.\. api:: (\S+)\n\n((?:   \S.*\n)+)", page.read_text(), re.MULTILINE):
            yield from ((module, line.split(":")[0].strip()) for line in names.splitlines())


# The reference


def test_the_reference_has_names_that_exist_each_once():
    entries = list(documented())
    assert len(entries) > 150
    assert len({*entries}) == len(entries)
    assert [entry for entry in entries if not hasattr(importlib.import_module(entry[0]), entry[1])] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_has_every_public_name(name):
    module = importlib.import_module(name)
    described = {id(getattr(importlib.import_module(place), entry)) for place, entry in documented()}
    missing = [
        entry
        for entry in module.__all__
        if id(getattr(module, entry)) not in described
        and not isinstance(getattr(module, entry), types.ModuleType)
        and entry != "__version__"
    ]
    assert missing == [], f"name them under '.. api:: {name}' in docs/api"


# Tutorials


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_code_of_tutorials_parses_and_commands_are_shell_cells(page):
    cells = re.findall(r"^```\{code-cell\} python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(cells) >= 3
    for cell in cells:
        if not cell.startswith("%%sh\n"):
            ast.parse(cell)
    assert f"\n{page.stem}\n" in (DOCS / "tutorials" / "index.md").read_text()


def test_every_command_has_its_help():
    from capszoo.command_line.main import build_parser
    from capszoo.recipes import export

    def commands(parser):
        return next(action.choices for action in parser._actions if isinstance(action.choices, dict))

    wanted = {f'show_help("{name}")' for name in commands(build_parser())}
    wanted |= {f'show_help("export", "{name}")' for name in commands(export.build_parser())}
    assert set(re.findall(r"^show_help\(.+\)$", (DOCS / "api" / "commands.md").read_text(), re.M)) == wanted


def test_notebooks_are_those_of_the_tutorials():
    maker = script(DOCS / "make_notebooks.py")
    made = {path.stem: path.read_text() for path in (DOCS / "notebooks").glob("*.ipynb")}
    expected = {name: maker.notebook_of((DOCS / "tutorials" / f"{name}.md").read_text()) for name in maker.NAMES}
    assert made == expected, "run python docs/make_notebooks.py"


# Figures


def test_figures_are_those_that_the_script_draws():
    drawing = script(DOCS / "draw_routing.py")
    drawn = {path.name: path.read_text() for path in (DOCS / "figures").glob("*.svg")}
    assert drawn == {name: draw() for name, draw in drawing.FIGURES.items()}, "run python docs/draw_routing.py"


def test_the_figure_of_agreement_is_a_routing():
    import torch

    from capszoo.kernels import reference

    drawing = script(DOCS / "draw_routing.py")
    angles, lengths = torch.tensor(drawing._VOTES, dtype=torch.float64).unbind(-1)
    votes = lengths[..., None] * torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=-1)  # [J, I, D]
    # A capsule of one number, 1, has as its votes the matrices themselves.
    weight = votes.permute(1, 0, 2)[:, None]  # [I, K, J, D]
    x, bias = torch.ones(1, votes.shape[1], 1, dtype=torch.float64), torch.zeros(votes.shape[0], 2, dtype=torch.float64)
    for number, (_, capsules) in enumerate(drawing.route(votes.tolist(), 3), 1):
        expected = reference.dynamic_routing(x, weight, bias, num_iters=number)[0]
        torch.testing.assert_close(torch.tensor(capsules, dtype=torch.float64), expected)


# What the site's extensions do


def test_requests_of_other_hosts_are_found_and_links_are_not():
    requests = script(DOCS / "extensions" / "no_requests.py").requests_of
    assert (
        requests('<a href="https://arxiv.org">paper</a><img src="a.png"><link rel="canonical" href="https://x.org">')
        == []
    )
    for page in (
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/x.css">',
        '<img alt="" src="http://example.org/x.png">',
        "<style>@import 'https://example.org/x.css';</style>",
        '<p style="background: url(https://example.org/x.png)">',
    ):
        assert len(requests(page)) == 1, page


def test_links_out_of_the_docs_stay_in_the_site():
    links = script(DOCS / "extensions" / "repository_links.py")
    page = DOCS / "tutorials" / "predict.md"
    text = "[a](../../CONTRIBUTING.md#style) [b](../timm.md) [c](../../recipes/configs) [d](https://arxiv.org)"
    expected = "[a](../project/contributing.md#style) [b](../timm.md) `c` [d](https://arxiv.org)"
    assert links.within_site(text, page, page, DOCS) == expected
    own = DOCS / "project" / "contributing.md"
    written = links.within_site("[p](docs/pruning.md) ![q](recipes/x.png)", DOCS.parent / "CONTRIBUTING.md", own, DOCS)
    assert written == "[p](../pruning.md) ![q](../../recipes/x.png)"


def test_fenced_examples_of_docstrings_become_code_blocks():
    fences = script(DOCS / "extensions" / "fenced_examples.py")
    lines = ["Example:", "", "    ```python", "    f(x)", "", "    ```", "done"]
    fences.to_code_blocks(None, "function", "f", None, None, lines)
    assert lines == ["Example:", "", "    .. code-block:: python", "", "        f(x)", "", "", "done"]
