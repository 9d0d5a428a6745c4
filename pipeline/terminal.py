"""What the command line says, and where: results, the rest, and errors as exit codes."""

import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple, TextIO

import typer
from rich.console import Console
from rich.text import Text

from pipeline import errors, texts


class Terminal(NamedTuple):
    """Where a command says what."""

    out: TextIO
    """Standard output itself."""
    results: Console
    """On it, or with `--json` on standard error."""
    err: Console
    """All else, on standard error."""


@contextmanager
def speaking(as_json: bool) -> Iterator[Terminal]:
    """Where to say what; errors become exit codes.

    Ray prints what its daemons say to standard output: while this is open, that is standard error.
    """
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # rows are in any language
    out = sys.stdout
    err = Console(stderr=True, highlight=False)
    results = err if as_json else Console(file=out, highlight=False)
    signals: list[int] = []
    try:
        with redirect_stdout(sys.stderr), _terminating(signals):
            yield Terminal(out, results, err)
    except KeyboardInterrupt:
        say(err, "interrupted; what was done is kept, and the same command goes on from there")
        code = errors.EXIT_TERMINATED if signals else errors.EXIT_INTERRUPTED
        raise typer.Exit(code) from None
    except Exception as error:
        cause = _explained(error)
        if cause is None:
            raise
        say(err, str(cause))
        known = isinstance(cause, errors.CherryError)
        raise typer.Exit(cause.exit_code if known else errors.EXIT_FAILED) from None


def _explained(error: Exception) -> Any:
    """What a person is told of an error; None if it is a bug, whose traceback is wanted."""
    if "ray" in sys.modules:  # it takes a while, which a mistake in a config need not wait for
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError):
            return error.cause
        if isinstance(error, RayError):
            return error
    return error if isinstance(error, errors.CherryError) else None


@contextmanager
def _terminating(signals: list[int]) -> Iterator[None]:
    """SIGTERM, which a pod that is deleted gets, ends what is under way as Ctrl-C does.

    It is noted in `signals`: out of Ray's waits comes another interrupt than went in.
    """

    def end(number: int, _: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def say(err: Console, message: str) -> None:
    """A message may quote column names and paths of the input: foreign text, never folded."""
    message = texts.without_secrets(texts.visible(message))
    err.print(Text(f"cherry: {message}"), soft_wrap=True)


def print_json(values: dict[str, Any], out: TextIO) -> None:
    """A result as one line."""
    print(json.dumps(values), file=out, flush=True)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # Whatever a library logs may quote a row: without what a terminal would obey.
        return texts.without_secrets(texts.visible(super().format(record)))


def _quiet_libraries() -> None:
    """One voice on standard error: ours at INFO, libraries' from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("cherry").setLevel(logging.INFO)
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # Ray's own notes, kept in its log files
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
