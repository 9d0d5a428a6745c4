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
from typing import Any, TextIO

import typer
from ray.exceptions import RayError, RayTaskError
from rich.console import Console
from rich.text import Text

from pipeline import errors, texts


@contextmanager
def speaking(as_json: bool) -> Iterator[tuple[TextIO, Console, Console]]:
    """Standard output, a console for results and one for the rest; errors become exit codes.

    Ray prints what its daemons say to standard output: while this is open, that is standard error.
    """
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # rows are in any language
    out = sys.stdout
    err = Console(stderr=True, highlight=False)
    results = err if as_json else Console(file=out, highlight=False)
    try:
        with redirect_stdout(sys.stderr), _terminating():
            yield out, results, err
    except KeyboardInterrupt as interrupt:
        say(err, "interrupted; what was done is kept, and the same command goes on from there")
        terminated = signal.SIGTERM in interrupt.args
        code = errors.EXIT_TERMINATED if terminated else errors.EXIT_INTERRUPTED
        raise typer.Exit(code) from None
    except (errors.CherryError, RayError) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        known = cause if isinstance(cause, errors.CherryError) else None
        say(err, str(known or cause))
        raise typer.Exit(known.exit_code if known else errors.EXIT_FAILED) from None


@contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM, which a pod that is deleted gets, ends what is under way as Ctrl-C does."""

    def end(number: int, _: object) -> None:
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
    logging.getLogger("ray").setLevel(logging.WARNING)
    # It writes to standard error by itself, rows and all; what went wrong comes as exceptions.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    for name in ("dashboard_sdk", "job.sdk"):  # these set a level of their own
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # Ray's own notes, kept in its log files
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
