"""Hooks of Ray workers: change a module as soon as a process imports it, and not before.

A hook that imported it itself would load torch, four seconds of a core, in every worker there is.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class OnImport(MetaPathFinder):
    """Calls `changes[name]` with each module of that name that was just executed."""

    def __init__(self, changes: dict[str, Callable[[Any], None]]) -> None:
        """Take effect for all imports of this process from now on."""
        self._changes = changes
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Leave other modules to the finders behind this one."""
        change = self._changes.get(name)
        spec = PathFinder.find_spec(name, path, target) if change else None
        if change and spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
