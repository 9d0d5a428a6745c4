"""The survey: what one pass over the parts says of a corpus, group by group."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import ray

from pipeline.budgets import Rows, SelectSettings
from pipeline.scores import (
    NUM_BINS,
    Keys,
    Task,
    count_values,
    eligible_rows,
    encode,
    from_keys,
    read_groups,
    read_scores,
    score_columns,
    tasks,
    to_bins,
    to_keys,
)
from pipeline.units import Plan

_EXTREMES = 5

Extreme = tuple[float, int, int]
"""(ratio, unit, row) of one row."""


@dataclass(frozen=True)
class Survey:
    """What the parts say. Arrays are by group; without `group_by` there is one, all rows."""

    groups: tuple[str | None, ...]
    """Values of the groups, sorted, null last."""
    rows_by_status: Counter[str]
    rejected: Counter[str]
    """Rows with status ok that are not eligible, by reason."""
    rows: Rows
    scored: Rows
    """Rows with status ok."""
    cells: pa.Table
    """Eligible rows by (group, bin), sorted; only those that have any."""
    highest: list[Extreme]
    """Of the eligible rows, highest ratio first; ties by unit and row."""
    lowest: list[Extreme]

    @cached_property
    def eligible(self) -> Rows:
        """Rows that may be selected."""
        return self.rows_up_to(NUM_BINS)

    def rows_up_to(self, last_bin: int) -> Rows:
        """Eligible rows in bins up to and with `last_bin`."""
        within = self.cells["bin"].to_numpy() <= last_bin
        groups, rows = (self.cells[name].to_numpy() for name in ("group", "rows"))
        return _sums(groups, rows * within, len(self.groups))

    def bins_holding(self, wanted: Rows) -> Rows:
        """The bin of each group down to which `wanted` rows lie; its last one if it has fewer.

        -1 where no row is wanted, or there is none.
        """
        found = np.full(len(self.groups), -1, np.int64)
        bins, rows = self.cells["bin"].to_numpy(), self.cells["rows"].to_numpy()
        numbers = np.arange(len(self.groups) + 1)
        edges = np.searchsorted(self.cells["group"].to_numpy(), numbers)
        for group in np.flatnonzero((edges[1:] > edges[:-1]) & (wanted > 0)):
            start, end = edges[group : group + 2]
            at = np.searchsorted(np.cumsum(rows[start:end]), wanted[group])
            found[group] = bins[start + min(int(at), end - start - 1)]
        return found


def survey_parts(plan: Plan, settings: SelectSettings) -> Survey:
    """Look at every part once, in Ray tasks."""
    return _merge(ray.get([_survey.remote(task, settings) for task in tasks(plan)]))


@ray.remote
def _survey(task: Task, settings: SelectSettings) -> Survey:
    """Look at the parts of one task."""
    rows_by_status: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    codes: dict[str | None, int] = {} if settings.group_by else {None: 0}
    columns: list[tuple[Rows, Rows, Rows, Keys, Rows, Rows]] = []
    parts = read_scores(task, score_columns(settings))
    for index, (unit, part) in enumerate(zip(task.units, parts, strict=True), task.first_unit):
        rows_by_status += count_values(part["status"])
        scores = eligible_rows(part, settings)
        rejected += scores.rejected
        code = np.zeros(len(part), np.int64)
        if settings.group_by:
            code = encode(read_groups(unit, settings.group_by), codes)
        at = np.flatnonzero(scores.eligible)
        keys = to_keys(scores.ratios[at], settings.order)
        where = np.full(len(at), index), at + unit.start
        columns.append((code, code[scores.ok], code[at], keys, *where))
    code, code_of_ok, code_of_eligible, keys, units, rows = map(
        np.concatenate, zip(*columns, strict=True)
    )
    ratios = from_keys(keys, settings.order)
    first, last = (
        [(float(ratios[i]), int(units[i]), int(rows[i])) for i in _first(some).tolist()]
        for some in (keys, ~keys)
    )
    return Survey(
        groups=tuple(codes),
        rows_by_status=rows_by_status,
        rejected=rejected,
        rows=np.bincount(code, minlength=len(codes)),
        scored=np.bincount(code_of_ok, minlength=len(codes)),
        cells=_cells(code_of_eligible, to_bins(keys), np.ones(len(keys), np.int64)),
        highest=first if settings.order == "descending" else last,
        lowest=last if settings.order == "descending" else first,
    )


def _merge(surveys: Sequence[Survey]) -> Survey:
    values = {group for survey in surveys for group in survey.groups}
    groups = tuple(sorted(values, key=lambda value: (value is None, value or "")))
    code_of = {group: code for code, group in enumerate(groups)}
    codes = [np.array([code_of[group] for group in s.groups], np.int64) for s in surveys]
    cells = pa.concat_tables(
        s.cells.set_column(0, "group", [pa.array(code[s.cells["group"].to_numpy()])])
        for s, code in zip(surveys, codes, strict=True)
    )
    code = np.concatenate(codes)
    highest = sorted((e for s in surveys for e in s.highest), key=lambda e: (-e[0], e[1:]))
    lowest = sorted(e for s in surveys for e in s.lowest)
    return Survey(
        groups=groups,
        rows_by_status=sum((s.rows_by_status for s in surveys), Counter()),
        rejected=sum((s.rejected for s in surveys), Counter()),
        rows=_sums(code, np.concatenate([s.rows for s in surveys]), len(groups)),
        scored=_sums(code, np.concatenate([s.scored for s in surveys]), len(groups)),
        cells=_cells(*(cells[name].to_numpy() for name in ("group", "bin", "rows"))),
        highest=highest[:_EXTREMES],
        lowest=lowest[:_EXTREMES],
    )


def _cells(groups: Rows, bins: Rows, rows: Rows) -> pa.Table:
    """Rows added up by (group, bin)."""
    cells, at = np.unique(groups * NUM_BINS + bins, return_inverse=True)
    sums = _sums(at, rows, len(cells))
    return pa.table({"group": cells // NUM_BINS, "bin": cells % NUM_BINS, "rows": sums})


def _sums(at: Rows, rows: Rows, size: int) -> Rows:
    sums = np.zeros(size, np.int64)
    np.add.at(sums, at, rows)
    return sums


def _first(keys: Keys) -> Rows:
    """Where the smallest keys are, a few of them; ties in the order they come in."""
    last = np.partition(keys, _EXTREMES - 1)[_EXTREMES - 1] if len(keys) > _EXTREMES else None
    at = np.arange(len(keys)) if last is None else np.flatnonzero(keys <= last)
    return at[np.argsort(keys[at], kind="stable")][:_EXTREMES]
