"""What a selection did, as the terminal shows it: from its manifest."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.texts import plain

_GROUPS_SHOWN = 20
_GROUP_NAME = 30
"""Characters shown of a group's name."""


def selected(manifest: dict[str, Any]) -> Iterator[str]:
    """What a selection did, in sentences."""
    settings, groups = manifest["settings"], manifest["groups"]
    asked, selected = manifest["asked_rows"], manifest["selected_rows"]
    of = {
        "all": f"all {manifest['rows']:,} rows",
        "scored": f"the {manifest['rows_by_status'].get('ok', 0):,} scored rows",
        "eligible": f"the {manifest['eligible_rows']:,} eligible rows",
    }[settings["of"]]
    wanted = ""
    if settings["fractions"]:
        wanted = f"{settings['fractions'][-1]} of {of}"
    elif settings["threshold"] is not None:
        side = "over" if settings["order"] == "descending" else "under"
        wanted = f"at or {side} {settings['threshold']:g}"
    yield f"{selected:,} rows kept{': ' if wanted else ''}{wanted}; " + (
        f"{manifest['eligible_rows']:,} are eligible"
    )
    if asked is not None and asked > selected:
        why = "fewer are eligible"
        if groups:
            why = "some groups have fewer"
        elif manifest["duplicate_rows"]:
            why = "fewer are eligible and different"
        yield f"{asked:,} were asked for: {why}"
    least = sum(min(settings["floor"], group["eligible_rows"]) for group in groups)
    if asked is not None and least > asked:
        yield f"the floor of {settings['floor']:,} does not fit: it was dealt out in turns"
    if manifest["cut"] is not None and not groups:
        yield f"the cut is at {settings['by']} {manifest['cut']:.6f}"
        tied, taken = manifest["rows_at_cut"], manifest["selected_at_cut"]
        if taken < tied:
            yield f"{tied:,} rows lie exactly at the cut: {taken:,} kept, by order of sample ids"
        elif tied > 1:
            yield f"{tied:,} rows lie exactly at the cut, all of them kept"
    for reason, count in manifest["rejected_rows"].items():
        if reason == "at_or_over_max_ifd":
            reason = f"at or over max_ifd ({settings['max_ifd']:g})"
        elif reason == "under_min_ifd":
            reason = f"under min_ifd ({settings['min_ifd']:g})"
        yield f"{count:,} scored rows not eligible: {reason}"
    if manifest["duplicate_rows"]:
        yield f"{manifest['duplicate_rows']:,} duplicates above the cut passed over"


def _budgets(manifest: dict[str, Any]) -> Table:
    """Where each of several budgets ends; under quotas the cuts are the groups' own."""
    columns = {"asked": "asked_rows", "kept": "selected_rows"}
    if not manifest["groups"]:
        columns |= {"rows at the cut": "rows_at_cut", "kept of them": "selected_at_cut"}
    table = Table(title="Budgets", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("fraction", *columns, *([] if manifest["groups"] else ["cut"])):
        table.add_column(name, justify="right")
    for budget in manifest["budgets"]:
        counts = [f"{budget[name]:,}" for name in columns.values()]
        cut = [] if manifest["groups"] else [_ratio(budget["cut"])]
        table.add_row(budget["fraction"], *counts, *cut)
    return table


def _groups(manifest: dict[str, Any]) -> Table:
    """The groups, those with the most rows first."""
    settings = manifest["settings"]
    groups = sorted(manifest["groups"], key=lambda group: -group["rows"])
    title = f"Groups by {plain(settings['group_by'])}"
    if len(settings["fractions"]) > 1:
        title += f", at {settings['fractions'][-1]}"
    if len(groups) > _GROUPS_SHOWN:
        title += f": {_GROUPS_SHOWN} of {len(groups):,}, all of them in the manifest"
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("group", overflow="ellipsis", no_wrap=True)
    for name in ("rows", "eligible", "asked", "kept", "cut"):
        table.add_column(name, justify="right")
    for group in groups[:_GROUPS_SHOWN]:
        asked = group["asked_rows"]
        table.add_row(
            _group_name(group["group"]),
            f"{group['rows']:,}",
            f"{group['eligible_rows']:,}",
            "" if asked is None else f"{asked:,}",
            f"{group['selected_rows']:,}",
            _ratio(group["cut"]),
        )
    return table


def _group_name(name: str | None) -> Text:
    """A name as text; null, and what would be taken for it or for nothing, is told apart."""
    if name is None:
        return Text("(null)", style="dim")
    shown = plain(name, _GROUP_NAME)
    return Text(f"'{shown}'" if shown in ("", "null", "(null)", "*") else shown)


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.6f}"


def tables(manifest: dict[str, Any]) -> Iterator[Table]:
    """Several budgets, and groups, where there are any."""
    if len(manifest["budgets"]) > 1:
        yield _budgets(manifest)
    if manifest["groups"]:
        yield _groups(manifest)
