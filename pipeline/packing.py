"""Packing: sequences laid end to end under a token budget, without padding."""

from collections.abc import Sequence


def plan_packs(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group sequences into packs of at most `max_batch_tokens` tokens.

    Longest first, so that a pack's sequences are of like length and the largest pack, which
    decides whether memory suffices, comes first. A sequence over the budget is a pack of its own.
    The order depends on the lengths alone.

    Args:
        lengths: Tokens of each sequence.
        max_batch_tokens: Budget of a pack, in tokens.

    Returns:
        Packs of indices into `lengths`; together a partition of all of them.

    Example:
        `plan_packs([3, 5, 4], 8) -> [[1], [2, 0]]`
    """
    packs: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not packs or lengths[index] > room:
            packs.append([])
            room = max_batch_tokens
        packs[-1].append(index)
        room -= lengths[index]
    return packs
