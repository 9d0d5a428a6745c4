"""The command line: `cherry run|score|select|experience|train|compare|plan|gc|submit CONFIG`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 2 the config,
the input or the model is wrong, 3 finished above the error tolerance or with shards skipped, 130
interrupted, 143 terminated, 1 all else.
"""

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from pipeline import (
    __version__,
    comparison_report,
    config,
    errors,
    estimate_report,
    following,
    report,
    submitting,
    texts,
)
from pipeline import run as flow
from pipeline.comparison import Comparison
from pipeline.manifests import Finished
from pipeline.phases import Embedded
from pipeline.progress import RunProgress
from pipeline.run import Result
from pipeline.submitting import Submitted
from pipeline.summary import Summary, failed_fraction
from pipeline.terminal import print_json, say, speaking
from pipeline.watching import Progress

T = TypeVar("T")

app = typer.Typer(
    name="cherry",
    help="Score an instruction-tuning corpus by IFD and keep its best part.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    """Score what is new and select; or do the whole method."""
    _show_run(partial(flow.run, retry_errors=retry_errors), path, overrides, as_json)


@app.command()
def score(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    retry_errors: _RetryErrors = False,
) -> None:
    """Score what is new; select nothing."""
    _show_run(partial(flow.score, retry_errors=retry_errors), path, overrides, as_json)


@app.command()
def select(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Select from finished scores: no model, no GPU."""
    _show_run(lambda settings, _: flow.select(settings), path, overrides, as_json)


@app.command()
def experience(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    retry_errors: _RetryErrors = False,
) -> None:
    """Embed every prompt, and choose the rows of brief experience."""
    command = partial(flow.experience, retry_errors=retry_errors)
    settings, (_, embedded) = _watch(
        command, report.show_experience, _experience_json, path, overrides, as_json
    )
    counts = embedded.audited.rows_by_status
    _check_tolerance(settings, counts, embedded.skipped, embedded.plan.scores_url)


@app.command()
def train(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Train the base model on the cherry subset."""
    _show_of_subset(flow.train, report.show_trained, _finished_json, path, overrides, as_json)


@app.command()
def compare(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Train on the cherry subset and on controls, and judge them."""
    show = comparison_report.show
    _show_of_subset(flow.compare, show, _comparison_json, path, overrides, as_json)


@app.command()
def plan(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    score_rows: Annotated[
        int,
        typer.Option("--score", metavar="ROWS", min=0, help="Score so many, to measure the speed."),
    ] = 0,
) -> None:
    """Estimate what a run would score and cost; tokenises a sample."""
    _watch(
        lambda settings, _: flow.estimate(settings, score_rows),
        estimate_report.show_estimate, asdict, path, overrides, as_json,
    )  # fmt: skip


@app.command()
def gc(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them.")] = False,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Also parts of other settings and inputs under the output."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even with units to score, or over half of the parts.")
    ] = False,
) -> None:
    """List parts that no input names any more, or delete them."""
    _watch(
        lambda settings, _: flow.gc(settings, everything, delete, force),
        lambda found, console: report.show_garbage(found, delete, console),
        lambda found: found.summary(deleted=delete),
        path, overrides, as_json,
    )  # fmt: skip


@app.command()
def submit(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    retry_errors: _RetryErrors = False,
    address: Annotated[
        str | None,
        typer.Option(help="http://HOST:8265 of the cluster; or RAY_API_SERVER_ADDRESS."),
    ] = None,
    command: Annotated[
        submitting.Command, typer.Option(help="What the job does.", case_sensitive=False)
    ] = "run",
    wait: Annotated[bool, typer.Option("--wait", help="Show its log, and end as it ends.")] = False,
    variables: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME=value", help="Of the job's environment; no secrets."),
    ] = None,
    extras: Annotated[
        list[str] | None,
        typer.Option("--extra", metavar="NAME", help="gguf, lora, gcs, azure: installed there."),
    ] = None,
    installed: Annotated[
        bool, typer.Option("--installed", help="Cherry is in the cluster's image; send none.")
    ] = False,
) -> None:
    """Run it as a job of a Ray cluster, never twice at once."""
    with speaking(as_json) as (out, results, err):
        job = submitting.submit(
            path, overrides, address, command=command, variables=variables, extras=extras,
            retry_errors=retry_errors, installed=installed,
        )  # fmt: skip
        try:
            say(err, f"{'started' if job.started else 'already running:'} {job.submission_id}")
            if not wait:
                say(err, f"follow it: cherry submit ... --wait, or {job.address}")
                if as_json:
                    print_json({"submission_id": job.submission_id, "started": job.started}, out)
                return
            ended = following.follow(job, lambda line: _echo(results, line))
        except KeyboardInterrupt as interrupt:
            if signal.SIGTERM in interrupt.args:  # nobody is there to be asked
                raise
            raise typer.Exit(_stop_or_detach(job, err)) from None
    if as_json and ended.summary is not None:
        print_json(ended.summary, out)
    if ended.exit_code:
        say(err, f"job {job.submission_id}: {ended.message}")
        raise typer.Exit(ended.exit_code)


def _echo(console: Console, line: str) -> None:
    console.print(Text(texts.visible(line.expandtabs())), soft_wrap=True)


def _stop_or_detach(job: Submitted, err: Console) -> int:
    """Ask what becomes of the job; where nobody can be asked, it goes on."""
    answer = ""
    if sys.stdin.isatty():
        with suppress(KeyboardInterrupt, EOFError):
            answer = err.input("stop the job, or detach and let it run? [s/D] ")
    if answer.strip().lower() in ("s", "stop"):
        following.stop(job)
        say(err, f"stopped {job.submission_id}; what it scored is kept")
        return errors.EXIT_FAILED
    say(err, f"detached from {job.submission_id}; the same command follows it again")
    return errors.EXIT_INTERRUPTED


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


def _show_run(
    command: Callable[[config.Config, Progress], Result],
    path: str,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    settings, result = _watch(command, report.show, _summary_json, path, overrides, as_json)
    _check_summary(settings, result.summary)


def _show_of_subset(
    command: Callable[[config.Config, Progress], tuple[T, Summary]],
    show: Callable[[T, Console], None],
    to_json: Callable[[T], dict[str, Any]],
    path: str,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    """What was made of a subset, and whether the subset lacks shards or rows that failed."""
    settings, (_, summary) = _watch(
        command,
        lambda found, console: show(found[0], console),
        lambda found: to_json(found[0]) | {"skipped_shards": found[1].skipped_shards},
        path, overrides, as_json,
    )  # fmt: skip
    _check_summary(settings, summary)


def _check_summary(settings: config.Config, summary: Summary) -> None:
    _check_tolerance(settings, summary.rows_by_status, summary.skipped_shards, summary.scores_path)


def _check_tolerance(
    settings: config.Config, counts: Mapping[str, int], skipped: list[str], where: str
) -> None:
    """Exit 3 if more rows failed than may, or shards were skipped."""
    failed, allowed = failed_fraction(counts), settings.score.max_error_fraction
    if failed > allowed:
        say(
            Console(stderr=True, highlight=False),
            f"{100 * failed:.2f} % of the rows failed or are malformed, more than "
            f"score.max_error_fraction ({100 * allowed:g} %). What was done is kept; the reason of "
            f"each is in {where}.",
        )
    if failed > allowed or skipped:
        raise typer.Exit(errors.EXIT_TOLERANCE)


def _watch(
    command: Callable[[config.Config, Progress], T],
    show: Callable[[T, Console], None],
    to_json: Callable[[T], dict[str, Any]],
    path: str,
    overrides: list[str] | None,
    as_json: bool,
) -> tuple[config.Config, T]:
    """Run a command under the eyes of a person, and print what came out."""
    with speaking(as_json) as (out, results, err):
        settings = config.load(path, overrides)
        with RunProgress(err) as progress:
            found = command(settings, progress)
        show(found, results)
        if as_json:
            print_json(to_json(found), out)
    return settings, found


def _summary_json(result: Result) -> dict[str, Any]:
    return asdict(result.summary)


def _experience_json(found: tuple[Finished, Embedded]) -> dict[str, Any]:
    subset, embedded = found
    return _finished_json(subset) | {"skipped_shards": embedded.skipped}


def _finished_json(finished: Finished) -> dict[str, Any]:
    return finished.manifest | {"path": finished.url, "manifest": finished.manifest_url}


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return comparison.report | {"path": comparison.url}
