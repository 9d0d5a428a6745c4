"""Budgets: exact shares, tables of quotas, and rows dealt out by Webster's method."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_corpus import wanted

from pipeline.budgets import UNLIMITED, SelectSettings, asked_rows, deal
from pipeline.errors import ConfigError


def asked(settings: SelectSettings, num_rows: int) -> int:
    """Rows asked for where there are no groups."""
    rows = np.array([num_rows])
    [[found]] = asked_rows(settings, [None], rows, rows).tolist()
    return int(found)


def asked_by_group(
    settings: SelectSettings, of: dict[str | None, int], eligible: list[int] | None = None
) -> list[list[int]]:
    rows = np.array(list(of.values()))
    most = rows if eligible is None else np.array(eligible)
    return asked_rows(settings, list(of), rows, most).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("fraction", "num_rows", "expected"),
    [
        ("0.29", 100, 29),  # 0.29 * 100 is 28.999999999999996
        ("0.1", 52_002, 5200),
        ("0.07", 100, 7),  # 7.000000000000001
        ("0.0001", 9_999, 0),
        ("0.0001", 10_000, 1),
        ("0.999999999", 1_000_000_000, 999_999_999),
        ("1", 7, 7),
        ("1.00", 7, 7),
        ("0", 7, 0),
        ("0.3333333333333333333333333333", 3_000_000_000, 999_999_999),
        ("0.9999999999999999999999999999", 1_000_000_000, 999_999_999),
        # 1110.9999999999999999999999996884, which 28 digits round to 1111.
        ("0.1428571428571428571428571428", 7777, 1110),
        (0.29, 100, 29),  # as YAML reads it
    ],
)
def test_fraction_is_an_exact_decimal(fraction: Any, num_rows: int, expected: int) -> None:
    assert asked(wanted(fraction=fraction), num_rows) == expected


@given(
    st.decimals(0, 1, allow_nan=False, places=12) | st.decimals(0, 1, places=28),
    st.integers(0, 10**12),
)
def test_budget_is_the_floor_of_the_exact_product(fraction: Decimal, num_rows: int) -> None:
    assert asked(wanted(fraction=fraction), num_rows) == math.floor(Fraction(fraction) * num_rows)


def test_count_and_threshold_are_no_share() -> None:
    assert asked(wanted(count=0), 100) == 0
    assert asked(wanted(count=77), 100) == 77
    assert asked(wanted(threshold=0.0), 100) == UNLIMITED


def test_default_is_a_tenth() -> None:
    assert wanted().fractions == ("0.1",)
    assert wanted(count=3).fractions == ()
    assert wanted(threshold=0.5).fractions == ()
    assert wanted(group_by="a", quotas={"*": 3}).fractions == ()


@pytest.mark.parametrize("spelling", ["0.1", "0.10", "1E-1", 0.1, Decimal("0.100")])
def test_spellings_of_a_fraction_are_one_setting(spelling: Any) -> None:
    assert wanted(fraction=spelling) == wanted()


def test_fractions_are_sorted_and_said_once() -> None:
    assert wanted(fractions=["0.2", "0.10", 0.1, "0.05"]).fractions == ("0.05", "0.1", "0.2")


# Groups

SIZES: dict[str | None, int] = {"code": 1000, "web": 95, None: 9}


def test_each_group_has_its_own_share() -> None:
    settings = wanted(group_by="g", fractions=["0.1", "0.5"])
    assert asked_by_group(settings, SIZES) == [[100, 9, 0], [500, 47, 4]]
    assert asked_by_group(wanted(group_by="g", count=20), SIZES) == [[20, 20, 20]]


def test_a_table_of_counts_and_fractions() -> None:
    quotas = {"code": 0.25, "web": 1, "null": 1.0}
    assert asked_by_group(wanted(group_by="g", quotas=quotas), SIZES) == [[250, 1, 9]]
    others = wanted(group_by="g", quotas={"web": 0.1, "*": 7})
    assert asked_by_group(others, SIZES) == [[7, 9, 7]]
    assert asked_by_group(wanted(group_by="g", quotas={"web": 3}), SIZES) == [[0, 3, 0]]


def test_a_table_with_an_unknown_group_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"no group 'wbe' .it has 3: 'code', 'null', 'web'.*Did you mean 'web'"
    ):
        asked_by_group(wanted(group_by="g", quotas={"wbe": 3}), SIZES)


def test_proportional_by_hand() -> None:
    # 110 of 1104 rows: the quotients of code, web and null are 99.6, 9.5 and 0.9.
    settings = wanted(group_by="g", quotas="proportional")
    assert asked_by_group(settings, SIZES) == [[100, 9, 1]]
    floor = wanted(group_by="g", quotas="proportional", floor=20)
    assert asked_by_group(floor, SIZES) == [[81, 20, 9]]
    # The rows that one group has not go to the others.
    assert asked_by_group(settings, SIZES, [20, 95, 9]) == [[20, 82, 8]]


def test_a_floor_that_takes_all_is_dealt_in_turns() -> None:
    assert deal(7, np.array([5, 100, 50]), np.array([5, 100, 50]), 3) == [2, 3, 2]
    assert deal(2, np.array([5, 100, 50]), np.array([5, 100, 50]), 3) == [0, 1, 1]
    assert deal(0, np.array([5, 100, 50]), np.array([5, 100, 50]), 3) == [0, 0, 0]
    assert deal(9, np.array([5, 100, 50]), np.array([1, 100, 50]), 3) == [1, 5, 3]


def test_a_floor_is_dealt_in_no_time_however_high() -> None:
    most = np.full(1000, 10**12)
    dealt = deal(5 * 10**10 + 3, most, most, 10**9)
    assert (sum(dealt), max(dealt), min(dealt)) == (5 * 10**10 + 3, 5 * 10**7 + 1, 5 * 10**7)


def one_by_one(rows: int, weights: list[int], most: list[int], floor: int) -> list[int]:
    """Webster's method as it is told: row after row to the highest quotient."""
    dealt = [0] * len(weights)

    def bid(group: int) -> tuple[Any, ...]:
        has = dealt[group]
        if has < min(floor, most[group]):
            return (1, -has, weights[group], -group)
        return (0, Fraction(weights[group], 2 * has + 1), weights[group], -group)

    for _ in range(rows):
        able = [g for g in range(len(weights)) if dealt[g] < most[g]]
        able = [g for g in able if weights[g] or dealt[g] < floor]
        if not able:
            break
        dealt[max(able, key=bid)] += 1
    return dealt


GROUPS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=6)


@given(st.integers(0, 200), GROUPS, st.integers(0, 8))
def test_dealing_is_websters(rows: int, groups: list[tuple[int, int]], floor: int) -> None:
    weights, most = (list(column) for column in zip(*groups, strict=True))
    dealt = deal(rows, np.array(weights), np.array(most), floor)
    assert dealt == one_by_one(rows, weights, most, floor)


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.lists(st.integers(1, 10**9), min_size=1))
def test_a_larger_budget_gives_no_group_less(one: int, other: int, sizes: list[int]) -> None:
    rows = np.array(sizes)
    less, more = (deal(n, rows, rows, 5) for n in sorted((one, other)))
    assert all(a <= b for a, b in zip(less, more, strict=True))
    assert sum(more) == min(max(one, other), sum(sizes))
