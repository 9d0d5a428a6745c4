"""What a person sees meanwhile: a bar on a terminal, lines in a log."""

import time
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
)
from rich.text import Text

from pipeline.texts import count
from pipeline.training_loop import StepDone
from pipeline.watching import Pace

_SECONDS_BETWEEN_LINES = 10.0


class _Bar(Progress):
    """A bar, and a line of numbers under it."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Both."""
        yield from super().get_renderables()
        yield Text(self.numbers)


class RunProgress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        """Show progress on `console`."""
        self._console = console
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[what]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self.phase("scoring")

    def __enter__(self) -> "RunProgress":
        """Start drawing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Clear the bar."""
        self._clear()

    def phase(self, name: str) -> None:
        """Something else begins."""
        self._clear()
        self._name = name
        self._said = time.monotonic()
        if self._console.is_terminal:
            self._task = self._bar.add_task(name, total=None, what="")

    def unit(self, pace: Pace) -> None:
        """Take note of a finished unit."""
        said = [f"{pace.rows:,} rows"]
        if pace.errors:
            said.append(count(pace.errors, "error"))
        if pace.tokens_per_s:
            said.append(f"{pace.tokens_per_s:,.0f} tokens/s")
        if pace.dollars is not None:
            said.append(f"${pace.dollars:,.2f}")
        self._say(pace.done, pace.total, "units", said, pace.seconds_left)

    def step(self, step: StepDone) -> None:
        """Take note of an optimiser step."""
        said = [f"loss {step.loss:.3f}", f"{step.tokens / step.seconds:,.0f} tokens/s"]
        left = (step.num_steps - step.step) * step.seconds
        self._say(step.step, step.num_steps, "steps", said, left)

    def _say(
        self, done: int, total: int, what: str, said: list[str], seconds_left: float | None
    ) -> None:
        if seconds_left is not None and done < total:
            said = [*said, f"{timedelta(seconds=round(seconds_left))} left"]
        line = ", ".join(said)
        if self._task is not None:
            self._bar.start()
            self._bar.numbers = line
            self._bar.update(self._task, total=total, completed=done, what=what)
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES or done == total:
            self._said = time.monotonic()
            line = f"{self._name}: {done} of {total} {what}, {line}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _clear(self) -> None:
        if self._task is not None:  # off a terminal, rich would print an empty line
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None
