"""How far a run is: one set of numbers, for the terminal, a job's log and Prometheus.

Ray exports the metrics on each node's port, with `ray_` before their names; cluster/grafana.json
shows them.
"""

from collections import Counter
from typing import Protocol

from ray.util import metrics

from pipeline.parts import UnitDone
from pipeline.training_loop import StepDone


class Progress(Protocol):
    """Who is told how far a run is."""

    def phase(self, name: str) -> None:
        """Something else begins."""

    def unit(self, pace: "Pace") -> None:
        """A unit is done."""

    def step(self, step: StepDone) -> None:
        """An optimiser step is done."""


class Silence:
    """Progress that nobody watches."""

    def phase(self, name: str) -> None:
        """Nothing."""

    def unit(self, pace: "Pace") -> None:
        """Nothing."""

    def step(self, step: StepDone) -> None:
        """Nothing."""


SILENCE = Silence()


class Pace:
    """The state of scoring or embedding."""

    def __init__(self, phase: str, total: int, price_per_hour: float | None) -> None:
        """Nothing is done yet.

        Args:
            phase: `scoring` or `embedding`.
            total: Units that have no part yet.
            price_per_hour: Of all devices together, in dollars.
        """
        self.phase = phase
        self.total = total
        self.done = 0
        self.rows_by_status: Counter[str] = Counter()
        self.tokens = 0
        self._price_per_hour = price_per_hour
        self._scored = 0
        self._started = self._last = 0.0
        self._metrics = _PaceMetrics(phase)

    def add(self, unit: UnitDone) -> None:
        """A unit is done."""
        self.done += 1
        self.rows_by_status.update(unit.rows_by_status)
        self.tokens += unit.tokens
        if unit.tokens:  # one that is reused whole waits for no model
            self._scored += 1
            self._started = min(self._started or unit.started, unit.started)
        self._last = max(self._last, unit.committed)
        self._metrics.set(self, unit)

    @property
    def rows(self) -> int:
        """Rows of the units that are done."""
        return self.rows_by_status.total()

    @property
    def errors(self) -> int:
        """Those with status `error`."""
        return self.rows_by_status["error"]

    @property
    def elapsed_s(self) -> float:
        """Since the first unit began to be scored; loading the model came before."""
        return max(0.0, self._last - self._started) if self._started else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Over that time."""
        return self.tokens / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def seconds_left(self) -> float | None:
        """If the units that are left take as long as those that were scored."""
        if not self._scored:
            return None
        return (self.total - self.done) * self.elapsed_s / self._scored

    @property
    def dollars(self) -> float | None:
        """Spent on the devices so far, where a price is known."""
        return (
            None if self._price_per_hour is None else self.elapsed_s * self._price_per_hour / 3600
        )


class _PaceMetrics:
    """A pace as metrics of Ray."""

    def __init__(self, phase: str) -> None:
        tags = {"phase": phase}

        def gauge(name: str, text: str) -> metrics.Gauge:
            made = metrics.Gauge(f"cherry_{name}", text, ("phase",))
            made.set_default_tags(tags)
            return made

        def counter(name: str, text: str, *more: str) -> metrics.Counter:
            made = metrics.Counter(f"cherry_{name}", text, ("phase", *more))
            made.set_default_tags(tags)
            return made

        self._units = gauge("units_done", "Units of the run that are done.")
        self._total = gauge("units_planned", "Units that had no part when the run began.")
        self._speed = gauge("tokens_per_s", "Tokens a second since scoring began.")
        self._left = gauge("seconds_left", "Until the last unit is done, at that speed.")
        self._dollars = gauge("dollars", "Spent on the devices since scoring began.")
        self._rows = counter("rows", "Rows that are done, by status.", "status")
        self._tokens = counter("tokens", "Sequence lengths of both passes of scored rows.")

    def set(self, pace: Pace, unit: UnitDone) -> None:
        self._units.set(pace.done)
        self._total.set(pace.total)
        self._speed.set(pace.tokens_per_s)
        if pace.seconds_left is not None:
            self._left.set(pace.seconds_left)
        if pace.dollars is not None:
            self._dollars.set(pace.dollars)
        for status, rows in unit.rows_by_status.items():
            self._rows.inc(rows, {"status": status})
        if unit.tokens:
            self._tokens.inc(unit.tokens)


class TrainingMetrics:
    """A training's state as metrics of Ray."""

    def __init__(self) -> None:
        """Known to Ray from now on."""
        self._step = metrics.Gauge("cherry_train_step", "Optimiser steps that are done.")
        self._loss = metrics.Gauge(
            "cherry_train_loss", "Nats a token of the answers, of the last step."
        )
        self._speed = metrics.Gauge(
            "cherry_train_tokens_per_s", "Tokens of all rows over all workers, of the last step."
        )
        self._left = metrics.Gauge(
            "cherry_train_seconds_left", "Steps left times the seconds of the last one."
        )

    def set(self, step: StepDone) -> None:
        """A step is done."""
        self._step.set(step.step)
        self._loss.set(step.loss)
        self._speed.set(step.tokens / step.seconds)
        self._left.set((step.num_steps - step.step) * step.seconds)
