"""Sharing: what is computed once for several sequences, found from their tokens alone.

Equal sequences, and what sequences begin with in common: a template's first words, a system prompt,
a task's definition over many rows. See packing.py for what becomes of prefixes.
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]

Share = Literal["prefixes", "equal", "turns"]
SHARES: tuple[Share, ...] = ("prefixes", "equal", "turns")
"""What sequences of a pack begin with, sequences that are equal, and the conditioned pass of a
conversation's turns (metric.py)."""

_LEAST_SAVED = 64
"""Tokens that a prefix must save: sequences under one prefix are attended to apart from others."""


class Prefix(NamedTuple):
    """The first tokens of a sequence, where other sequences have them too."""

    owner: int
    """A sequence that has it, the same for all of them."""
    length: int
    """Tokens."""


def find_equal(sequences: Sequence[TokenIds], wanted: Sequence[Hashable]) -> list[int]:
    """Of each sequence the first that has the same tokens and of which the same is wanted."""
    first: dict[tuple[bytes, Hashable], int] = {}
    return [
        first.setdefault((ids.tobytes(), asked), index)
        for index, (ids, asked) in enumerate(zip(sequences, wanted, strict=True))
    ]


def find_prefixes(sequences: Sequence[TokenIds]) -> list[Prefix | None]:
    """Find what sequences begin with in common, so that most tokens are saved.

    Of the prefixes that any two sequences share, those that nest exclude each other: the template's
    first words save a little on all rows, or each task's definition much on its own rows.

    Args:
        sequences: Token ids.

    Returns:
        The prefix of each sequence, shorter than it, or None.
    """
    # Big-endian bytes sort as the tokens do. The last token stays out: a sequence is never all
    # prefix.
    heads = [ids[:-1].astype(">i4").tobytes() for ids in sequences]
    order = sorted(range(len(sequences)), key=lambda index: (heads[index], index))
    found: list[Prefix | None] = [None] * len(sequences)
    shared = [
        _num_common(sequences[one][:-1], sequences[other][:-1])
        for one, other in itertools.pairwise(order)
    ]
    for first, last, length in _best_runs(shared):
        for at in range(first, last + 1):
            found[order[at]] = Prefix(order[first], length)
    return found


def _num_common(one: TokenIds, other: TokenIds) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


@dataclass
class _Node:
    """Neighbours in sorted order that have `length` tokens in common, and no others that many."""

    length: int
    first: int
    saved: int = 0
    """By the best prefixes found inside."""
    runs: list[tuple[int, int, int]] = field(default_factory=list)


def _best_runs(shared: Sequence[int]) -> list[tuple[int, int, int]]:
    """Disjoint runs (first, last, length) of sorted sequences whose prefixes save the most tokens.

    Args:
        shared: Tokens that each sorted sequence has in common with the next.

    The nodes are the intervals of a longest-common-prefix array, closed bottom-up: each keeps the
    better of its own prefix and of what its children keep.

    Source: Abouelhoda, Kurtz and Ohlebusch, Replacing suffix trees with enhanced suffix arrays,
    2004, section 4 (the traversal).
    """
    root = _Node(0, 0)
    stack = [root]
    for last, length in enumerate([*shared, 0]):
        node = _Node(length, last)
        while stack[-1].length > length:
            node = stack.pop()
            saved = (last - node.first) * node.length - _LEAST_SAVED
            if saved > node.saved:
                node.saved, node.runs = saved, [(node.first, last, node.length)]
            if stack[-1].length >= length:
                stack[-1].saved += node.saved
                stack[-1].runs += node.runs
        if stack[-1].length < length:
            node.length = length  # its members go on, with fewer tokens in common
            stack.append(node)
    return root.runs
