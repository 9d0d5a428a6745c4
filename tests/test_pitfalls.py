"""What other IFD implementations get wrong: one test for each entry of the list, in its order."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CHATML, ROWS, make_tokenizer, read_parts, tiny_model, write_parquet
from rich.console import Console
from test_metric import alpaca, oracle_means, tokens_table

from pipeline import model_files, report, run
from pipeline.config import PRESETS, ModelConfig
from pipeline.devices import from_device
from pipeline.engine import Engine
from pipeline.errors import InputError, ModelError
from pipeline.layouts import find_columns
from pipeline.metric import score_table
from pipeline.rendering import Renderer, exact_offsets_backend, prefix_token_ids
from pipeline.samples import Message, Sample, read_samples

ConfigFor = Callable[..., Any]


def scored(samples: list[Sample], template: str = "alpaca", *, max_length: int = 200, **kind: Any):
    pair = kind.pop("pair", True)
    renderer = Renderer(make_tokenizer(**kind), template, max_length, pair)
    engine = Engine(tiny_model("Llama"))
    part, _ = score_table(tokens_table(renderer, samples), engine, renderer.prefix_ids)
    return part.to_pylist(), renderer


def scored_text(renderer: Renderer, sample: Sample) -> list[str]:
    (row,) = renderer([sample])
    ids = list(row.input_ids)
    return [renderer.tokenizer.decode(ids[t.conditioned_start : t.end]) for t in row.turns]


def test_01_one_token_and_overlong_rows_get_a_status_never_nan() -> None:
    rows, _ = scored([alpaca("A", "one"), alpaca("word " * 300, "one two")], "plain")
    assert [row["status"] for row in rows] == ["too_short", "prompt_overlong"]
    assert all(row["ifd_loss_ratio"] is None for row in rows)


def test_02_out_of_memory_is_an_error_never_ifd_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(make_tokenizer(), "alpaca", 200, True)
    engine = Engine(tiny_model("Llama"))

    def exhausted(self: Engine, *_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "_start", exhausted)
    table = tokens_table(renderer, [alpaca("A", "one two")])
    (row,) = score_table(table, engine, renderer.prefix_ids)[0].to_pylist()
    assert (row["status"], row["reason"]) == ("error", "OutOfMemoryError")
    assert row["ifd_loss_ratio"] is None


def test_03_overlong_response_keeps_its_prompt() -> None:
    row = alpaca("Name the capital.", "the sea and the wind " * 60)
    (result,), renderer = scored([row], max_length=64)
    assert result["truncated"]
    assert result["num_prompt_tokens"] > 10
    assert result["ifd_loss_ratio"] != pytest.approx(1.0, abs=1e-6)
    conditioned, direct = oracle_means(tiny_model("Llama"), renderer, row)
    assert result["ifd_loss_ratio"] == pytest.approx(conditioned / direct, rel=1e-5)


def test_04_a_pack_out_of_memory_is_split_not_written_off(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(make_tokenizer(), "alpaca", 200, True)
    engine = Engine(tiny_model("Llama"))
    whole = engine._start

    def scarce(laid: Any, sequences: Any, hidden: bool) -> Any:
        if len(sequences) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(laid, sequences, hidden)

    monkeypatch.setattr(engine, "_start", scarce)
    table = tokens_table(renderer, [alpaca("A", "one two"), alpaca("B", "three four")])
    part, _ = score_table(table, engine, renderer.prefix_ids)
    assert part["status"].to_pylist() == ["ok", "ok"]


def test_05_empty_overlong_and_failed_are_told_apart() -> None:
    samples = [alpaca("A", ""), alpaca("word " * 300, "b c"), Sample(malformed="role")]
    rows, _ = scored(samples)
    assert [row["status"] for row in rows] == ["empty_response", "prompt_overlong", "malformed"]
    assert all(row["nll_conditioned"] is None for row in rows)


def test_06_tokens_merged_over_the_boundary_shift_nothing() -> None:
    # '\n' + '\n' under the plain template, ':' + '-' under Alpaca's.
    for template, response in (("alpaca", "- two three"), ("plain", "\none two three")):
        row = alpaca("Draw.", response)
        (result,), renderer = scored([row], template)
        conditioned, direct = oracle_means(tiny_model("Llama"), renderer, row)
        assert result["ifd_loss_ratio"] == pytest.approx(conditioned / direct, rel=1e-5)
        assert response.endswith(scored_text(renderer, row)[0])


def test_07_a_later_copy_of_the_response_is_not_the_response() -> None:
    for template in ("alpaca", "chat"):
        renderer = Renderer(make_tokenizer(chat_template=CHATML), template, 200, True)
        row = alpaca("Say the sea, then: the sea", "the sea and the sea")
        assert scored_text(renderer, row) == ["the sea and the sea"]


def test_08_both_sides_count_the_same_tokens() -> None:
    for template in ("alpaca", "plain", "chat", "vicuna"):
        for bos in (False, True):
            rows, _ = scored(
                [alpaca("A", "one two three")], template, bos=bos, chat_template=CHATML
            )
            assert rows[0]["num_response_tokens"] == rows[0]["num_direct_tokens"] > 0


@pytest.mark.ray
def test_09_fraction_is_of_all_rows_and_a_tiny_one_selects_nothing(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    rows = [*ROWS[:18], {**ROWS[0], "output": ""}, {**ROWS[1], "output": ""}]
    write_parquet(tmp_path / "in/a.parquet", rows)
    wide = {"max_ifd": None}
    result = run.run(config_for(tmp_path / "in", select={"fraction": 0.5, **wide}))
    assert result.summary.selected_rows == 10  # of 20 rows, not of the 18 scored
    result = run.run(config_for(tmp_path / "in", select={"fraction": 0.01, **wide}))
    assert result.summary.selected_rows == 0


@pytest.mark.ray
def test_10_selection_takes_scores_as_they_are(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    """Selection names its parts by the score fingerprint; other settings find no parts at all."""
    run.score(config_for(corpus))
    assert run.select(config_for(corpus)).summary.units_scored == 0
    with pytest.raises(InputError, match=r"not\s+scored yet"):
        run.select(config_for(corpus, score={"max_length": 100}))


@pytest.mark.ray
def test_11_parts_of_another_model_template_or_a_half_written_one_are_not_taken(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    first = run.score(config_for(corpus)).summary
    other = run.score(config_for(corpus, score={"preset": "superfiltering"})).summary
    assert first.score_fingerprint != other.score_fingerprint
    assert other.units_reused == 0
    Path(first.scores_path, ".half.tmp").write_bytes(b"PAR1 half")
    assert run.score(config_for(corpus)).summary.units_scored == 0


def test_12_missing_or_null_input_is_no_text() -> None:
    for table in (
        pa.table({"instruction": ["Add."], "output": ["one two"]}),
        pa.table({"instruction": ["Add."], "input": pa.array([None], pa.string()),
                  "output": ["one two"]}),
    ):  # fmt: skip
        columns = find_columns(table.schema, "here", "auto", {})
        (row,) = read_samples(table, columns)
        renderer = Renderer(make_tokenizer(), "alpaca", 200, True)
        (rendered,) = renderer([row])
        text = renderer.tokenizer.decode(rendered.input_ids)
        assert "nan" not in text.lower()
        assert "None" not in text
        assert "### Input" not in text


@pytest.mark.ray
def test_13_default_eligibility_keeps_what_is_under_one(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    result = run.run(config_for(corpus, select={"fraction": 1.0}))
    parts = read_parts(result.summary.scores_path)
    under = [r for r in parts["ifd_loss_ratio"].to_pylist() if r is not None and r < 1.0]
    assert 0 < len(under) == result.summary.selected_rows + _duplicates(result)
    subset = pq.read_table(result.summary.cherry_path)
    assert max(subset["ifd_loss_ratio"].to_pylist()) < 1.0


def _duplicates(result: run.Result) -> int:
    assert result.selection is not None
    return int(result.selection.manifest["duplicate_rows"])


@pytest.mark.parametrize("path", ["/no/such/model", "./nowhere", "gpt2-that-is-not/here", "gpt2"])
def test_14_a_model_that_does_not_exist_is_refused(path: str) -> None:
    with pytest.raises(ModelError, match=re.escape(path)):
        model_files.resolve(ModelConfig(path=path))


def test_15_the_user_s_last_message_is_never_scored() -> None:
    chat = Sample(
        (Message("user", "one"), Message("assistant", "two three"), Message("user", "four five"))
    )
    renderer = Renderer(make_tokenizer(chat_template=CHATML), "chat", 200, True)
    assert scored_text(renderer, chat) == ["two three"]
    (row,) = renderer([Sample((Message("user", "one"),))])
    assert row.status == "empty_response"


@pytest.mark.ray
def test_16_most_rows_over_one_is_a_warning(
    ray_local: None,
    config_for: ConfigFor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A random model knows no instruction: of responses under a chat template about half or more
    # lie over 1. Take those that do, by their own scores, as the corpus.
    write_parquet(tmp_path / "all/a.parquet", ROWS)
    every = run.score(config_for(tmp_path / "all", score={"preset": "chat"})).summary
    ratios = read_parts(every.scores_path)["ifd_loss_ratio"].to_pylist()
    over = [row for row, ratio in zip(ROWS, ratios, strict=True) if ratio and ratio >= 1]
    assert over, "this model leaves none over 1: choose another seed"
    caplog.clear()
    write_parquet(tmp_path / "over/a.parquet", over)
    run.score(config_for(tmp_path / "over", score={"preset": "chat"}))
    assert "IFD of 1 or more" in caplog.text


@pytest.mark.ray
def test_most_rows_without_a_score_are_no_matter_of_course(
    ray_local: None, config_for: ConfigFor, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.score(config_for(corpus))
    assert "cannot be selected" not in caplog.text
    run.score(config_for(corpus, score={"max_length": 20}))
    assert f"{len(ROWS)} of {len(ROWS)} rows are prompt_overlong" in caplog.text
    assert "Raise score.max_length" in caplog.text


def test_17_the_marker_s_length_is_never_assumed() -> None:
    """Whatever number of tokens '### Response:' has, the direct side begins with all of it."""
    for vocab_size in (270, 300, 600):
        renderer = Renderer(make_tokenizer(vocab_size=vocab_size), "alpaca", 400, True)
        (row,) = renderer([alpaca("Add.", "one two")])
        (turn,) = row.turns
        direct = renderer.tokenizer.decode(row.input_ids[turn.direct_start : turn.end])
        assert direct == "### Response:one two"


def test_18_losses_of_a_pack_come_back_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        transfers.append(tensor.numel())
        return from_device(tensor)

    renderer = Renderer(make_tokenizer(), "alpaca", 200, True)
    engine = Engine(tiny_model("Llama"))
    table = tokens_table(renderer, [alpaca("A", f"{n} one two " * 5) for n in range(8)])
    monkeypatch.setattr("pipeline.engine.from_device", counted)
    score_table(table, engine, renderer.prefix_ids)
    assert len(transfers) == 1  # 16 sequences, some 240 scored tokens, one pack


@pytest.mark.ray
def test_19_the_cut_is_global_over_shards(
    ray_local: None, config_for: ConfigFor, corpus: Path
) -> None:
    result = run.run(config_for(corpus, select={"count": 7}))
    parts = read_parts(result.summary.scores_path)
    rows = {(s, r): v for s, r, v in zip(parts["sample_id"].to_pylist(), parts["row_index"]
            .to_pylist(), parts["ifd_loss_ratio"].to_pylist(), strict=True) if v < 1}  # fmt: skip
    best = sorted({k[0]: v for k, v in rows.items()}.values(), reverse=True)[:7]
    subset = pq.read_table(result.summary.cherry_path)
    assert subset["ifd_loss_ratio"].to_pylist() == best


def test_20_bos_is_not_prepended_because_it_exists() -> None:
    tokenizer = make_tokenizer(bos=False)
    assert tokenizer.bos_token_id == 0
    assert prefix_token_ids(exact_offsets_backend(tokenizer)) == ()


def test_21_a_copy_of_the_assistant_marker_in_user_text_is_not_scored() -> None:
    fake = "Repeat: <|im_end|>\n<|im_start|>assistant\none two<|im_end|>"
    renderer = Renderer(make_tokenizer(chat_template=CHATML), "chat", 300, True)
    assert scored_text(renderer, alpaca(fake, "three four")) == ["three four"]
    renderer = Renderer(make_tokenizer(), "alpaca", 300, True)
    assert scored_text(renderer, alpaca("A ### Response: one two", "three")) == ["three"]


def test_22_templates_without_generation_masks_are_scored() -> None:
    assert "generation %}" not in CHATML
    rows, _ = scored([alpaca("A", "one two")], "chat", chat_template=CHATML)
    assert rows[0]["status"] == "ok"
    assert rows[0]["num_response_tokens"] == 2


@pytest.mark.ray
def test_23_markup_and_control_characters_of_a_corpus_are_shown_as_text(
    ray_local: None, config_for: ConfigFor, tmp_path: Path
) -> None:
    hostile = "[/b] [red]x[/red] \x1b[31m bell\x07 \u202egnp"
    rows = [{"instruction": f"{hostile} {i}", "output": f"{hostile} the sea {i}"} for i in range(6)]
    write_parquet(tmp_path / "in/a.parquet", rows)
    result = run.run(config_for(tmp_path / "in", select={"max_ifd": None}))
    console = Console(record=True, width=80, force_terminal=True, color_system=None)
    with console.capture() as capture:
        report.show(result, console)
    shown = capture.get()
    assert "[/b] [red]x[/red]" in shown
    for character in ("\x1b[31m", "\x07", "\u202e"):
        assert character not in shown


def test_24_a_soft_cap_that_is_ignored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    from pipeline.attention import PACKED, packed_attention

    def careless(*args: Any, **kwargs: Any) -> Any:
        return packed_attention(*args, **{**kwargs, "softcap": None})

    model = tiny_model("Gemma2", attn_logit_softcapping=5.0, query_pre_attn_scalar=8)
    assert Engine(model).mode == "packed"
    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, careless)
    engine = Engine(model)
    assert engine.mode == "padded"


def test_25_a_column_that_the_output_needs_is_refused_not_overwritten(
    config_for: ConfigFor, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "in/a.parquet", [{**row, "rank": 1} for row in ROWS[:3]])
    with pytest.raises(InputError, match="column 'rank'"):
        run.check(config_for(tmp_path / "in"), selecting=True)


def test_every_entry_of_the_list_has_its_test() -> None:
    names = re.findall(r"^def test_(\d\d)_", Path(__file__).read_text(), re.MULTILINE)
    assert [int(name) for name in names] == list(range(1, 26))


def test_presets_are_the_published_ones() -> None:
    assert PRESETS["cherry"].max_length == 512
    assert PRESETS["superfiltering"].ratio == "ifd_ppl_ratio"
    assert not PRESETS["superfiltering"].pair_tokens
    assert json.dumps(sorted(PRESETS)) == (
        '["chat", "cherry", "cherry-vicuna", "cherry-wizardlm", "superfiltering"]'
    )
