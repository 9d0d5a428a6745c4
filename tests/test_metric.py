"""The metric of whole rows against an oracle: one row at a time, eager attention, float64."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import CHATML, make_tokenizer, tiny_model

from pipeline.engine import Engine
from pipeline.metric import ifd_ratios, score_table
from pipeline.rendering import Renderer
from pipeline.samples import Message, Sample
from pipeline.schemas import PART, TOKENS


def tokens_table(renderer: Renderer, samples: list[Sample]) -> pa.Table:
    """What the tokenise stage hands on."""
    rows = [
        {
            "row_index": index,
            "sample_id": None if r.status == "malformed" else bytes(16),
            "status": r.status,
            "reason": r.reason,
            "input_ids": list(r.input_ids),
            "num_prompt_tokens": r.num_prompt_tokens,
            "truncated": r.truncated,
            "turns": [
                (t.direct_start, t.conditioned_start, t.direct_scored_start, t.end) for t in r.turns
            ],
        }
        for index, r in enumerate(renderer(samples))
    ]
    return pa.Table.from_pylist(rows, schema=TOKENS)


@torch.no_grad()
def oracle_means(model: Any, renderer: Renderer, sample: Sample) -> tuple[float, float]:
    """Mean losses, computed from text again: one forward pass for each side and turn."""
    model.set_attn_implementation("eager")
    (rendered,) = renderer([sample])
    prefix = list(renderer.prefix_ids)

    def losses(ids: list[int]) -> torch.Tensor:
        tensor = torch.tensor([ids])
        logits = model(tensor, use_cache=False).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, tensor[0, 1:], reduction="none")

    whole = losses(list(rendered.input_ids))
    conditioned: list[float] = []
    direct: list[float] = []
    for turn in rendered.turns:
        conditioned += whole[turn.conditioned_start - 1 : turn.end - 1].tolist()
        alone = losses(prefix + list(rendered.input_ids[turn.direct_start : turn.end]))
        direct += alone[-turn.num_direct :].tolist() if turn.num_direct else []
    return sum(conditioned) / len(conditioned), sum(direct) / len(direct)


def alpaca(instruction: str, response: str) -> Sample:
    return Sample((Message("user", instruction), Message("assistant", response)))


CONVERSATION = Sample(
    tuple(
        Message(role, content)
        for role, content in (
            ("user", "the sea"), ("assistant", "a poem about the wind"),
            ("user", "one"), ("assistant", "two three"), ("user", "more"), ("assistant", "four"),
        )
    )
)  # fmt: skip


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", ["alpaca", "vicuna", "plain", "chat"])
@pytest.mark.parametrize("pair", [False, True])
def test_rows_equal_the_oracle(bos: bool, template: str, pair: bool) -> None:
    model = tiny_model("Llama")
    renderer = Renderer(make_tokenizer(bos=bos, chat_template=CHATML), template, 200, pair)
    samples = [
        alpaca("Name the capital.", "the capital of France is Paris"),
        alpaca("Draw.", "- a poem about the sea and the wind " * 20),
        alpaca("Hm?", ""),
    ]
    if template in ("vicuna", "chat"):
        samples.append(CONVERSATION)
    part, num_tokens = score_table(
        tokens_table(renderer, samples), Engine(model, 64), renderer.prefix_ids
    )
    assert part.schema == PART
    assert num_tokens > 0
    for row, sample in zip(part.to_pylist(), samples, strict=True):
        if row["status"] == "empty_response":
            assert row["nll_conditioned"] is None
            continue
        assert row["status"] == "ok"
        conditioned, direct = oracle_means(model, renderer, sample)
        assert row["nll_conditioned"] / row["num_response_tokens"] == pytest.approx(
            conditioned, rel=1e-5
        )
        assert row["nll_direct"] / row["num_direct_tokens"] == pytest.approx(direct, rel=1e-5)
        assert row["ifd_loss_ratio"] == pytest.approx(conditioned / direct, rel=1e-5)
        assert row["ifd_ppl_ratio"] == pytest.approx(math.exp(conditioned - direct), rel=1e-4)


def test_turns_sum_to_the_row() -> None:
    renderer = Renderer(make_tokenizer(chat_template=CHATML), "chat", 200, True)
    part, _ = score_table(
        tokens_table(renderer, [CONVERSATION]), Engine(tiny_model("Llama")), renderer.prefix_ids
    )
    (row,) = part.to_pylist()
    assert len(row["turns"]) == 3
    for total, name in (
        ("nll_conditioned", "nll_conditioned"),
        ("nll_direct", "nll_direct"),
        ("num_response_tokens", "num_response_tokens"),
        ("num_direct_tokens", "num_direct_tokens"),
    ):
        assert row[total] == pytest.approx(sum(turn[name] for turn in row["turns"]))


def test_turns_scored_one_by_one_give_the_same() -> None:
    renderer = Renderer(make_tokenizer(chat_template=CHATML), "chat", 200, True)
    table = tokens_table(renderer, [CONVERSATION, alpaca("Draw.", "a poem")])
    model = tiny_model("Llama")
    together, num_tokens = score_table(table, Engine(model), renderer.prefix_ids)
    apart, num_apart = score_table(table, Engine(model, share=()), renderer.prefix_ids)
    assert num_apart == num_tokens  # what the corpus holds, whatever is shared
    for one, other in zip(together.to_pylist(), apart.to_pylist(), strict=True):
        for turn, same in zip(one.pop("turns"), other.pop("turns"), strict=True):
            assert turn == pytest.approx(same, rel=1e-5)
        assert one["ifd_loss_ratio"] == pytest.approx(other["ifd_loss_ratio"], rel=1e-5)


def test_unscored_rows_have_null_scores_and_a_status() -> None:
    renderer = Renderer(make_tokenizer(), "alpaca", 64, True)
    samples = [alpaca("word " * 99, "one two"), Sample(malformed="role"), alpaca("A", "one two")]
    model = tiny_model("Llama")
    part, _ = score_table(tokens_table(renderer, samples), Engine(model), renderer.prefix_ids)
    assert part["status"].to_pylist() == ["prompt_overlong", "malformed", "ok"]
    for name in ("nll_conditioned", "nll_direct", "ifd_loss_ratio", "ifd_ppl_ratio", "turns"):
        assert part[name].to_pylist()[:2] == [None, None]


def test_nonfinite_losses_are_a_status_not_a_number() -> None:
    model = tiny_model("Llama", vocab_size=640)
    renderer = Renderer(make_tokenizer(), "alpaca", 200, True)
    engine = Engine(model)
    samples = [alpaca("A", "one two"), alpaca("A", "three four")]
    three = renderer.tokenizer.encode("three")[0]
    with torch.no_grad():  # a broken embedding row: every loss that sees this token is NaN
        model.get_input_embeddings().weight[three] = torch.nan
    part, _ = score_table(tokens_table(renderer, samples), engine, renderer.prefix_ids)
    assert part["status"].to_pylist() == ["ok", "nonfinite"]
    assert part["ifd_loss_ratio"].to_pylist()[1] is None


def test_a_row_that_fails_alone_is_an_error_with_its_class() -> None:
    renderer = Renderer(make_tokenizer(), "alpaca", 200, True)
    engine = Engine(tiny_model("Llama", vocab_size=300))  # smaller than the tokenizer's
    samples = [alpaca("A", "b"), alpaca("A", "a poem about the sea")]
    table = tokens_table(renderer, samples)
    part, _ = score_table(table, engine, renderer.prefix_ids)
    assert part["status"].to_pylist()[1] == "error"
    assert part["reason"].to_pylist()[1] == "UnknownToken"


@pytest.mark.parametrize(
    ("conditioned", "direct", "expected"),
    [
        (1.0, 2.0, (0.5, math.exp(-1))),
        (2.0, 1.0, (2.0, math.e)),
        (math.nan, 1.0, None),
        (1.0, math.inf, None),
        (1.0, 0.0, None),
        (2000.0, 1.0, None),
    ],
)
def test_ratios(conditioned: float, direct: float, expected: tuple[float, float] | None) -> None:
    assert ifd_ratios(conditioned, direct) == (
        expected if expected is None else pytest.approx(expected)
    )


def test_scores_do_not_depend_on_the_order_of_rows() -> None:
    renderer = Renderer(make_tokenizer(), "alpaca", 200, True)
    engine = Engine(tiny_model("Llama"), 100)
    samples = [alpaca(f"Write {i}.", "the sea and the wind " * (1 + i % 4)) for i in range(9)]
    order = np.random.default_rng(0).permutation(9)
    part, _ = score_table(tokens_table(renderer, samples), engine, renderer.prefix_ids)
    shuffled, _ = score_table(
        tokens_table(renderer, [samples[i] for i in order]), engine, renderer.prefix_ids
    )
    expected = np.array(part["ifd_loss_ratio"].to_pylist())[order]
    np.testing.assert_allclose(shuffled["ifd_loss_ratio"].to_pylist(), expected, rtol=1e-5)
