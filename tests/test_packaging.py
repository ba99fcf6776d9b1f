"""What an installation has: every folder of the source, and the grids of the recipes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_package_and_grid_is_in_the_wheel():
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages, data = set(setuptools["packages"]), setuptools["package-data"]
    grids = {path.parent.name for path in (ROOT / "recipes" / "configs").glob("*/*.yaml")}
    for name in (f"capszoo.recipes.configs.{grid}" for grid in grids):
        assert name in packages and data[name] == ["*.yaml"], name
    for root, package in (("capszoo", "capszoo"), ("kernels", "capszoo.kernels")):
        for init in (ROOT / root).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / root).parts
            assert ".".join([package, *inside]) in packages
