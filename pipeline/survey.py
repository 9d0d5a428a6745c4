"""The survey: what one pass over the parts says of a corpus, group by group."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from pipeline import candidates
from pipeline.budgets import Rows, SelectSettings
from pipeline.candidates import CANDIDATE, Candidates
from pipeline.errors import ConfigError
from pipeline.scores import (
    END_OF_KEYS,
    NUM_BINS,
    Keys,
    Task,
    from_keys,
    read_scores,
    tasks,
    to_bins,
    to_keys,
)
from pipeline.units import Plan

_EXTREMES = 5
_MOST_GROUPS = 100_000
_MERGED_AT_ONCE = 8
_KEEP_MORE, _KEEP_LEAST = 1.25, 1000
"""Where shards differ no more than that, and hold no more copies, no part is read twice."""

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


@dataclass(frozen=True)
class Early:
    """Candidates that a task found while it surveyed its parts: all that rank ahead of a key."""

    rows: Candidates
    """Sorted."""
    end_key: np.uint64


def survey_parts(plan: Plan, settings: SelectSettings) -> tuple[Survey, list[Any]]:
    """Look at every part once, in Ray tasks.

    Returns:
        The survey, and of each task a reference to early candidates, so that most parts need no
        second look: somewhat more than its share of the rows that are asked for.

    Raises:
        ConfigError: `group_by` has so many values that they are no groups.
    """
    share = 0.0
    if not settings.group_by and settings.threshold is None:
        count = settings.count or 0
        share = max([count / max(1, plan.num_rows), *map(float, settings.fractions)])
    job: Any = _survey.options(num_returns=2)
    jobs = []
    for task in tasks(plan):
        most = math.ceil(_KEEP_MORE * share * task.num_rows) + _KEEP_LEAST if share else 0
        jobs.append(job.remote(task, settings, most))
    surveys = [survey for survey, _ in jobs]
    while len(surveys) > _MERGED_AT_ONCE:  # many groups make large surveys: not all of them here
        surveys = [
            _merge_some.remote(*surveys[start : start + _MERGED_AT_ONCE])
            for start in range(0, len(surveys), _MERGED_AT_ONCE)
        ]
    return _merge(ray.get(surveys)), [early for _, early in jobs]


@ray.remote
def _merge_some(*surveys: Survey) -> Survey:
    return _merge(surveys)


@ray.remote
def _survey(task: Task, settings: SelectSettings, most: int) -> tuple[Survey, Early]:
    """Look at the parts of one task."""
    codes: dict[str | None, int] = {} if settings.group_by else {None: 0}
    scores = read_scores(task, settings, codes, *(["sample_id"] if most else []))
    at = np.flatnonzero(scores.eligible)
    keys = to_keys(scores.ratios[at], settings.order)
    numbers = scores.groups[at] * NUM_BINS + to_bins(keys)
    first, last = (
        _rows_at(task, at[places], from_keys(keys[places], settings.order))
        for places in (_first(keys), _first(~keys))
    )
    survey = Survey(
        groups=tuple(codes),
        rows_by_status=scores.rows_by_status,
        rejected=scores.rejected,
        rows=_count(scores.groups, len(codes)),
        scored=_count(scores.groups[scores.ok], len(codes)),
        cells=_cells(*np.unique(numbers, return_counts=True)),
        highest=first if settings.order == "descending" else last,
        lowest=last if settings.order == "descending" else first,
    )
    if not most:
        return survey, Early(np.empty(0, CANDIDATE), np.uint64(0))
    end_key = np.partition(keys, most)[most] if most < len(keys) else END_OF_KEYS
    inside = np.flatnonzero(keys < end_key)
    return survey, Early(candidates.make(task, scores, at[inside], keys[inside]), end_key)


def _count(codes: Rows, num_groups: int) -> Rows:
    return np.bincount(codes, minlength=num_groups) if num_groups > 1 else np.array([len(codes)])


def _rows_at(task: Task, at: Rows, ratios: npt.NDArray[np.float64]) -> list[Extreme]:
    units, rows = task.locate(at)
    return list(zip(ratios.tolist(), units.tolist(), rows.tolist(), strict=True))


def _merge(surveys: Sequence[Survey]) -> Survey:
    values = {group for survey in surveys for group in survey.groups}
    groups = tuple(sorted(values, key=lambda value: (value is None, value or "")))
    if len(groups) > _MOST_GROUPS:
        raise ConfigError(
            f"key 'select.group_by': the column has over {_MOST_GROUPS:,} values, expected groups "
            "such as sources or languages. Name another column."
        )
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
        cells=_merged(cells),
        highest=highest[:_EXTREMES],
        lowest=lowest[:_EXTREMES],
    )


def _cells(numbers: Rows, rows: Rows) -> pa.Table:
    """Cells that are numbered group * NUM_BINS + bin, as a table."""
    return pa.table({"group": numbers // NUM_BINS, "bin": numbers % NUM_BINS, "rows": rows})


def _merged(cells: pa.Table) -> pa.Table:
    """Cells with equal group and bin made one."""
    group, bins, rows = (cells[name].to_numpy() for name in cells.schema.names)
    numbers, at = np.unique(group * NUM_BINS + bins, return_inverse=True)
    return _cells(numbers, _sums(at, rows, len(numbers)))


def _sums(at: Rows, rows: Rows, size: int) -> Rows:
    sums = np.zeros(size, np.int64)
    np.add.at(sums, at, rows)
    return sums


def _first(keys: Keys) -> Rows:
    """Where the smallest keys are, a few of them; ties in the order they come in."""
    last = np.partition(keys, _EXTREMES - 1)[_EXTREMES - 1] if len(keys) > _EXTREMES else None
    at = np.arange(len(keys)) if last is None else np.flatnonzero(keys <= last)
    return at[np.argsort(keys[at], kind="stable")][:_EXTREMES]
