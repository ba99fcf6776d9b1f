"""Modules and names that were elsewhere: importing the old one gives the new one."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_MOVED = {
    "capszoo.cli": "capszoo.command_line.main",
    "capszoo.distributed": "capszoo.engine.distributed",
    "capszoo.loader": "capszoo.data.loader",
    "capszoo.metrics": "capszoo.engine.metrics",
    "capszoo.plots": "capszoo.figures",
    "capszoo.readers": "capszoo.data.readers",
    "capszoo.robustness": "capszoo.engine.robustness",
    "capszoo.task": "capszoo.engine.task",
    "capszoo.training": "capszoo.engine.options",
    "capszoo.watch": "capszoo.engine.watch",
}

# By the module that had them: names, and the module that has them now.
_NAMES = {
    "capszoo.checkpoint": dict.fromkeys(("load_state", "save_state"), "capszoo.engine.run_state"),
    "capszoo.command_line": {
        "add_policy_options": "capszoo.command_line.training",
        "check_ranges": "capszoo.engine.options",
        **dict.fromkeys(("create_optimizer", "policy_from"), "capszoo.engine.run"),
        **dict.fromkeys(("check_folder", "hold_folder", "start_folder"), "capszoo.engine.run_folder"),
    },
    "capszoo.engine.options": {
        "build_parser": "capszoo.command_line.training",
        **dict.fromkeys(
            (
                "create_optimizer",
                "load_splits",
                "make_model",
                "make_policy",
                "make_trainer",
                "measure_test",
                "model_arguments",
                "policy_from",
            ),
            "capszoo.engine.run",
        ),
    },
    "capszoo.data.readers": {"image_folder": "capszoo.data.folders"},
    "capszoo.registry": dict.fromkeys(("ModelInfo", "model_info"), "capszoo.costs"),
}


def getter(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module some of whose names have moved to modules that import it."""

    def get(name: str) -> Any:
        if name not in _NAMES[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_NAMES[module][name]), name)

    return get


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the old names, after Python found nothing else of that name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(_MOVED[spec.name])
        self._spec = module.__spec__  # Python is about to give the module that of the old name
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
