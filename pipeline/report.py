"""What a person sees: progress while scoring, and the summary on the terminal.

Corpus text is foreign: it is shown as `Text`, never as markup, and without control characters.
"""

import os
import re
import time
import unicodedata
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.estimate import Estimate
from pipeline.garbage import Garbage
from pipeline.parts import UnitDone
from pipeline.rows import read_rows
from pipeline.run import Result, Summary
from pipeline.samples import read_samples
from pipeline.schemas import STATUSES
from pipeline.units import Plan

_SECONDS_BETWEEN_LINES = 10.0
_SECRET_NAME = re.compile(r"SECRET|PASSWORD|(^|_)(TOKEN|KEY)$|CONNECTION_STRING")
_LEAST_SECRET = 8
"""Characters; a shorter value is part of ordinary words."""

_ACTORS_SHOWN = (1, 2, 4, 8, 16)
_GARBAGE_SHOWN = 20
_GROUPS_SHOWN = 20
_GROUP_NAME = 30
"""Characters shown of a group's name."""
_EXCERPT = 110
"""Characters shown of a prompt and of a response."""


class ScoringProgress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        """Show progress on `console`."""
        self._console = console
        self._bar = Progress(
            TextColumn("scoring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("units  {task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task = (
            None if not console.is_terminal else self._bar.add_task("", total=None, speed="")
        )
        self._done = self._tokens = 0
        self._started = 0.0
        self._said = time.monotonic()

    def __enter__(self) -> "ScoringProgress":
        """Start drawing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Clear the bar."""
        if self._task is not None:  # off a terminal, rich would print an empty line
            self._bar.stop()

    def __call__(self, unit: UnitDone, total: int) -> None:
        """Take note of a finished unit."""
        self._done += 1
        self._tokens += unit.tokens
        if unit.tokens:  # one that is reused whole waits for no model
            self._started = min(self._started or unit.started, unit.started)
        elapsed = unit.committed - self._started
        speed = f"{self._tokens / elapsed:,.0f} tokens/s" if self._tokens and elapsed > 0 else ""
        if self._task is not None:
            self._bar.start()
            self._bar.update(self._task, total=total, completed=self._done, speed=speed)
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES or self._done == total:
            self._said = time.monotonic()
            self._console.print(f"scored {self._done} of {total} units, {speed}", highlight=False)


def show(result: Result, console: Console) -> None:
    """Print the summary of a run."""
    summary = result.summary
    console.print(_status_table(summary))
    console.print(_facts(result))
    if result.selection:
        manifest = result.selection.manifest
        for table, shown in (
            (_budgets, len(manifest["budgets"]) > 1),
            (_groups, manifest["groups"]),
        ):
            if shown:
                console.print(table(manifest), "")
    if result.survey and result.survey.highest:
        by = result.selection.manifest["settings"]["by"] if result.selection else ""
        ends = {"Highest": result.survey.highest, "Lowest": result.survey.lowest}
        for name, rows in ends.items():
            console.print(_samples(result.plan, rows, f"{name} {by} of the eligible rows"))
    console.print(_files(summary), soft_wrap=True)


def show_garbage(garbage: Garbage, deleted: bool, console: Console) -> None:
    """Print what `cherry gc` found."""
    done = "deleted" if deleted else "could go; delete with --delete"
    size = f"{garbage.num_bytes:,} bytes"
    lines = [
        f"{len(garbage.parts):,} of {garbage.num_parts:,} parts, {size}: {done}",
        f"{len(garbage.uploads):,} unfinished uploads and temporary files: {done}",
    ]
    if garbage.num_spared:
        lines.append(f"{garbage.num_spared:,} parts are younger than 24 hours and spared")
    names = [part.url for part in garbage.parts] + [upload.url for upload in garbage.uploads]
    lines += names[:_GARBAGE_SHOWN]
    if len(names) > _GARBAGE_SHOWN:
        lines.append(f"and {len(names) - _GARBAGE_SHOWN:,} more: all of them with --json")
    console.print(Group(*(Text(visible(line)) for line in lines)), soft_wrap=True)


def show_estimate(estimate: Estimate, console: Console) -> None:
    """Print what `cherry plan` found."""
    left = estimate.rows - estimate.rows_done
    table = Table(title="Rows to score", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("status, as far as tokenising tells")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for status in STATUSES:
        if count := estimate.rows_by_status.get(status):
            table.add_row(status, f"{count:,}", f"{100 * count / left:.1f} %")
    lines = [
        f"{estimate.rows:,} rows in {estimate.units_total:,} units; {estimate.units_done:,} units "
        f"with {estimate.rows_done:,} rows are done"
        + (f", about {n:,} more rows have a score" if (n := estimate.rows_reusable) else ""),
        f"about {estimate.tokens:,} tokens to score: {estimate.tokens_conditioned:,} conditioned, "
        f"{estimate.tokens_direct:,} direct (standard error {100 * estimate.tokens_error:.1f} %, "
        f"{estimate.sampled_rows:,} rows tokenised)",
    ]
    if estimate.seconds_per_million_tokens is None or estimate.model_hours is None:
        lines.append("--score 300 scores as many rows, and says how long all of them take")
    else:
        lines.append(
            f"{estimate.seconds_per_million_tokens:,.1f} s for a million tokens, one model on "
            f"{estimate.device}; {estimate.scored_rows:,} rows scored, "
            f"{100 * (estimate.over_one_fraction or 0):.0f} % of them with an IFD of 1 or more"
        )
    console.print(
        *([table] if left else []), Group("", *(Text(line) for line in lines), ""), sep="\n"
    )
    if estimate.model_hours is not None:
        hours = Table(title="Scoring", title_justify="left", show_edge=False, pad_edge=False)
        for name in ("actors", "hours", "cost"):
            hours.add_column(name, justify="right")
        cost = "" if estimate.cost is None else f"{estimate.cost:,.2f}"
        for actors in _ACTORS_SHOWN:
            hours.add_row(f"{actors}", f"{estimate.model_hours / actors:,.2f}", cost)
        console.print(hours)


def plain(text: str, limit: int = _EXCERPT) -> str:
    """Text on one line, without control or formatting characters, cut at `limit`."""
    kept = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text[: 4 * limit])
    line = " ".join(kept.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def without_secrets(text: str) -> str:
    """Text with the values of secrets in the environment named instead of shown.

    Nothing here puts one into a message; this is for what a library may quote.
    """
    for name, value in os.environ.items():
        if len(value) >= _LEAST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, f"${name}")
    return text


def visible(text: str) -> str:
    """Lines of text with control and formatting characters shown as U+FFFD."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def _status_table(summary: Summary) -> Table:
    table = Table(title="Rows", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("status")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for status in STATUSES:
        if count := summary.rows_by_status.get(status):
            table.add_row(status, f"{count:,}", f"{100 * count / summary.rows:.1f} %")
    table.add_row("all", f"{summary.rows:,}", "", style="bold")
    return table


def _facts(result: Result) -> Group:
    summary = result.summary
    lines = [
        f"{summary.units_scored} units scored, {summary.units_reused} reused"
        + (f", {rows:,} rows reused in all" if (rows := summary.rows_reused) else "")
        + (
            f"; {summary.tokens_scored:,} tokens at {summary.tokens_per_s:,.0f} tokens/s"
            if summary.tokens_per_s
            else ""
        )
        + f"; {summary.seconds:.1f} s in all"
    ]
    if result.selection:
        lines += _selected(result.selection.manifest)
    lines += [f"skipped: {visible(reason)}" for reason in summary.skipped_shards]
    return Group("", *(Text(line) for line in lines), "")


def _selected(manifest: dict[str, Any]) -> Iterator[str]:
    """What a selection did, in sentences."""
    settings = manifest["settings"]
    asked, selected = manifest["asked_rows"], manifest["selected_rows"]
    kept = f"{selected:,} rows kept of {manifest['eligible_rows']:,} eligible"
    if asked is not None and asked > selected:
        kept += f" ({asked:,} were asked for: fewer are eligible)"
    if manifest["cut"] is not None and not manifest["groups"]:
        kept += f"; the cut is at {settings['by']} {manifest['cut']:.6f}"
    yield kept
    tied = manifest["rows_at_cut"]
    if tied > 1 and not manifest["groups"]:
        at = "all of them kept"
        if manifest["selected_at_cut"] < tied:
            at = f"{manifest['selected_at_cut']:,} of them kept, by the order of sample ids"
        yield f"{tied:,} rows lie exactly at the cut, {at}"
    for reason, count in manifest["rejected_rows"].items():
        yield f"{count:,} scored rows not eligible: {reason}"
    if manifest["duplicate_rows"]:
        yield f"{manifest['duplicate_rows']:,} duplicates above the cut passed over"


def _budgets(manifest: dict[str, Any]) -> Table:
    """Where each of several budgets ends."""
    table = Table(title="Budgets", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("fraction", "rows", "cut", "rows at the cut", "kept of them"):
        table.add_column(name, justify="right")
    for budget in manifest["budgets"]:
        table.add_row(
            budget["fraction"],
            f"{budget['selected_rows']:,}",
            _ratio(budget["cut"]),
            f"{budget['rows_at_cut']:,}",
            f"{budget['selected_at_cut']:,}",
        )
    return table


def _groups(manifest: dict[str, Any]) -> Table:
    """The groups, those with the most rows first."""
    groups = sorted(manifest["groups"], key=lambda group: -group["rows"])
    title = f"Groups by {plain(manifest['settings']['group_by'])}"
    if len(groups) > _GROUPS_SHOWN:
        title += f": {_GROUPS_SHOWN} of {len(groups):,}, all of them in the manifest"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("group", overflow="ellipsis", no_wrap=True)
    for name in ("rows", "eligible", "asked", "kept", "cut"):
        table.add_column(name, justify="right")
    for group in groups[:_GROUPS_SHOWN]:
        asked = group["asked_rows"]
        table.add_row(
            Text("null" if group["group"] is None else plain(group["group"], _GROUP_NAME)),
            f"{group['rows']:,}",
            f"{group['eligible_rows']:,}",
            "" if asked is None else f"{asked:,}",
            f"{group['selected_rows']:,}",
            _ratio(group["cut"]),
        )
    return table


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.6f}"


def _samples(plan: Plan, rows: list[tuple[float, int, int]], title: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True, show_edge=False, expand=True)
    table.add_column("IFD", justify="right", no_wrap=True)
    table.add_column("prompt", ratio=1)
    table.add_column("response", ratio=1)
    for ratio, unit_index, row in rows:
        unit = plan.units[unit_index]
        sample = next(read_samples(read_rows(unit).slice(row - unit.start, 1), unit.columns))
        prompt = " ".join(m.content for m in sample.messages if m.role in ("user", "input"))
        answer = " ".join(m.content for m in sample.messages if m.role == "assistant")
        table.add_row(f"{ratio:.4f}", Text(plain(prompt)), Text(plain(answer)))
    return table


def _files(summary: Summary) -> Group:
    lines = [f"scores   {summary.scores_path}"]
    if summary.cherry_path:
        lines += [f"cherry   {summary.cherry_path}", f"manifest {summary.manifest}"]
    return Group("", *(Text(line) for line in lines))
