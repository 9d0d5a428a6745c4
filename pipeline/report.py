"""What a person sees in the end: the summary of a run on the terminal.

Corpus text is foreign: it is shown as `Text`, never as markup, and without control characters.
"""

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipeline.errors import CherryError
from pipeline.garbage import Garbage
from pipeline.manifests import Finished
from pipeline.pending import Measured
from pipeline.rows import take_rows
from pipeline.run import Result
from pipeline.samples import read_samples
from pipeline.schemas import BAD_LINE, STATUSES
from pipeline.selection_report import selected, tables
from pipeline.summary import Summary, failed_rows
from pipeline.texts import count, plain, visible
from pipeline.units import Plan

_GARBAGE_SHOWN = 20


def show(result: Result, console: Console) -> None:
    """Print the summary of a run."""
    summary = result.summary
    console.print(status_table("Rows", "status", summary.rows_by_status, summary.rows))
    console.print(_facts(result))
    if result.selection:
        for table in tables(result.selection.manifest):
            console.print(table, "")
    if result.survey and result.survey.highest:
        by = result.selection.manifest["settings"]["by"] if result.selection else ""
        ends = {"Highest": result.survey.highest, "Lowest": result.survey.lowest}
        for name, rows in ends.items():
            console.print(_samples(result.plan, rows, f"{name} {by} of the eligible rows"), "")
    console.print(_files(summary), soft_wrap=True)


def show_experience(experience: Finished, embedded: Measured, console: Console) -> None:
    """Print what `cherry experience` chose."""
    manifest = experience.manifest
    counts = manifest["rows_by_status"]
    console.print(status_table("Prompts", "status", counts, manifest["rows"]))
    sizes = sorted(cluster["rows"] for cluster in manifest["clusters"])
    lines = [
        f"{manifest['selected_rows']:,} rows of {len(sizes)} clusters, which have "
        f"{sizes[0]:,} to {sizes[-1]:,} rows (median {sizes[len(sizes) // 2]:,})",
    ]
    if empty := manifest["empty_clusters"]:
        lines.append(f"{empty} clusters are empty: so many prompts are alike")
    lines += [f"skipped: {visible(reason)}" for reason in embedded.skipped]
    lines += ["", f"subset   {experience.url}", f"manifest {experience.manifest_url}"]
    console.print(Group("", *(Text(line) for line in lines)), soft_wrap=True)


def show_trained(trained: Finished, console: Console) -> None:
    """Print what a training came to."""
    console.print(
        Group(*map(Text, _losses(trained)), Text(f"model    {trained.url}")), soft_wrap=True
    )


def _losses(trained: Finished) -> list[str]:
    """Loss at both ends, over a tenth of the steps each."""
    history = trained.manifest["history"]
    tenth = max(1, len(history) // 10)
    first, last = (
        sum(step["loss"] for step in steps) / tenth for steps in (history[:tenth], history[-tenth:])
    )
    return [
        f"trained on {trained.manifest['trained_on']}: {count(trained.manifest['rows'], 'row')}, "
        f"{count(len(history), 'step')}; loss {first:.3f} at first, {last:.3f} at last"
    ]


def show_garbage(garbage: Garbage, deleted: bool, console: Console) -> None:
    """Print what `cherry gc` found."""
    done = "deleted" if deleted else "could go; delete with --delete"
    lines = []
    if garbage.parts:
        of = f"{len(garbage.parts):,} of {count(garbage.num_parts, 'part')}"
        lines.append(f"{of}, {garbage.num_bytes:,} bytes: {done}")
    if garbage.uploads:
        lines.append(f"unfinished uploads and temporary files, {len(garbage.uploads):,}: {done}")
    if not lines:
        lines.append(f"nothing to delete: {count(garbage.num_parts, 'part')}, and no remains")
    if garbage.num_spared:
        spared = count(garbage.num_spared, "part")
        lines.append(f"{spared} younger than 24 hours: spared")
    if garbage.num_elsewhere:
        what = "part is" if garbage.num_elsewhere == 1 else "parts are"
        lines.append(
            f"{garbage.num_elsewhere:,} {what} another input's or damaged: left alone without --all"
        )
    names = [part.url for part in garbage.parts] + [upload.url for upload in garbage.uploads]
    lines += names[:_GARBAGE_SHOWN]
    if len(names) > _GARBAGE_SHOWN:
        lines.append(f"and {len(names) - _GARBAGE_SHOWN:,} more: all of them with --json")
    console.print(Group(*(Text(visible(line)) for line in lines)), soft_wrap=True)


def status_table(title: str, status_title: str, counts: dict[str, int], rows: int) -> Table:
    """Rows by status, in the order of STATUSES, and their shares."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column(status_title)
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for status in STATUSES:
        if count := counts.get(status):
            table.add_row(status, f"{count:,}", f"{100 * count / rows:.1f} %")
    table.add_row("all", f"{rows:,}", "", style="bold")
    return table


def _facts(result: Result) -> Group:
    summary = result.summary
    lines = [
        f"{count(summary.units_scored, 'unit')} scored, {summary.units_reused:,} reused"
        + (f", {rows:,} rows reused in all" if (rows := summary.rows_reused) else "")
        + (
            f"; {summary.tokens_scored:,} tokens at {summary.tokens_per_s:,.0f} tokens/s"
            if summary.tokens_per_s
            else ""
        )
        + f"; {summary.seconds:.1f} s in all"
    ]
    if result.selection:
        lines += selected(result.selection.manifest)
        if result.survey is None:
            lines.append("this selection was there already")
    if result.trained:
        lines += _losses(result.trained)
    lines += [f"skipped: {visible(reason)}" for reason in summary.skipped_shards]
    lines += [f"failed: {visible(reason)}" for reason in summary.failures]
    more = failed_rows(summary.rows_by_status) - len(summary.failures)
    if summary.failures and more:
        lines.append(f"and {more:,} more that failed; the parts say why")
    return Group("", *(Text(line) for line in lines), "")


def _samples(plan: Plan, rows: list[tuple[float, int, int]], title: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True, show_edge=False, expand=True)
    table.add_column("IFD", justify="right", no_wrap=True)
    table.add_column("prompt", ratio=1)
    table.add_column("response", ratio=1)
    for ratio, unit_index, row in rows:
        unit = plan.units[unit_index]
        names = [*unit.columns.names.values(), BAD_LINE]
        try:
            read = take_rows(unit.file, np.array([row]), names)
        except CherryError as err:  # all is done: what cannot be shown is no failure
            table.add_row(f"{ratio:.4f}", Text(plain(str(err))))
            continue
        sample = next(read_samples(read, unit.columns))
        prompt = " ".join(m.content for m in sample.messages if m.role in ("user", "input"))
        answer = " ".join(m.content for m in sample.messages if m.role == "assistant")
        table.add_row(f"{ratio:.4f}", Text(plain(prompt)), Text(plain(answer)))
    return table


def _files(summary: Summary) -> Group:
    lines = [f"scores   {summary.scores_path}"]
    if summary.cherry_path:
        lines += [f"cherry   {summary.cherry_path}", f"manifest {summary.manifest}"]
    if summary.trained_path:
        lines.append(f"model    {summary.trained_path}")
    return Group(*(Text(line) for line in lines))
