"""Packing: an order-restoring partition under a token budget."""

import gc
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import Pack, plan_packs, ranges
from pipeline.sharing import Prefix

LENGTHS = st.lists(st.integers(1, 60), max_size=80)
BUDGETS = st.integers(1, 120)


def test_worked_example() -> None:
    assert plan_packs([3, 5, 4], 8) == [[1], [2, 0]]


def test_no_sequences_are_no_packs() -> None:
    assert plan_packs([], 8) == []


def test_budget_is_met_exactly() -> None:
    assert plan_packs([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]


def test_overlong_sequences_are_packs_of_their_own() -> None:
    # 20 and 9 are over the budget of 8; neither takes the 1 into its pack.
    assert plan_packs([1, 20, 9], 8) == [[1], [2], [0]]


@given(LENGTHS, BUDGETS)
def test_packs_are_a_partition(lengths: list[int], budget: int) -> None:
    packs = plan_packs(lengths, budget)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(packs)


@given(LENGTHS, BUDGETS)
def test_budget_is_kept_but_for_single_overlong_sequences(lengths: list[int], budget: int) -> None:
    for pack in plan_packs(lengths, budget):
        total = sum(lengths[index] for index in pack)
        assert total <= budget or len(pack) == 1


@given(LENGTHS, BUDGETS)
def test_longest_come_first(lengths: list[int], budget: int) -> None:
    flat = [lengths[index] for pack in plan_packs(lengths, budget) for index in pack]
    assert flat == sorted(lengths, reverse=True)


@given(LENGTHS, BUDGETS)
def test_equal_lengths_keep_their_order(lengths: list[int], budget: int) -> None:
    flat = [index for pack in plan_packs(lengths, budget) for index in pack]
    for one, next_one in itertools.pairwise(flat):
        assert lengths[one] > lengths[next_one] or one < next_one


@given(LENGTHS, BUDGETS, st.randoms(use_true_random=False))
def test_shape_depends_on_the_lengths_alone(lengths: list[int], budget: int, random) -> None:
    def shape(values: list[int]) -> list[list[int]]:
        return [[values[index] for index in pack] for pack in plan_packs(values, budget)]

    shuffled = list(lengths)
    random.shuffle(shuffled)
    assert shape(shuffled) == shape(lengths)


@given(LENGTHS.filter(bool), BUDGETS)
def test_no_pack_has_room_for_the_next_packs_first(lengths: list[int], budget: int) -> None:
    packs = plan_packs(lengths, budget)
    for pack, following in itertools.pairwise(packs):
        assert sum(lengths[index] for index in pack) + lengths[following[0]] > budget


@given(st.lists(st.tuples(st.integers(2, 60), st.booleans()), min_size=1), BUDGETS)
def test_the_longest_comes_first_whatever_is_shared(
    sequences: list[tuple[int, bool]], budget: int
) -> None:
    lengths = [length for length, _ in sequences]
    prefixes = [Prefix(0, 1) if shares else None for _, shares in sequences]
    packs = plan_packs(lengths, budget, prefixes)
    assert max(lengths[index] for index in packs[0]) == max(lengths)


def test_kernels_of_a_gpu_get_each_stretch_behind_its_parent() -> None:
    tensors = Pack((4, 3, 2), (-1, 0, -1)).on(torch.device("cpu"))
    assert tensors.query_bounds.tolist() == [0, 4, 7, 9]
    assert tensors.key_bounds.tolist() == [0, 4, 11, 13]
    assert (tensors.longest_query, tensors.longest_key) == (4, 7)
    assert tensors.keys is not None
    assert tensors.keys.tolist() == [0, 1, 2, 3, *(0, 1, 2, 3, 4, 5, 6), 7, 8]
    assert Pack((4, 3)).on(torch.device("cpu")).keys is None


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 5))))
def test_ranges_begin_where_they_are_told(pairs: list[tuple[int, int]]) -> None:
    expected = [at for start, length in pairs for at in range(start, start + length)]
    starts, lengths = ([pair[side] for pair in pairs] for side in (0, 1))
    assert ranges(starts, lengths).tolist() == expected


def test_a_handle_keeps_no_pack() -> None:
    one, other = Pack((3,)), Pack((3,))
    assert Pack.of_handle(one.handle) is one
    assert Pack.of_handle(other.handle) is other
    handle = one.handle
    del one
    gc.collect()
    with pytest.raises(KeyError):
        Pack.of_handle(handle)
