"""Names of earlier versions are those of today."""

import importlib

import pytest

from capszoo import _moved


@pytest.mark.parametrize("old, new", _moved._MOVED.items())
def test_modules_that_moved(old, new):
    assert importlib.import_module(old) is importlib.import_module(new)


@pytest.mark.parametrize("module", _moved._NAMES)
def test_names_that_moved(module):
    old = importlib.import_module(module)
    for name, new in _moved._NAMES[module].items():
        assert getattr(old, name) is getattr(importlib.import_module(new), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = old.nothing


def test_a_module_whose_name_is_a_package_now():
    from capszoo.figures import write_report
    from capszoo.report import write_report as former

    assert former is write_report
