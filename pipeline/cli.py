"""The command line: `cherry run|score|select|experience|train|compare|plan|gc CONFIG`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 2 the config
or the input is wrong and nothing was started, 3 finished above the error tolerance, 1 all else.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TextIO

import typer
from ray.exceptions import RayError, RayTaskError
from rich.console import Console
from rich.text import Text

from pipeline import __version__, comparison_report, config, errors, report, texts
from pipeline import run as flow
from pipeline.pending import Progress
from pipeline.run import Result

app = typer.Typer(
    name="cherry",
    help="Score an instruction-tuning corpus by IFD and keep its best part.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML config file.")]
_Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override a key of the config; repeatable."),
]
_AsJson = Annotated[
    bool, typer.Option("--json", help="Print the summary as one JSON object, on the last line.")
]
_RetryErrors = Annotated[
    bool,
    typer.Option(
        "--retry-errors", help="Score rows with status error again; replaces their parts."
    ),
]


@app.command()
def run(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    retry_errors: _RetryErrors = False,
) -> None:
    """Score what is new, select, and write the cherry subset."""
    _execute(partial(flow.run, retry_errors=retry_errors), path, overrides, as_json)


@app.command()
def score(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    retry_errors: _RetryErrors = False,
) -> None:
    """Score what is new; select nothing."""
    _execute(partial(flow.score, retry_errors=retry_errors), path, overrides, as_json)


@app.command()
def select(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Select from finished scores: no model, no GPU."""
    _execute(lambda settings, _: flow.select(settings), path, overrides, as_json)


@app.command()
def experience(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Embed every prompt, and choose the rows of brief experience."""
    with _speaking(as_json) as (out, results, err):
        settings = config.load(path, overrides)
        with report.RunProgress(err) as progress:
            found = flow.experience(settings, progress)
        report.show_experience(found, results)
        if as_json:
            _print_json(found.manifest | {"path": found.url, "manifest": found.manifest_url}, out)


@app.command()
def train(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Train the base model on the cherry subset."""
    with _speaking(as_json) as (out, results, err):
        settings = config.load(path, overrides)
        with report.RunProgress(err) as progress:
            found = flow.train(settings, progress)
        report.show_trained(found, results)
        if as_json:
            _print_json(found.manifest | {"path": found.url, "manifest": found.manifest_url}, out)


@app.command()
def compare(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Train on the cherry subset and on random controls; judge them by held-out rows."""
    with _speaking(as_json) as (out, results, err):
        settings = config.load(path, overrides)
        with report.RunProgress(err) as progress:
            found = flow.compare(settings, progress)
        comparison_report.show(found, results)
        if as_json:
            _print_json(found.report | {"path": found.url}, out)


@app.command()
def plan(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    score_rows: Annotated[
        int, typer.Option("--score", metavar="ROWS", help="Score so many, to measure the speed.")
    ] = 0,
) -> None:
    """Estimate what a run would score and cost; tokenises a sample."""
    with _speaking(as_json) as (out, results, _):
        found = flow.estimate(config.load(path, overrides), score_rows)
        report.show_estimate(found, results)
        if as_json:
            _print_json(asdict(found), out)


@app.command()
def gc(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also parts of other settings under this output.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even with units to score, or over half of the parts.")
    ] = False,
) -> None:
    """List parts that no current input names, and unfinished uploads; older than 24 hours."""
    with _speaking(as_json) as (out, results, _):
        found = flow.gc(config.load(path, overrides), everything, delete, force)
        report.show_garbage(found, delete, results)
        if as_json:
            _print_json(found.summary(deleted=delete), out)


def main() -> None:
    """Entry point of `cherry` and `python -m pipeline`."""
    app()


def _version(show: bool) -> None:
    if show:
        typer.echo(f"cherry {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _execute(
    command: Callable[[config.Config, Progress | None], Result],
    path: str,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    with _speaking(as_json) as (out, results, err):
        settings = config.load(path, overrides)
        with report.RunProgress(err) as progress:
            result = command(settings, progress)
        summary = result.summary
        report.show(result, results)
        if as_json:
            _print_json(asdict(summary), out)
    allowed = settings.score.max_error_fraction
    if summary.failed_fraction > allowed or summary.skipped_shards:
        if summary.failed_fraction > allowed:
            _say(
                err,
                f"{100 * summary.failed_fraction:.2f} % of the rows failed or are malformed, more "
                f"than score.max_error_fraction ({100 * allowed:g} %). What was scored is kept; "
                f"the reasons are in {summary.scores_path}.",
            )
        raise typer.Exit(errors.EXIT_TOLERANCE)


def _print_json(values: dict[str, Any], out: TextIO) -> None:
    print(json.dumps(values), file=out, flush=True)


@contextmanager
def _speaking(as_json: bool) -> Iterator[tuple[TextIO, Console, Console]]:
    """Standard output, a console for results and one for the rest; errors become exit codes.

    Ray prints what its daemons say to standard output: while this is open, that is standard error.
    """
    _quiet_libraries()
    out = sys.stdout
    err = Console(stderr=True, highlight=False)
    results = err if as_json else Console(file=out, highlight=False)
    try:
        with redirect_stdout(sys.stderr):
            yield out, results, err
    except (errors.CherryError, RayError) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        known = cause if isinstance(cause, errors.CherryError) else None
        _say(err, str(known or cause))
        raise typer.Exit(known.exit_code if known else errors.EXIT_FAILED) from None


def _say(err: Console, message: str) -> None:
    """A message may quote column names and paths of the input: foreign text, never folded."""
    message = texts.without_secrets(texts.visible(message))
    err.print(Text(f"cherry: {message}"), soft_wrap=True)


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
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # Ray's own notes, kept in its log files
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
