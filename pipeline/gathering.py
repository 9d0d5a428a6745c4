"""Gathering: the candidates of a selection from all parts, in sorted runs.

::

    gather    a task per group of parts: eligible rows down to the bin of the cut; of copies of a
              sample among them, the first
    unique    a task per share of the sample ids: of copies over all tasks, the first

If copies among the rows down to the cut leave too few, the cut moves down. A share is about a
million candidates, and eight at the most, because a task hands on one copy of each sample.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from pipeline import candidates
from pipeline.budgets import Rows, SelectSettings
from pipeline.candidates import Candidates
from pipeline.scores import (
    END_OF_KEYS,
    Keys,
    Task,
    first_keys,
    read_scores,
    tasks,
    to_bins,
    to_keys,
)
from pipeline.survey import Early, Survey
from pipeline.units import Plan

ROWS_PER_RANGE = 1 << 20
"""Candidates that one task sorts."""

_MOST_ROWS_PER_SHARE = 1 << 23

Refs = list[Any]


@dataclass(frozen=True)
class Run:
    """Sorted candidates in the object store."""

    rows: Any
    outline: Any
    """How many they are, and some of them at equal distances: from these, ranges are cut."""


def find_runs(
    plan: Plan, settings: SelectSettings, survey: Survey, early: Refs, asked: Rows
) -> tuple[list[Run], Refs]:
    """Find the rows that may be among those asked for, and the copies that were left out.

    Args:
        plan: Whose parts are there.
        settings: Of the selection.
        survey: Of the same parts, from `survey_parts`.
        early: Likewise.
        asked: Rows asked for, by group.
    """
    search = _Search(plan, settings, survey, early)
    return (_unique_runs if settings.duplicates == "drop" else _plain_runs)(search, asked)


def num_ranges(num_rows: int) -> int:
    """Tasks that sort so many candidates."""
    return max(1, -(-int(num_rows) // ROWS_PER_RANGE))


class _Search:
    """Passes over the parts of a plan, each down to a bin of every group."""

    def __init__(self, plan: Plan, settings: SelectSettings, survey: Survey, early: Refs) -> None:
        self.survey = survey
        self.tasks = list(tasks(plan))
        self._early = early
        self._settings = settings
        self._end = END_OF_KEYS
        if settings.threshold is not None:
            self._end = to_keys(np.array([settings.threshold]), settings.order)[0] + np.uint64(1)

    def bins_holding(self, wanted: Rows) -> Rows:
        """As the survey's, but not beyond the threshold."""
        last = to_bins(np.array([self._end - np.uint64(1)]))
        return np.minimum(self.survey.bins_holding(wanted), last)

    def gather(self, after: Rows, up_to: Rows, num_shares: int, step: int = 1) -> list[list[Any]]:
        """Look for candidates in bins after..up_to of each group.

        Returns:
            Of each task: references to sorted candidates by share of the sample ids, to the copies
            that were left out, and, where copies stay, to the outline.
        """
        job: Any = _gather.options(num_returns=num_shares + 2)
        first, end = first_keys(after + 1), np.minimum(first_keys(up_to + 1), self._end)
        args = (self._settings, self.survey.groups, first, end, num_shares, step)
        early = zip(self.tasks, self._early, strict=True)
        return [job.remote(task, rows, *args) for task, rows in early]


def _plain_runs(search: _Search, asked: Rows) -> tuple[list[Run], Refs]:
    """Sorted runs of candidates, copies and all."""
    up_to = search.bins_holding(asked)
    gathered = search.gather(np.full_like(up_to, -1), up_to, 1, _step(len(search.tasks)))
    return [Run(rows, outline) for rows, _, outline in gathered], []


def _unique_runs(search: _Search, asked: Rows) -> tuple[list[Run], Refs]:
    """Sorted runs of candidates with different sample ids; and the copies that were left out.

    Which copy of a sample counts does not depend on the quotas: rows of all groups are looked at
    down to the lowest cut of any.
    """
    survey, everywhere = search.survey, np.ones_like(asked)
    last = search.bins_holding(survey.eligible)
    looked, limit, passes = -1, int(search.bins_holding(asked).max()), 0
    unique = np.zeros_like(asked)
    num_shares = num_ranges(survey.rows_up_to(limit).sum())
    num_shares = max(num_shares, int(survey.eligible.sum()) // _MOST_ROWS_PER_SHARE)
    runs: list[list[Run]] = [[] for _ in range(num_shares)]
    copies: Refs = []
    while limit > looked:
        gathered = search.gather(everywhere * looked, everywhere * limit, num_shares)
        counts = []
        for share, found in zip(runs, zip(*gathered, strict=True), strict=False):
            job: Any = _unique.options(num_returns=4)
            known = [run.rows for run in share]
            step = _step(4 * num_shares)  # runs of four passes: there are hardly more
            rows, later, outline, count = job.remote(len(asked), step, len(known), *known, *found)
            share.append(Run(rows, outline))
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


def _step(num_runs: int) -> int:
    """Distance of the rows in an outline: no range gets more than an eighth too many."""
    return max(1, ROWS_PER_RANGE // (8 * num_runs))


@ray.remote
def _gather(
    task: Task,
    early: Early,
    settings: SelectSettings,
    groups: tuple[str | None, ...],
    begin_keys: Keys,
    end_keys: Keys,
    num_shares: int,
    step: int,
) -> tuple[Any, ...]:
    if end_keys.max() <= early.end_key:
        within = np.searchsorted(early.rows["key"], [begin_keys[0], end_keys[0]])
        ranked = early.rows[slice(*within)]
    else:
        codes = {group: code for code, group in enumerate(groups)}
        scores = read_scores(task, settings, codes, "sample_id")
        at = np.flatnonzero(scores.eligible)
        keys, group = to_keys(scores.ratios[at], settings.order), scores.groups[at]
        inside = np.flatnonzero((keys >= begin_keys[group]) & (keys < end_keys[group]))
        ranked = candidates.make(task, scores, at[inside], keys[inside])
    if settings.duplicates == "keep":
        return ranked, ranked[:0], _outline(ranked, step)
    first = candidates.first_copies(ranked)
    unique, copies = ranked[first], ranked[~first]
    share = ((unique["id_high"] >> np.uint64(32)) * np.uint64(num_shares)) >> np.uint64(32)
    order = np.argsort(share, kind="stable")  # within a share they stay sorted
    shares = np.split(unique[order], np.searchsorted(share[order], np.arange(1, num_shares)))
    return *shares, copies, None


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
