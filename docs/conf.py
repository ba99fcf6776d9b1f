"""The documentation site. Build it from the root of the repository, with what `pip install -e ".[docs]"` installs:

    python -m sphinx -W --keep-going -j auto docs build/site

This runs the code of the tutorials, and fails if a built page would fetch anything from elsewhere.
"""

import os
import sys
from functools import partialmethod
from pathlib import Path

from nbclient import NotebookClient
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import capszoo

_DOCS = Path(__file__).parent
sys.path.insert(0, str(_DOCS / "extensions"))
# Tutorials call the command, and torchrun, of the Python that builds them, whether or not its environment is active.
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
os.environ.update(COLUMNS="110", NO_COLOR="1", TTY_COMPATIBLE="0")  # and print plainly, though kernels say otherwise
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tutorials run at once
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm would have notebooks show widgets
# A command's output comes in pieces of 100 bytes. myst_nb's own way to join them adds line breaks.
NotebookClient.__init__ = partialmethod(NotebookClient.__init__, coalesce_streams=True)

project = "capszoo"
author = "the capszoo authors"
copyright = author  # noqa: A001, Sphinx's name
version = release = capszoo.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "api_directive",
    "fenced_examples",
    "no_requests",
    "repository_links",
]
exclude_patterns = ["notebooks"]  # the tutorials again, for those who want to run them
highlight_language = "text"
default_role = "code"  # docstrings write `names` as Markdown does

# Pages
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_title = f"capszoo {release}"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7cb8f5", "color-brand-content": "#7cb8f5"},
}
pygments_style, pygments_dark_style = "friendly", "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

# Tutorials
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_show_tb = True
nb_execution_timeout = 120

# Reference
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # a forward that says nothing would say what nn.Module's does
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = True
# Other projects' names have no pages here, and no inventory is fetched. Nor have names that a caller only passes on.
_OTHERS = (
    "torch",
    "timm",
    "numpy",
    "PIL",
    "optuna",
    "pathlib",
    "collections",
    "contextlib",
    "os",
    "argparse",
    "Figure",
)
_PASSED_ON = ("engine.distributed.Ranks", "data.readers.FileReader", "data.readers.Reader")
nitpick_ignore_regex = [("py:.*", rf"{name}(\..*)?") for name in _OTHERS]
nitpick_ignore = [("py:class", f"capszoo.{name}") for name in _PASSED_ON]


def _spread_tutorials(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Give each of several processes its part of the tutorials: as neighbours, one process would read them all."""
    last_first = sorted(docnames, reverse=True)
    docnames[:] = last_first[0::2] + last_first[1::2]


def setup(app: Sphinx) -> None:
    app.connect("env-before-read-docs", _spread_tutorials)
