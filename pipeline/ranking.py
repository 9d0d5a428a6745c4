"""Ranking: which rows are selected and in which order, without a sort of the corpus.

::

    gather    see gathering.py: sorted runs of the rows down to the bin of the cut
    arrange   a task per range of ranks: its rows, sorted
    keep      a task per range: the rows within their group's budget, and where the cuts fall

A range is about a million candidates of 40 bytes, whatever the corpus and however many rows tie:
ranges end at rows that were sampled from the runs, and not at keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from pipeline import candidates
from pipeline.budgets import Rows, SelectSettings
from pipeline.candidates import CANDIDATE, Candidates
from pipeline.gathering import Refs, Run, find_runs, num_ranges
from pipeline.scores import Keys, from_keys
from pipeline.survey import Survey
from pipeline.units import Plan

CHOSEN = np.dtype([("rank", "<i8"), ("row", "<i8"), ("unit", "<u4"), ("level", "<u4")])
"""A selected row. Its level is the smallest budget, counted from 0, that it belongs to."""


@dataclass(frozen=True)
class Ranking:
    """The selected rows, and where the cuts fell. Arrays are by (level, group) unless said."""

    chosen: Refs
    """Arrays of CHOSEN, in the order of ranks, in the object store."""
    selected: Rows
    cuts: npt.NDArray[np.float64]
    """The ratio of the last row; NaN where there is none."""
    rows_at_cut: Rows
    """Rows with exactly that ratio, each sample once."""
    selected_at_cut: Rows
    """How many of them were selected; the order of their sample ids decides."""
    duplicates: Rows
    """By group: copies that rank ahead of the last row, passed over."""


def rank(plan: Plan, settings: SelectSettings, survey: Survey, early: Refs, asked: Rows) -> Ranking:
    """Rank the rows of a plan, down to the budgets.

    Args:
        plan: Whose parts are there.
        settings: Of the selection.
        survey: Of the same parts, from `survey_parts`.
        early: Likewise.
        asked: Rows asked for, by (level, group), from `asked_rows`.
    """
    runs, copies = find_runs(plan, settings, survey, early, asked[-1])
    ranges = _arrange_runs(runs, len(survey.groups))
    return _keep_ranges(ranges, copies, settings, asked)


def _arrange_runs(runs: list[Run], num_groups: int) -> list[tuple[Any, Rows]]:
    """Ranges of ranks in their order: a reference to the sorted rows, and rows by group."""
    outlines = ray.get([run.outline for run in runs])
    total = num_ranges(sum(length for length, _ in outlines))
    pieces: list[Sequence[Any]] = [[run.rows for run in runs]]
    if total > 1:
        samples = candidates.in_order(np.concatenate([some for _, some in outlines]))
        ends = samples[np.arange(1, total) * len(samples) // total]
        scatter: Any = _scatter.options(num_returns=total)
        pieces = list(zip(*[scatter.remote(run.rows, ends) for run in runs], strict=True))
    arrange: Any = _arrange.options(num_returns=2)
    arranged = [arrange.remote(num_groups, *some) for some in pieces]
    counts = ray.get([count for _, count in arranged])
    return [(ranked, count) for (ranked, _), count in zip(arranged, counts, strict=True)]


def _keep_ranges(
    ranges: list[tuple[Any, Rows]], copies: Refs, settings: SelectSettings, asked: Rows
) -> Ranking:
    counts = np.array([count for _, count in ranges])
    starts = np.cumsum(counts, axis=0) - counts
    there = counts.sum(axis=0)
    kept = np.clip(asked[-1] - starts, 0, counts).sum(axis=1)
    first_ranks = np.cumsum(kept) - kept
    keep: Any = _keep.options(num_returns=2)
    jobs = [
        keep.remote(ranked, starts[i], asked, int(first_ranks[i]))
        for i, (ranked, _) in enumerate(ranges)
    ]
    last_rows, found = np.zeros(asked.shape, CANDIDATE), np.zeros(asked.shape, np.bool_)
    for rows, here in ray.get([ends for _, ends in jobs]):
        last_rows, found = np.where(here, rows, last_rows), found | here
    keys = last_rows["key"]
    ties = ray.get(
        [
            _count_ties.remote(ranked, starts[i], asked, keys, found)
            for i, (ranked, _) in enumerate(ranges)
        ]
    )
    rows_at_cut, selected_at_cut = np.sum(ties, axis=0)
    all_taken = there < asked[-1]  # every copy was passed over
    passed = ray.get(
        [_count_copies.remote(some, last_rows[-1], found[-1], all_taken) for some in copies]
    )
    return Ranking(
        chosen=[chosen for chosen, _ in jobs],
        selected=np.minimum(asked, there),
        cuts=np.where(found, from_keys(keys, settings.order), np.nan),
        rows_at_cut=rows_at_cut,
        selected_at_cut=selected_at_cut,
        duplicates=np.sum(passed, axis=0) if passed else np.zeros_like(there),
    )


@ray.remote
def _scatter(run: Candidates, ends: Candidates) -> tuple[Candidates, ...]:
    """A sorted run, cut where rows rank at or after each of `ends`."""
    columns = [np.ascontiguousarray(run[name]) for name in candidates.RANK]
    cuts = []
    for end in ends:
        low, high = 0, len(run)
        for name, column in zip(candidates.RANK, columns, strict=True):  # down to rows that tie
            tied = column[low:high]
            first, last = (np.searchsorted(tied, end[name], side=s) for s in ("left", "right"))
            low, high = low + int(first), low + int(last)
        cuts.append(low)
    return tuple(np.split(run, cuts))


@ray.remote
def _arrange(num_groups: int, *pieces: Candidates) -> tuple[Candidates, Rows]:
    ranked = candidates.in_order(np.concatenate([np.empty(0, CANDIDATE), *pieces]))
    return ranked, np.bincount(ranked["group"], minlength=num_groups)


@ray.remote
def _keep(
    ranked: Candidates, starts: Rows, asked: Rows, first_rank: int
) -> tuple[npt.NDArray[Any], tuple[Candidates, npt.NDArray[np.bool_]]]:
    """The selected rows of a range, and the last of them by (level, group) where there is one."""
    levels = _levels(ranked, starts, asked)
    kept = levels < len(asked)
    rows, levels = ranked[kept], levels[kept]
    chosen = np.empty(len(rows), CHOSEN)
    chosen["rank"] = np.arange(first_rank, first_rank + len(rows))
    chosen["row"], chosen["unit"], chosen["level"] = rows["row"], rows["unit"], levels
    last, found = np.zeros(asked.shape, CANDIDATE), np.zeros(asked.shape, np.bool_)
    for level in range(len(asked)):
        some = np.flatnonzero(levels <= level)
        at = np.full(asked.shape[1], -1)
        at[rows["group"][some]] = some  # the last one stays
        found[level] = at >= 0
        last[level][found[level]] = rows[at[found[level]]]
    return chosen, (last, found)


@ray.remote
def _count_ties(
    ranked: Candidates, starts: Rows, asked: Rows, keys: Keys, found: npt.NDArray[np.bool_]
) -> tuple[Rows, Rows]:
    """Rows of a range exactly at each cut, and the selected ones of them, by (level, group)."""
    levels, group = _levels(ranked, starts, asked), ranked["group"]
    at_cut, selected = np.zeros((2, *asked.shape), np.int64)
    for level in range(len(asked)):
        tied = (ranked["key"] == keys[level][group]) & found[level][group]
        at_cut[level] = np.bincount(group[tied], minlength=asked.shape[1])
        selected[level] = np.bincount(group[tied & (levels <= level)], minlength=asked.shape[1])
    return at_cut, selected


@ray.remote
def _count_copies(
    copies: Candidates, last: Candidates, found: npt.NDArray[np.bool_], all_taken: Any
) -> Rows:
    """By group: copies that rank ahead of the group's last row, or all where all rows are taken."""
    group = copies["group"]
    ahead = candidates.before(copies, last[group]) & found[group]
    return np.bincount(group[ahead | all_taken[group]], minlength=len(last))


def _levels(ranked: Candidates, starts: Rows, asked: Rows) -> Rows:
    """The smallest budget that each row of a range belongs to; len(asked) where to none.

    Args:
        ranked: Rows of the range, sorted.
        starts: By group: rows in earlier ranges.
        asked: By (level, group).
    """
    group = ranked["group"]
    place = np.arange(len(ranked))
    if len(starts) > 1:  # its place among the rows of its group
        order = np.argsort(group, kind="stable")
        before = np.searchsorted(group[order], np.arange(len(starts)))
        place[order] = place - before[group[order]]
    place += starts[group]
    return np.asarray((place >= asked[:, group]).sum(axis=0))
