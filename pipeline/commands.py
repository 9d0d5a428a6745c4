"""What the commands do: the flow under the eyes of a person, and what they see in the end.

Each takes a config and the terminal.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from pipeline import comparison_report, estimate_report, report
from pipeline import run as flow
from pipeline.config import Config
from pipeline.errors import EXIT_TOLERANCE
from pipeline.manifests import Finished
from pipeline.progress import RunProgress
from pipeline.run import Result
from pipeline.summary import Summary, failed_fraction
from pipeline.terminal import Terminal, say


class Outcome(NamedTuple):
    """What a command came to."""

    values: dict[str, Any]
    """What `--json` prints."""
    exit_code: int = 0


def run(config: Config, terminal: Terminal, *, retry_errors: bool) -> Outcome:
    """Score what is new and select; or do the whole method."""
    with RunProgress(terminal.err) as progress:
        result = flow.run(config, progress, retry_errors=retry_errors)
    return _show(result, config, terminal)


def score(config: Config, terminal: Terminal, *, retry_errors: bool) -> Outcome:
    """Score what is new; select nothing."""
    with RunProgress(terminal.err) as progress:
        result = flow.score(config, progress, retry_errors=retry_errors)
    return _show(result, config, terminal)


def select(config: Config, terminal: Terminal) -> Outcome:
    """Select from finished scores."""
    return _show(flow.select(config), config, terminal)


def experience(config: Config, terminal: Terminal, *, retry_errors: bool) -> Outcome:
    """Embed every prompt, and choose the rows of brief experience."""
    with RunProgress(terminal.err) as progress:
        subset, embedded = flow.experience(config, progress, retry_errors=retry_errors)
    report.show_experience(subset, embedded, terminal.results)
    counts, where = embedded.audited.rows_by_status, embedded.plan.scores_url
    return Outcome(
        _values(subset) | {"skipped_shards": embedded.skipped},
        _exit_code(config, counts, embedded.skipped, where, terminal),
    )


def train(config: Config, terminal: Terminal) -> Outcome:
    """Train the base model on the cherry subset."""
    with RunProgress(terminal.err) as progress:
        trained, summary = flow.train(config, progress)
    report.show_trained(trained, terminal.results)
    return _of_subset(_values(trained), config, summary, terminal)


def compare(config: Config, terminal: Terminal) -> Outcome:
    """Train on the cherry subset and on controls, and judge them."""
    with RunProgress(terminal.err) as progress:
        compared, summary = flow.compare(config, progress)
    comparison_report.show(compared, terminal.results)
    return _of_subset(compared.report | {"path": compared.url}, config, summary, terminal)


def plan(config: Config, terminal: Terminal, *, score_rows: int) -> Outcome:
    """Estimate what a run would score and cost."""
    estimate = flow.estimate(config, score_rows)
    estimate_report.show_estimate(estimate, terminal.results)
    return Outcome(asdict(estimate))


def gc(
    config: Config, terminal: Terminal, *, everything: bool, delete: bool, force: bool
) -> Outcome:
    """List parts that no input names any more, or delete them."""
    garbage = flow.gc(config, everything, delete, force)
    report.show_garbage(garbage, delete, terminal.results)
    return Outcome(garbage.summary(deleted=delete))


def _show(result: Result, config: Config, terminal: Terminal) -> Outcome:
    report.show(result, terminal.results)
    return _of_subset(asdict(result.summary), config, result.summary, terminal)


def _of_subset(
    values: dict[str, Any], config: Config, summary: Summary, terminal: Terminal
) -> Outcome:
    """What was made of scores, and whether they lack shards or rows that failed."""
    skipped, counts = summary.skipped_shards, summary.rows_by_status
    code = _exit_code(config, counts, skipped, summary.scores_path, terminal)
    return Outcome(values | {"skipped_shards": skipped}, code)


def _exit_code(
    config: Config, counts: Mapping[str, int], skipped: list[str], where: str, terminal: Terminal
) -> int:
    """3 if more rows failed than may, or shards were skipped."""
    failed, allowed = failed_fraction(counts), config.score.max_error_fraction
    if failed > allowed:
        say(
            terminal.err,
            f"{100 * failed:.2f} % of the rows failed or are malformed, more than "
            f"score.max_error_fraction ({100 * allowed:g} %). What was done is kept; the reason of "
            f"each is in {where}.",
        )
    return EXIT_TOLERANCE if failed > allowed or skipped else 0


def _values(finished: Finished) -> dict[str, Any]:
    return finished.manifest | {"path": finished.url, "manifest": finished.manifest_url}
