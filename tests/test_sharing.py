"""Sharing: what is computed once gives what computing it each time gives, and is computed once."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_engine import FAMILIES, RUNNING_ON, UNPACKABLE, oracle
from transformers import AttentionInterface

from pipeline import sharing
from pipeline.attention import PACKED, packed_attention
from pipeline.engine import Engine, TokenSequence
from pipeline.packing import Pack, lay_out, plan_packs
from pipeline.sharing import Prefix, TokenIds, find_equal, find_prefixes

HEAD = 17
CANNOT_SHARE = {"gptj-own-attention"}
"""Transformers tells sequences apart by positions that begin at 0."""


def tokens(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


def continuing(lengths: Sequence[int], head: int = HEAD, seed: int = 0) -> list[TokenSequence]:
    """Sequences of one head and two that have nothing in common with them."""
    random = np.random.default_rng(seed)
    common = random.integers(0, 400, head, dtype=np.int32)
    whole = [np.concatenate([common, random.integers(0, 400, n, dtype=np.int32)]) for n in lengths]
    whole += [random.integers(0, 400, n, dtype=np.int32) for n in (23, 5)]
    # Spans that begin in the head, at its end, and after it.
    starts = itertools.cycle([head - 3, head, head + 1])
    return [
        TokenSequence(ids, ((min(start, len(ids) - 1), len(ids)),))
        for ids, start in zip(whole, starts, strict=False)
    ]


@contextmanager
def counting_tokens(engine: Engine) -> Iterator[list[int]]:
    """Tokens of each pass through the model's first embedding, with nothing to fill it up."""
    counts: list[int] = []
    embeddings = engine.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.devices._CPU_MULTIPLE", 1)
        yield counts
    hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [60, 4096])
def test_shared_prefixes_equal_eager_one_row_at_a_time(family: str, budget: int) -> None:
    architecture, changes = FAMILIES[family]
    model = tiny_model(architecture, **changes)
    engine = Engine(model, budget)
    assert engine.mode == "packed"
    assert ("prefixes" in engine.share) == (family not in CANNOT_SHARE)
    sequences = continuing([40, 3, 25, 1, 2, 13, 12, 33])
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@pytest.mark.parametrize("head", [77, 96, 141])  # filled up to 96, 96 and 160
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 150}])
def test_keys_that_fill_up_a_prefix_are_never_seen(changes: dict[str, int], head: int) -> None:
    model = tiny_model("Mistral", max_position_embeddings=512, **changes)
    sequences = continuing([129, 150, 180, 20], head=head)
    engine = Engine(model)
    assert "prefixes" in engine.share
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 600}])
def test_long_tails_go_through_the_fused_kernel_and_equal_eager(changes: dict[str, int]) -> None:
    model = tiny_model("Mistral", max_position_embeddings=2048, **changes)
    sequences = continuing([900, 530, 20], head=80)
    engine = Engine(model)
    assert "prefixes" in engine.share
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@pytest.mark.parametrize("family", [*UNPACKABLE, *RUNNING_ON])
def test_what_cannot_be_packed_shares_no_prefix(family: str) -> None:
    architecture, changes = {**UNPACKABLE, **RUNNING_ON}[family]
    engine = Engine(tiny_model(architecture, **changes), 128)
    assert "prefixes" not in engine.share
    sequences = continuing([4, 9])
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(engine.model, sequence), rel=1e-5)


def test_a_shared_prefix_is_computed_once_a_pack() -> None:
    sequences = continuing([10] * 12)
    for share, expected in ((("prefixes",), HEAD + 120 + 28), ((), 12 * (HEAD + 10) + 28)):
        engine = Engine(tiny_model("Llama"), 10_000, share=share)
        with counting_tokens(engine) as counts:
            engine.score(sequences)
        assert counts == [expected]


def test_equal_sequences_are_computed_once() -> None:
    one, other = continuing([])
    asked_else = TokenSequence(one.input_ids, ((1, 3),))
    sequences = [one, other, one, one, asked_else]
    plain = Engine(tiny_model("Llama"), share=())
    shared = Engine(plain.model, share=("equal",))
    with counting_tokens(shared) as counts:
        losses = shared.score(sequences)
    assert sum(counts) == 23 + 5 + 23
    assert losses[0] == losses[2] == losses[3]
    for loss, expected in zip(losses, plain.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(expected.nll_nats, rel=1e-5)


def test_an_equal_sequence_has_the_same_error() -> None:
    good, bad = continuing([])
    bad.input_ids[0] = 4000
    errors = [loss.error for loss in Engine(tiny_model("Llama")).score([bad, good, bad])]
    assert errors == ["UnknownToken", None, "UnknownToken"]


def test_mean_hidden_states_include_the_shared_prefix() -> None:
    model = tiny_model("Llama")
    sequences = continuing([9, 30, 2, 17, 11, 4])
    plain = Engine(model, share=()).score(sequences, hidden=True)
    for one, other in zip(Engine(model).score(sequences, hidden=True), plain, strict=True):
        assert one.mean_hidden_M is not None
        np.testing.assert_allclose(one.mean_hidden_M, other.mean_hidden_M, atol=1e-5)


def test_a_scored_token_of_a_prefix_meets_the_vocabulary_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in brief experience, where whole prompts are scored."""
    model = tiny_model("Llama")
    sequences = [TokenSequence(s.input_ids, ((1, len(s.input_ids)),)) for s in continuing([5] * 20)]
    expected = Engine(model, share=()).score(sequences)
    engine = Engine(model)
    projected = []
    nll = engine._projection.nll

    def counted(hidden_SM: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
        projected.append(len(targets_S))
        return nll(hidden_SM, targets_S)

    monkeypatch.setattr(engine._projection, "nll", counted)
    for one, other in zip(engine.score(sequences), expected, strict=True):
        assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-5)
    assert sum(projected) == HEAD - 1 + 20 * 5 + 22 + 4


def test_an_architecture_that_gets_prefixes_wrong_is_not_packed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forgetful(*args: object, **kwargs: object) -> object:
        pack = kwargs["cherry_pack"]
        assert isinstance(pack, Pack)
        kwargs["cherry_pack"] = Pack(pack.lengths)
        return packed_attention(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, forgetful)
    engine = Engine(tiny_model("Llama"))
    assert (engine.mode, engine.share) == ("padded", {"equal", "turns"})
    assert "scoring in padded batches instead" in caplog.text


# --- what is found

SMALL = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=6).map(lambda ids: tokens(*ids)), max_size=9
)


def test_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_LEAST_SAVED", 0)
    sequences = [tokens(1, 2, 7), tokens(9, 9), tokens(1, 2, 8), tokens(1, 2)]
    assert find_prefixes(sequences) == [Prefix(0, 2), None, Prefix(0, 2), None]


def test_nested_prefixes_are_chosen_by_what_they_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_LEAST_SAVED", 2)
    template, tasks = [5] * 3, ([1] * 8, [2] * 8)
    by_task = [tokens(*template, *task, row) for task in tasks for row in (7, 8, 9)]
    assert [p and p.length for p in find_prefixes(by_task)] == [11] * 6
    many = [tokens(*template, row, row) for row in range(6, 60)]
    assert {p and p.length for p in find_prefixes([*by_task[::3], *many])} == {3}


def test_what_saves_little_is_left_alone() -> None:
    assert find_prefixes([tokens(*[1] * 40, 2), tokens(*[1] * 40, 3)]) == [None, None]
    pair = [tokens(*[1] * 80, 2), tokens(*[1] * 80, 3)]
    assert find_prefixes(pair) == [Prefix(0, 80)] * 2


@given(SMALL)
def test_prefixes_are_common_and_shorter_than_their_sequences(sequences: list[TokenIds]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "_LEAST_SAVED", 1)
        found = find_prefixes(sequences)
    for ids, prefix in zip(sequences, found, strict=True):
        if prefix is not None:
            assert prefix.length < len(ids)
            head = sequences[prefix.owner][: prefix.length]
            assert ids[: prefix.length].tolist() == head.tolist()


@given(SMALL)
def test_no_choice_of_prefixes_saves_more(sequences: list[TokenIds]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "_LEAST_SAVED", 1)
        found = find_prefixes(sequences)
    groups = {prefix: found.count(prefix) for prefix in found if prefix is not None}
    saved = sum((count - 1) * prefix.length - 1 for prefix, count in groups.items())
    assert saved == most_saved([ids[:-1].tolist() for ids in sequences], 0)


def most_saved(heads: list[list[int]], depth: int) -> int:
    """The same by trying every node of the trie, from its root down."""
    here = (len(heads) - 1) * depth - 1
    longer = sorted((h for h in heads if len(h) > depth), key=lambda h: h[depth])
    below = sum(
        most_saved(list(group), depth + 1)
        for _, group in itertools.groupby(longer, key=lambda h: h[depth])
    )
    return max(here, below, 0)


def test_equal_tokens_are_told_apart_by_what_is_wanted() -> None:
    sequences = [tokens(1, 2), tokens(1, 3), tokens(1, 2), tokens(1, 2)]
    assert find_equal(sequences, ["a", "a", "a", "b"]) == [0, 1, 0, 3]


# --- what becomes of it


@given(SMALL.filter(len), st.integers(1, 20))
def test_a_pack_holds_every_sequence_token_by_token(sequences: list[TokenIds], budget: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "_LEAST_SAVED", 1)
        prefixes = find_prefixes(sequences)
    packs = plan_packs([len(ids) for ids in sequences], budget, prefixes)
    assert sorted(itertools.chain(*packs)) == list(range(len(sequences)))
    for pack in packs:
        laid = lay_out([sequences[i] for i in pack], [prefixes[i] for i in pack])
        assert len(laid.ids_T) == sum(laid.pack.lengths)
        assert len(laid.ids_T) <= budget or len(pack) == 1
        positions = laid.pack.positions()
        for index, place in zip(pack, laid.places_of_each(), strict=True):
            assert laid.ids_T[place].tolist() == sequences[index].tolist()
            assert positions[place].tolist() == list(range(len(place)))


def test_keys_of_a_pack_follow_their_parents() -> None:
    pack = Pack((2, 3, 1), (-1, 0, 0))
    tensors = pack.on(torch.device("cpu"))
    assert tensors.query_bounds.tolist() == [0, 2, 5, 6]
    assert tensors.key_bounds.tolist() == [0, 2, 7, 10]
    assert tensors.keys is not None
    assert tensors.keys.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
    assert (tensors.longest_query, tensors.longest_key) == (3, 5)
    assert Pack((2, 3)).on(torch.device("cpu")).keys is None
