"""What a training reads, token by token."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from conftest import CHATML, make_tokenizer, write_parquet

from pipeline import ingest, training_data
from pipeline.errors import InputError
from pipeline.job import check, plan
from pipeline.rendering import Renderer
from pipeline.samples import Message, Sample, read_samples
from pipeline.schemas import EXAMPLES
from pipeline.tokenising import tokenise
from pipeline.training_data import Examples, _example, refuse_empty, tokenise_corpus
from pipeline.units import Unit

USER = Message("user", "one two")
ANSWER = Message("assistant", "three four")


def example(renderer: Renderer, *messages: Message) -> tuple[str, list[str]]:
    """The whole text of an example, and its stretches with a loss."""
    (rendered,) = renderer([Sample(messages)])
    ids, targets = _example(rendered, renderer)
    decode: Callable[[Any], str] = renderer.tokenizer.decode
    edges = np.flatnonzero(np.diff(np.concatenate([[0], targets.astype(int), [0]])))
    stretches = [ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return decode(ids), [decode(stretch) for stretch in stretches]


def test_a_text_template_ends_with_eos() -> None:
    text, losses = example(Renderer(make_tokenizer(), "alpaca", 512, False), USER, ANSWER)
    assert text.endswith("### Response:three four</s>")
    assert losses == ["three four</s>"]


@pytest.mark.parametrize("space", ["", "\n"])
def test_a_chat_ends_with_its_own_token_and_the_white_space_before_it(space: str) -> None:
    template = CHATML.replace("<|im_end|>", f"{space}<|im_end|>")
    renderer = Renderer(make_tokenizer(chat_template=template), "chat", 512, False)
    text, losses = example(renderer, USER, ANSWER, USER, Message("assistant", "five"))
    assert text.endswith(f"five{space}<|im_end|>")
    assert losses == [f"three four{space}<|im_end|>", f"five{space}<|im_end|>"]


def test_an_answer_that_goes_on_does_not_end() -> None:
    template = CHATML.replace("<|im_end|>", " and a call <|im_end|>")
    renderer = Renderer(make_tokenizer(chat_template=template), "chat", 512, False)
    text, losses = example(renderer, USER, ANSWER)
    assert text.endswith("three four")
    assert losses == ["three four"]


def test_turns_of_a_text_template_end_with_eos() -> None:
    renderer = Renderer(make_tokenizer(), "vicuna", 512, False)
    text, losses = example(renderer, USER, ANSWER, USER, Message("assistant", "five"))
    assert text.count("</s>") == 2
    assert losses == ["three four</s>", "five</s>"]


def test_an_answer_that_is_cut_does_not_end() -> None:
    whole = Renderer(make_tokenizer(), "plain", 512, False)
    (rendered,) = whole([Sample((USER, Message("assistant", "three four five six seven")))])
    limit = len(rendered.input_ids) - 2
    renderer = Renderer(make_tokenizer(), "plain", limit, False)
    text, losses = example(renderer, USER, Message("assistant", "three four five six seven"))
    assert "</s>" not in text
    assert len(losses) == 1


def test_no_room_for_the_end_is_no_end() -> None:
    whole = Renderer(make_tokenizer(), "plain", 512, False)
    (rendered,) = whole([Sample((USER, ANSWER))])
    renderer = Renderer(make_tokenizer(), "plain", len(rendered.input_ids), False)
    assert example(renderer, USER, ANSWER)[1] == ["three four"]


def test_examples_lie_end_to_end() -> None:
    rows = [
        {"sample_id": b"a" * 16, "input_ids": [1, 2, 3], "is_target": [False, False, True]},
        {"sample_id": b"b" * 16, "input_ids": [4, 5], "is_target": [False, True]},
    ]
    table = pa.concat_tables([pa.Table.from_pylist([row], EXAMPLES) for row in rows])
    examples = Examples.from_table(table)
    assert len(examples) == 2
    assert examples.ids.tolist() == [1, 2, 3, 4, 5]
    assert examples.starts.tolist() == [0, 3, 5]
    assert examples.lengths.tolist() == [3, 2]
    assert examples.num_targets == 2


@pytest.mark.ray
def test_answers_of_one_token_are_trained_on_and_their_prompts_embedded(
    ray_local: None, config_for: Callable[..., Any], tmp_path: Path
) -> None:
    """They have a loss behind their prompt; alone, without a marker or BOS, nothing predicts it."""
    words = ["one", "one", "one two"]
    rows = [{"instruction": "Say a word.", "input": "", "output": word} for word in words]
    write_parquet(tmp_path / "in/a.parquet", rows)
    job = plan(check(config_for(tmp_path / "in", score={"template": "plain"}), selecting=False))
    samples = list(read_samples(pa.Table.from_pylist(rows), job.corpus.shards[0].columns))
    indices = np.arange(len(rows))
    scored = tokenise(indices, samples, job.settings)
    assert scored["status"].to_pylist() == ["too_short", "too_short", "ok"]
    examples, left_out = tokenise_corpus(job.corpus, job.settings)
    assert (len(examples), left_out) == (3, 0)
    assert [sum(row) for row in examples["is_target"].to_pylist()][:2] == [2, 2]  # and the end
    embedded = tokenise(indices, samples, replace(job.settings, measure="prompt"))
    assert embedded["status"].to_pylist() == ["ok"] * 3


def test_long_rows_are_tokenised_a_few_at_a_time(
    config_for: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are for scoring: what could be scored shall not exhaust the memory here."""
    rows = [{"instruction": f"{n}", "input": "", "output": f"word{n} " * 3_000} for n in range(200)]
    corpus = check(config_for(write_parquet(tmp_path / "a.parquet", rows)), selecting=False).corpus
    units: list[Unit] = []
    monkeypatch.setattr(training_data, "tokenise_rows", lambda some, _: units.extend(some))
    tokenise_corpus(corpus, cast(Any, None))
    assert sum(unit.num_rows for unit in units) == 200
    assert max(unit.num_rows for unit in units) <= 100


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(InputError, match="cherry subset: none of its 7 rows has an answer"):
        refuse_empty(EXAMPLES.empty_table(), 7, "cherry subset")


def test_a_field_that_some_shards_lack_is_null_there(
    tmp_path: Path, config_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one file differ in what happens to be in them; some are broken lines."""
    monkeypatch.setattr(ingest, "_INGEST_ROWS", 2)
    lines = [
        *["{"] * 2,
        *['{"instruction": "a", "output": "c"}'] * 3,
        '{"instruction": "a", "input": "b", "output": "c"}',
        "{",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert (
        len(check(config_for(tmp_path / "rows.jsonl", train={}), selecting=True).corpus.shards) == 4
    )


@pytest.mark.parametrize(
    "other",
    [
        {"instruction": "a", "context": "b", "output": "c"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]},
    ],
)
def test_what_is_read_from_another_column_is_refused(
    tmp_path: Path, config_for: Callable[..., Any], other: dict[str, Any]
) -> None:
    write_parquet(tmp_path / "in/a.parquet", [{"instruction": "a", "input": "b", "output": "c"}])
    write_parquet(tmp_path / "in/b.parquet", [other])
    with pytest.raises(InputError, match=r"b\.parquet reads as .* shard .*a\.parquet as alpaca"):
        check(config_for(tmp_path / "in", train={}), selecting=True)
