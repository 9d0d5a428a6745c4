"""Budgets: how many rows are asked for, of each group and for each fraction.

Without `group_by` there is one group, all rows. Everything is exact: fractions are decimals, and a
proportional quota deals rows out by Webster's method, under which a larger budget never gives a
group fewer rows, so that smaller subsets lie within larger ones.
"""

import difflib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.config_select import Format, Order, Ratio, SelectConfig
from pipeline.errors import ConfigError

Rows = npt.NDArray[np.int64]

UNLIMITED = np.iinfo(np.int64).max
"""Asked of every group where a threshold decides."""

OTHER_GROUPS = "*"
NULL_GROUP = "null"
"""How a table of quotas names rows without a value."""

_NAME = 40
"""Characters of a group's name in a message."""

_EXACT = Context(prec=1000)
"""0.1 and 0.10 are one setting, and no digit of a longer one is rounded away."""


@dataclass(frozen=True)
class SelectSettings:
    """Resolved selection settings."""

    by: Ratio
    order: Order
    fractions: tuple[str, ...]
    """Exact decimals, ascending; empty where something else decides."""
    count: int | None
    threshold: float | None
    of: Literal["all", "scored", "eligible"]
    min_ifd: float | None
    max_ifd: float | None
    min_response_tokens: int
    duplicates: Literal["drop", "keep"]
    group_by: str | None
    quotas: Literal["each", "proportional"] | tuple[tuple[str, str], ...]
    """A table is (group, fraction or count) pairs, sorted; a count has no point."""
    floor: int
    format: Format
    rows_per_part: int

    @classmethod
    def from_config(cls, config: SelectConfig, by: Ratio) -> "SelectSettings":
        """Fill in the default budget, a fraction of 0.10."""
        fractions = config.fractions or ([] if config.fraction is None else [config.fraction])
        quotas: Literal["each", "proportional"] | tuple[tuple[str, str], ...]
        if isinstance(config.quotas, dict):
            quotas = tuple(sorted((group, _text(n)) for group, n in config.quotas.items()))
        else:
            quotas = config.quotas
            if not fractions and config.count is None and config.threshold is None:
                fractions = [Decimal("0.10")]
        return cls(
            by=by,
            order=config.order,
            fractions=tuple(str(f.normalize(_EXACT)) for f in sorted(set(fractions))),
            count=config.count,
            threshold=config.threshold,
            of=config.of,
            min_ifd=config.min_ifd,
            max_ifd=config.max_ifd,
            min_response_tokens=config.min_response_tokens,
            duplicates=config.duplicates,
            group_by=config.group_by,
            quotas=quotas,
            floor=config.floor,
            format=config.format,
            rows_per_part=config.rows_per_part,
        )


def asked_rows(
    settings: SelectSettings, groups: Sequence[str | None], of: Rows, eligible: Rows
) -> npt.NDArray[np.int64]:
    """Rows asked for: an array of (levels, groups), each level at least the one before.

    A fraction is an exact decimal: 0.29 of 100 rows is 29, though 0.29 * 100 < 29 in floats.

    Args:
        settings: With the budgets.
        groups: Values of the groups; one, None, where there is no `group_by`.
        of: Rows of each group that a fraction is a share of.
        eligible: Rows of each group that may be selected, copies included.

    Raises:
        ConfigError: A table of quotas names a group that the corpus has not.
    """
    if isinstance(settings.quotas, tuple):
        return np.array([_from_table(settings.quotas, groups, of)], np.int64)
    if settings.threshold is not None:
        return np.full((1, len(groups)), UNLIMITED)
    if settings.quotas == "proportional":
        levels = dealt_rows(settings, of)
        return np.array([deal(n, of, eligible, settings.floor) for n in levels], np.int64)
    if settings.count is not None:
        return np.full((1, len(groups)), settings.count)
    return np.array([[share(f, n) for n in of.tolist()] for f in settings.fractions], np.int64)


def dealt_rows(settings: SelectSettings, of: Rows) -> list[int]:
    """Rows that `proportional` quotas deal out, by level, whether or not groups have so many."""
    return [share(f, int(of.sum())) for f in settings.fractions] or [settings.count or 0]


def share(fraction: str, rows: int) -> int:
    """The floor of the exact product."""
    return math.floor(Fraction(fraction) * rows)


def deal(rows: int, weights: Rows, most: Rows, floor: int) -> list[int]:
    """Deal rows out to groups in proportion to their weights, by Webster's method.

    First every group gets `floor` rows, or as many as it has, in turns, the heaviest group first;
    then row after row goes to the group with the highest weight / (2 * rows it has + 1).

    Args:
        rows: To deal out; fewer are where the groups have fewer.
        weights: Of each group.
        most: Rows that each group has.
        floor: Rows that each group gets before the others.

    Returns:
        Rows of each group.
    """
    order = sorted(range(len(weights)), key=lambda g: (-int(weights[g]), g))
    least = [min(floor, int(n)) for n in most]
    if rows <= sum(least):
        return _in_turns(rows, least, order)
    caps = [int(n) if w else low for n, w, low in zip(most, weights, least, strict=True)]
    # The lowest price w / (2 n + 1) >= p at which no more rows are bought than there are, to 2**-40
    # of a row's; what is left goes one by one.
    low, high = 1, (int(weights.max()) << 40) + 1

    def bought(price: int) -> list[int]:
        found = [((int(w) << 40) + price) // (2 * price) for w in weights]
        return [max(b, min(n, c)) for n, b, c in zip(found, least, caps, strict=True)]

    while low < high:
        price = (low + high) // 2
        low, high = (low, price) if sum(bought(price)) <= rows else (price + 1, high)
    dealt = bought(low)
    left = min(rows, sum(caps)) - sum(dealt)
    queue = [_bid(weights, dealt, place, g) for place, g in enumerate(order) if dealt[g] < caps[g]]
    heapq.heapify(queue)
    for _ in range(left):
        _, place, group = heapq.heappop(queue)
        dealt[group] += 1
        if dealt[group] < caps[group]:
            heapq.heappush(queue, _bid(weights, dealt, place, group))
    return dealt


def _bid(weights: Rows, dealt: list[int], place: int, group: int) -> tuple[Fraction, int, int]:
    return Fraction(-int(weights[group]), 2 * dealt[group] + 1), place, group


def _in_turns(rows: int, least: list[int], order: list[int]) -> list[int]:
    """A row to each group that still lacks one, again and again, until there are no more."""
    low, high = 0, max(least, default=0)
    while low < high:  # the most whole turns that there are rows for
        turns = (low + high + 1) // 2
        low, high = (turns, high) if sum(min(n, turns) for n in least) <= rows else (low, turns - 1)
    dealt = [min(n, low) for n in least]
    lacking = [group for group in order if least[group] > low]
    for group in lacking[: rows - sum(dealt)]:
        dealt[group] += 1
    return dealt


def _from_table(
    table: tuple[tuple[str, str], ...], groups: Sequence[str | None], of: Rows
) -> list[int]:
    wanted = dict(table)
    names = [NULL_GROUP if group is None else group for group in groups]
    for name in wanted.keys() - set(names) - {OTHER_GROUPS}:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else "Correct the name or take it out."
        shown = ", ".join(f"'{known[:_NAME]}'" for known in sorted(names)[:10])
        raise ConfigError(
            f"key 'select.quotas': the corpus has no group '{name}' (it has {len(names)}: {shown}"
            f"{', ...' if len(names) > 10 else ''}). {hint} '*' stands for groups that are not "
            "listed. What is scored is kept: cherry select goes on from there."
        )
    quotas = [wanted.get(name, wanted.get(OTHER_GROUPS, "0")) for name in names]
    return [
        share(quota, int(rows)) if "." in quota else int(quota)
        for quota, rows in zip(quotas, of, strict=True)
    ]


def _text(quota: int | Decimal) -> str:
    if isinstance(quota, int):
        return str(quota)
    text = f"{quota.normalize(_EXACT):f}"
    return text if "." in text else f"{text}.0"
