"""Candidates: ranks, copies, and comparisons, against plain Python."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scored_corpus import IDS, RATIOS

from pipeline import candidates
from pipeline.scores import to_keys

ROWS = st.lists(
    st.tuples(
        RATIOS | st.just(0.5), IDS | st.just(b"x" * 16), st.integers(0, 3), st.integers(0, 9)
    ),
    max_size=40,
)
Rows = list[tuple[float, bytes, int, int]]


def make(rows: Rows) -> Any:
    found = np.zeros(len(rows), candidates.CANDIDATE)
    if not rows:
        return found
    found["key"] = to_keys(np.array([row[0] for row in rows]), "descending")
    ids = np.array([row[1] for row in rows], "S16").view(">u8").reshape(-1, 2)
    found["id_high"], found["id_low"] = ids.T
    found["unit"], found["row"] = np.array([row[2:] for row in rows]).T
    return found


def order(row: tuple[float, bytes, int, int]) -> tuple[Any, ...]:
    return (-row[0], *row[1:])


@given(ROWS)
def test_ranks_are_those_of_a_plain_sort(rows: Rows) -> None:
    ranked = candidates.in_order(make(rows))
    assert ranked.tolist() == make(sorted(rows, key=order)).tolist()


@given(ROWS)
def test_first_copies(rows: Rows) -> None:
    ids = [name for _, name, _, _ in sorted(rows, key=order)]
    mask = candidates.first_copies(candidates.in_order(make(rows)))
    assert mask.tolist() == [name not in ids[:n] for n, name in enumerate(ids)]


@given(ROWS)
def test_before_compares_whole_ranks(rows: Rows) -> None:
    others = rows[::-1]
    ahead = candidates.before(make(rows), make(others))
    expected = [order(a) < order(b) for a, b in zip(rows, others, strict=True)]
    assert ahead.tolist() == expected
    for one in make(rows[:1]):
        assert candidates.before(make(rows), one).tolist() == [
            order(a) < order(rows[0]) for a in rows
        ]
