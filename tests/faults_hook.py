"""Runs in every Ray worker of the fault tests: which unit was scored, when and by whom."""

import functools
import json
import os
import time
from typing import Any

from on_import import OnImport


def install() -> None:
    """Trace the scorer as soon as a worker imports it."""
    OnImport({"pipeline.scoring": lambda scoring: _trace(scoring.UnitScorer)})


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
