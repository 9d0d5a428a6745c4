"""Candidates: rows that may be selected, as 40 bytes each, and their orders."""

from typing import Any

import numpy as np
import numpy.typing as npt

Candidates = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]

CANDIDATE = np.dtype(
    [
        ("key", "<u8"),  # smaller ranks first
        ("id_high", "<u8"),  # sample_id as a big-endian number: the order of its bytes
        ("id_low", "<u8"),
        ("row", "<i8"),  # in the shard
        ("unit", "<u4"),  # index in the plan
        ("group", "<u4"),
    ]
)

RANK = ("key", "id_high", "id_low", "unit", "row")
"""What rows are ranked by: ties of the ratio go by sample_id, then shard and row."""


def make(
    keys: npt.NDArray[np.uint64],
    ids: npt.NDArray[np.bytes_],
    rows: Positions,
    unit: int,
    groups: Positions | int,
) -> Candidates:
    """Candidates of one unit, from its columns."""
    found = np.empty(len(keys), CANDIDATE)
    found["key"] = keys
    found["id_high"], found["id_low"] = ids.view(">u8").reshape(-1, 2).T
    found["row"] = rows
    found["unit"] = unit
    found["group"] = groups
    return found


def in_order(rows: Candidates) -> Candidates:
    """Sorted by rank."""
    return rows[_order(rows, RANK)]


def first_copies(ranked: Candidates) -> Mask:
    """True on the copy of each sample_id that ranks first.

    Args:
        ranked: Sorted by rank.
    """
    order = _order(ranked, ("id_high", "id_low"))
    high, low = ranked["id_high"][order], ranked["id_low"][order]
    copies = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    mask = np.ones(len(ranked), np.bool_)
    mask[order[1:][copies]] = False
    return mask


def before(rows: Candidates, others: Any) -> Mask:
    """Where `rows` rank ahead of `others`, element by element, or of one other row."""
    ahead = np.zeros(len(rows), np.bool_)
    for name in reversed(RANK):
        ahead = (rows[name] < others[name]) | ((rows[name] == others[name]) & ahead)
    return ahead


def _order(rows: Candidates, names: tuple[str, ...]) -> Positions:
    """Positions sorted by columns, the first one most significant; stable.

    Few rows tie in the first column: it alone is sorted, and then what ties, by all of them. That
    is six times as fast as sorting by all from the start.
    """
    first = np.ascontiguousarray(rows[names[0]])
    order = np.argsort(first)
    values = first[order]
    tied = np.zeros(len(rows), np.bool_)
    tied[1:] = values[1:] == values[:-1]
    tied[:-1] |= tied[1:]
    some = order[tied]
    order[tied] = some[np.lexsort((some, *(rows[name][some] for name in reversed(names))))]
    return order
