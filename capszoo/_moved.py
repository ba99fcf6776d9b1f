"""Modules that had another name: importing the old one gives the new one."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_MOVED = {
    "capszoo.cli": "capszoo.command_line.main",
    "capszoo.distributed": "capszoo.engine.distributed",
    "capszoo.loader": "capszoo.data.loader",
    "capszoo.metrics": "capszoo.engine.metrics",
    "capszoo.readers": "capszoo.data.readers",
    "capszoo.task": "capszoo.engine.task",
    "capszoo.training": "capszoo.engine.options",
    "capszoo.watch": "capszoo.engine.watch",
}


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
