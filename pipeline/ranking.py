"""Ranking: which rows are selected and in which order, without a sort of the corpus.

::

    gather    a task per group of parts: eligible rows down to the bin of the cut
    unique    a task per share of the sample ids: of each sample, the copy that ranks first
    arrange   a task per range of ranks: its rows, sorted
    keep      a task per range: the rows within their group's budget, and where the cuts fall

A range or share is about a million candidates of 40 bytes, whatever the corpus and however many
rows tie: ranges end at sampled rows and not at keys, and a task hands on one copy of each sample.
If copies among the rows down to the cut leave too few, the cut moves down.
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
from pipeline.config import Order
from pipeline.scores import (
    END_OF_KEYS,
    Keys,
    Task,
    first_keys,
    from_keys,
    read_scores,
    tasks,
    to_bins,
    to_keys,
)
from pipeline.survey import Kept, Survey
from pipeline.units import Plan

_ROWS_PER_RANGE = 1 << 20

CHOSEN = np.dtype([("rank", "<i8"), ("row", "<i8"), ("unit", "<u4"), ("level", "<u4")])
"""A selected row. Its level is the smallest budget, counted from 0, that it belongs to."""

Refs = list[Any]


@dataclass(frozen=True)
class Ranking:
    """The selected rows, and where the cuts fell. Arrays are by (level, group) unless said."""

    order: Order
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


def rank(plan: Plan, settings: SelectSettings, survey: Survey, kept: Refs, asked: Rows) -> Ranking:
    """Rank the rows of a plan, down to the budgets.

    Args:
        plan: Whose parts are there.
        settings: Of the selection.
        survey: Of the same parts, from `survey_parts`.
        kept: Likewise.
        asked: Rows asked for, by (level, group), from `asked_rows`.
    """
    find = _unique_runs if settings.duplicates == "drop" else _plain_runs
    runs, copies = find(_Search(plan, settings, survey, kept), asked[-1])
    ranges = _arrange_runs(runs, len(survey.groups))
    return _keep_ranges(ranges, copies, settings, asked)


@dataclass(frozen=True)
class _Run:
    """Sorted candidates in the object store."""

    rows: Any
    outline: Any
    """How many they are, and some of them at equal distances: from these, ranges are cut."""


class _Search:
    """Passes over the parts of a plan, each down to a bin of every group."""

    def __init__(self, plan: Plan, settings: SelectSettings, survey: Survey, kept: Refs) -> None:
        self.survey = survey
        self.tasks = list(tasks(plan))
        self._kept = kept
        self._settings = settings
        self._end = END_OF_KEYS
        if settings.threshold is not None:
            self._end = to_keys(np.array([settings.threshold]), settings.order)[0] + np.uint64(1)

    def bins_holding(self, wanted: Rows) -> Rows:
        """As the survey's, but not beyond the threshold."""
        last = to_bins(np.array([self._end - np.uint64(1)]))
        return np.minimum(self.survey.bins_holding(wanted), last)

    def gather(self, after: Rows, up_to: Rows, num_shares: int, step: int) -> list[list[Any]]:
        """Look for candidates in bins after..up_to of each group.

        Returns:
            Of each task: references to sorted candidates by share of the sample ids, to the copies
            that were left out, and to an outline of the first share.
        """
        job: Any = _gather.options(num_returns=num_shares + 2)
        first, end = first_keys(after + 1), np.minimum(first_keys(up_to + 1), self._end)
        args = (self._settings, self.survey.groups, first, end, num_shares, step)
        return [
            job.remote(task, kept, *args) for task, kept in zip(self.tasks, self._kept, strict=True)
        ]


def _plain_runs(search: _Search, asked: Rows) -> tuple[list[_Run], Refs]:
    """Sorted runs of candidates, copies and all."""
    up_to = search.bins_holding(asked)
    gathered = search.gather(np.full_like(up_to, -1), up_to, 1, _step(len(search.tasks)))
    return [_Run(rows, outline) for rows, _, outline in gathered], []


def _unique_runs(search: _Search, asked: Rows) -> tuple[list[_Run], Refs]:
    """Sorted runs of candidates with different sample ids; and the copies that were left out.

    Which copy of a sample counts does not depend on the quotas: rows of all groups are looked at
    down to the lowest cut of any.
    """
    survey, everywhere = search.survey, np.ones_like(asked)
    last = search.bins_holding(survey.eligible)
    looked, limit, passes = -1, int(search.bins_holding(asked).max()), 0
    unique = np.zeros_like(asked)
    num_shares = _num_ranges(survey.rows_up_to(limit).sum())
    runs: list[list[_Run]] = [[] for _ in range(num_shares)]
    copies: Refs = []
    while limit > looked:
        gathered = search.gather(everywhere * looked, everywhere * limit, num_shares, 1 << 62)
        counts = []
        for share, found in zip(runs, zip(*gathered, strict=True), strict=False):
            job: Any = _unique.options(num_returns=4)
            known = [run.rows for run in share]
            rows, later, outline, count = job.remote(
                len(asked), _step(4 * num_shares), len(known), *known, *found
            )
            share.append(_Run(rows, outline))
            copies.append(later)
            counts.append(count)
        copies += [found[num_shares] for found in gathered]
        unique += np.sum(ray.get(counts), axis=0)
        looked, passes = limit, passes + 1
        short = (unique < asked) & (last > looked)
        if short.any():
            # As many copies among the next rows as so far; twice as many with every pass.
            seen = survey.rows_up_to(looked)
            missing = (asked - unique) * seen // np.maximum(unique, 1) + 1
            wanted = np.where(short, seen + (missing << (passes - 1)), 0)
            limit = int(search.bins_holding(wanted).max())
    return [run for share in runs for run in share], copies


def _arrange_runs(runs: list[_Run], num_groups: int) -> list[tuple[Any, Rows]]:
    """Ranges of ranks in their order: a reference to the sorted rows, and rows by group."""
    outlines = ray.get([run.outline for run in runs])
    num_ranges = _num_ranges(sum(length for length, _ in outlines))
    pieces: list[Sequence[Any]] = [[run.rows for run in runs]]
    if num_ranges > 1:
        samples = candidates.in_order(np.concatenate([some for _, some in outlines]))
        ends = samples[np.arange(1, num_ranges) * len(samples) // num_ranges]
        scatter: Any = _scatter.options(num_returns=num_ranges)
        pieces = list(zip(*[scatter.remote(run.rows, ends) for run in runs], strict=True))
    arrange: Any = _arrange.options(num_returns=2)
    arranged = [arrange.remote(num_groups, *some) for some in pieces]
    counts = ray.get([count for _, count in arranged])
    return [(ranked, count) for (ranked, _), count in zip(arranged, counts, strict=True)]


def _step(num_runs: int) -> int:
    """Distance of the rows in an outline: no range gets more than an eighth too many."""
    return max(1, _ROWS_PER_RANGE // (8 * num_runs))


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
        order=settings.order,
        chosen=[chosen for chosen, _ in jobs],
        selected=np.minimum(asked, there),
        cuts=np.where(found, from_keys(keys, settings.order), np.nan),
        rows_at_cut=rows_at_cut,
        selected_at_cut=selected_at_cut,
        duplicates=np.sum(passed, axis=0) if passed else np.zeros_like(there),
    )


def _num_ranges(num_rows: int) -> int:
    return max(1, -(-int(num_rows) // _ROWS_PER_RANGE))


@ray.remote
def _gather(
    task: Task,
    kept: Kept,
    settings: SelectSettings,
    groups: tuple[str | None, ...],
    first_keys: Keys,
    end_keys: Keys,
    num_shares: int,
    step: int,
) -> tuple[Any, ...]:
    if end_keys.max() <= kept.end_key:
        ranked = kept.rows[slice(*np.searchsorted(kept.rows["key"], [first_keys[0], end_keys[0]]))]
    else:
        codes = {group: code for code, group in enumerate(groups)}
        scores = read_scores(task, settings, codes, "sample_id")
        at = np.flatnonzero(scores.eligible)
        keys, group = to_keys(scores.ratios[at], settings.order), scores.groups[at]
        inside = np.flatnonzero((keys >= first_keys[group]) & (keys < end_keys[group]))
        ranked = candidates.make(task, scores, at[inside], keys[inside])
    if settings.duplicates == "keep":
        return ranked, ranked[:0], _outline(ranked, step)
    first = candidates.first_copies(ranked)
    unique, copies = ranked[first], ranked[~first]
    share = ((unique["id_high"] >> np.uint64(32)) * np.uint64(num_shares)) >> np.uint64(32)
    shares = [unique[share == number] for number in range(num_shares)]
    return *shares, copies, _outline(shares[0], step)


@ray.remote
def _unique(
    num_groups: int, step: int, num_known: int, *runs: Candidates
) -> tuple[Candidates, Candidates, tuple[int, Candidates], Rows]:
    """First copies among the rows of a share; those of the first `num_known` runs are known."""
    start = sum(len(run) for run in runs[:num_known])
    rows = candidates.in_order(np.concatenate(runs))  # those that are known rank ahead of the rest
    first = candidates.first_copies(rows)
    rows, first = rows[start:], first[start:]
    unique = rows[first]
    counts = np.bincount(unique["group"], minlength=num_groups)
    return unique, rows[~first], _outline(unique, step), counts


def _outline(run: Candidates, step: int) -> tuple[int, Candidates]:
    return len(run), run[step // 2 :: step].copy()


@ray.remote
def _scatter(run: Candidates, ends: Candidates) -> tuple[Candidates, ...]:
    """A sorted run, cut where rows rank at or after each of `ends`."""
    cuts = []
    for end in ends:
        low, high = np.searchsorted(run["key"], [end["key"], end["key"] + np.uint64(1)])
        cuts.append(low + np.count_nonzero(candidates.before(run[low:high], end)))
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
    ranked: Candidates, starts: Rows, asked: Rows, keys: Rows, found: npt.NDArray[np.bool_]
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
