import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import count_steps, deal_packs, learning_rate, rows_of_step
from pipeline.config_training import TrainConfig


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    config = TrainConfig(epochs=2, batch_rows=3)
    assert count_steps(7, config) == 6
    steps = [rows_of_step(7, config, step).tolist() for step in range(6)]
    assert [len(rows) for rows in steps] == [3, 3, 1, 3, 3, 1]
    first, second = (list(itertools.chain(*half)) for half in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_the_order_follows_the_seed_alone() -> None:
    same = [rows_of_step(50, TrainConfig(seed=3, workers=w), 1).tolist() for w in (1, 8)]
    assert same[0] == same[1]
    assert same[0] != rows_of_step(50, TrainConfig(seed=4), 1).tolist()


def test_max_steps_repeats_or_cuts_the_subset() -> None:
    config = TrainConfig(max_steps=5, batch_rows=4)
    assert count_steps(6, config) == 5
    assert [len(rows_of_step(6, config, step)) for step in range(5)] == [4, 2, 4, 2, 4]


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_fraction=0.2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_deal_packs_by_hand() -> None:
    assert deal_packs([5, 3, 3, 1], 2, 6) == [[[0, 3]], [[1, 2]]]
    assert deal_packs([9, 2, 2], 1, 4) == [[[0], [1, 2]]]  # a long row is a pack of its own
    assert deal_packs([2], 2, 4) == [[[0]], [[]]]
    assert deal_packs([5, 3, 3, 1], 1, 9, padded=True) == [[[0], [1, 2, 3]]]
    for padded in (False, True):  # the long row shares no pass
        assert deal_packs([7, 2, 2], 1, 20, padded=padded, longest_together=6) == [[[0], [1, 2]]]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80),
    st.integers(1, 5),
    st.integers(1, 100),
    st.booleans(),
)
def test_packs_are_a_partition_and_equally_many(
    lengths: list[int], workers: int, max_tokens: int, padded: bool
) -> None:
    dealt = deal_packs(lengths, workers, max_tokens, padded=padded)
    assert len(dealt) == workers
    assert len({len(packs) for packs in dealt}) == 1
    packs = [pack for each in dealt for pack in each]
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    for pack in packs:
        own = [lengths[i] for i in pack]
        cost = max(own, default=0) * len(own) if padded else sum(own)
        assert len(pack) <= 1 or cost <= max_tokens
