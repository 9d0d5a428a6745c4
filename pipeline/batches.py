"""Which rows an optimiser step sees, and how workers share them: pure functions of the settings.

::

    rows of a step   the next `batch_rows` of the epoch's own order, whatever the workers
    packs            rows laid end to end, about equally long, equally many for each worker
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.config_training import TrainConfig
from pipeline.packing import costs, plan_padded


def count_steps(num_rows: int, config: TrainConfig) -> int:
    """Optimiser steps of a training; the last one of an epoch may be smaller."""
    return config.max_steps or config.epochs * -(-num_rows // config.batch_rows)


def rows_of_step(num_rows: int, config: TrainConfig, step: int) -> npt.NDArray[np.int64]:
    """Rows that a step sees; each epoch has an order of its own, from the seed alone."""
    epoch, batch = divmod(step, -(-num_rows // config.batch_rows))
    order = np.random.default_rng([config.seed, epoch]).permutation(num_rows)
    return order[batch * config.batch_rows : (batch + 1) * config.batch_rows]


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine that would reach 0 after the last step.

    Source: arXiv:1608.03983.
    """
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def deal_packs(
    lengths: Sequence[int],
    workers: int,
    max_tokens: int,
    *,
    padded: bool = False,
    longest_together: int = 2**31,
) -> list[list[list[int]]]:
    """Put the rows of a step into packs, and deal these to workers.

    Workers wait for each other in every pack, so that all get equally many of about equal length:
    the longest row left goes to the shortest pack. A row over `max_tokens` is a pack of its own.

    Args:
        lengths: Tokens of each row.
        workers: Training processes.
        max_tokens: Of a pack.
        padded: Whether rows are padded to the longest of their pack, which counts then: rows of
            like length go together.
        longest_together: A longer row is a pack of its own (see forward.py).

    Returns:
        For each worker its packs of indices into `lengths`, longest row first. Where there are
        fewer rows than packs, some are empty.

    Example:
        `deal_packs([5, 3, 3, 1], 2, 6) -> [[[0, 3]], [[1, 2]]]`
    """
    lengths = costs(lengths, max_tokens, longest_together)
    if padded:
        batches = plan_padded(lengths, max_tokens)
        batches += [[] for _ in range(-len(batches) % workers)]
        return [batches[worker::workers] for worker in range(workers)]
    least = sum(min(length, max_tokens) for length in lengths)
    each = max(1, -(-least // (workers * max_tokens)))
    while True:
        packs = _spread(lengths, workers * each)
        tokens = [sum(lengths[i] for i in pack) for pack in packs]
        if all(t <= max_tokens or len(p) == 1 for t, p in zip(tokens, packs, strict=True)):
            return [packs[worker::workers] for worker in range(workers)]
        each += max(1, each // 16)


def _spread(lengths: Sequence[int], num_packs: int) -> list[list[int]]:
    """Longest first, each to the pack with the fewest tokens."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0, number) for number in range(num_packs)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, number = heapq.heappop(heap)
        packs[number].append(index)
        heapq.heappush(heap, (tokens + lengths[index], number))
    return packs
