"""The command line: `cherry run|score|select|experience|train|compare|plan|gc|submit CONFIG`.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 2 the config,
the input or the model is wrong, 3 finished above the error tolerance or with shards skipped, 130
interrupted, 143 terminated, 1 all else.
"""

import importlib.util
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from pipeline import __version__, config, errors, texts
from pipeline.terminal import Terminal, print_json, say, speaking


def _lazily(name: str) -> ModuleType:
    """A module that is imported when something of it is first asked for."""
    full = f"pipeline.{name}"
    if full in sys.modules:
        return sys.modules[full]
    spec = importlib.util.find_spec(full)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    setattr(sys.modules["pipeline"], name, module)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from pipeline import commands, following, submitting
    from pipeline.commands import Outcome
    from pipeline.submitting import Submitted
else:  # torch, transformers and Ray take seconds, for which --help and a mistake need not wait
    commands, following, submitting = map(_lazily, ("commands", "following", "submitting"))

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

_JobCommand = Literal["run", "score", "select", "experience", "train", "compare"]


@app.command()
def run(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    retry_errors: _RetryErrors = False,
) -> None:
    """Score what is new and select; or do the whole method."""
    _do(
        lambda settings, to: commands.run(settings, to, retry_errors=retry_errors),
        path, overrides, as_json,
    )  # fmt: skip


@app.command()
def score(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    retry_errors: _RetryErrors = False,
) -> None:
    """Score what is new; select nothing."""
    _do(
        lambda settings, to: commands.score(settings, to, retry_errors=retry_errors),
        path, overrides, as_json,
    )  # fmt: skip


@app.command()
def select(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Select from finished scores: no model, no GPU."""
    _do(lambda settings, to: commands.select(settings, to), path, overrides, as_json)


@app.command()
def experience(
    path: _ConfigPath,
    overrides: _Overrides = None,
    as_json: _AsJson = False,
    retry_errors: _RetryErrors = False,
) -> None:
    """Embed every prompt, and choose the rows of brief experience."""
    _do(
        lambda settings, to: commands.experience(settings, to, retry_errors=retry_errors),
        path, overrides, as_json,
    )  # fmt: skip


@app.command()
def train(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Train the base model on the cherry subset."""
    _do(lambda settings, to: commands.train(settings, to), path, overrides, as_json)


@app.command()
def compare(path: _ConfigPath, overrides: _Overrides = None, as_json: _AsJson = False) -> None:
    """Train on the cherry subset and on controls, and judge them."""
    _do(lambda settings, to: commands.compare(settings, to), path, overrides, as_json)


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
    _do(
        lambda settings, to: commands.plan(settings, to, score_rows=score_rows),
        path, overrides, as_json,
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
    _do(
        lambda settings, to: commands.gc(
            settings, to, everything=everything, delete=delete, force=force
        ),
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
        _JobCommand, typer.Option(help="What the job does.", case_sensitive=False)
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


def _stop_or_detach(job: "Submitted", err: Console) -> int:
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


def _do(
    command: Callable[[config.Config, Terminal], "Outcome"],
    path: str,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    """Run a command, print what came out, and exit as it ended."""
    with speaking(as_json) as terminal:
        outcome = command(config.load(path, overrides), terminal)
        if as_json:
            print_json(outcome.values, terminal.out)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)
