"""Runs in every Ray worker of the fault tests: which unit was scored, when and by whom."""

import functools
import json
import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "pipeline.scoring"


def install() -> None:
    """Trace the scorer as soon as a worker imports it; workers that never do stay light.

    Importing it here would load torch, four seconds of a core, in every worker there is.
    """
    sys.meta_path.insert(0, _OnImport())


class _OnImport(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_trace(module: ModuleType) -> None:
                execute(module)
                _trace(module.UnitScorer)

            spec.loader.exec_module = execute_and_trace  # type: ignore[method-assign]
        return spec


def _trace(scorer: Any) -> None:
    """A line for every unit, or piece of one, whose scoring begins."""
    score = scorer.score

    @functools.wraps(score)
    def traced(self: Any, unit: str, *args: Any, **kwargs: Any) -> Any:
        _note(**json.loads(unit))
        return score(self, unit, *args, **kwargs)

    scorer.score = traced


def _note(unit_id: str, start: int, **_: Any) -> None:
    """Appended in one write, which does not mix with another process's."""
    line = f"{unit_id} {start} {time.time():.3f} {os.getpid()}\n"
    trace = os.open(os.environ["CHERRY_FAULT_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(trace, line.encode())
    finally:
        os.close(trace)
