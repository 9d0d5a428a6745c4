"""The engine against transformers' own eager attention, one row at a time."""

import copy
import functools
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import REPOSITORY, longrope, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from pipeline import forward, probe, projection
from pipeline.attention import PACKED, UnsupportedAttentionError, packed_attention
from pipeline.devices import auto_batch_tokens, auto_dtype
from pipeline.engine import Engine, TokenSequence
from pipeline.errors import ModelError
from pipeline.forward import longest_together, run_padded
from pipeline.grouped_attention import _plan_groups
from pipeline.packing import Laid, Pack
from pipeline.probe import find_fault
from pipeline.projection import LogitTransform
from pipeline.sharing import Share

FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "gpt2-learned-positions": ("GPT2", {}),
    "qwen2-biases": ("Qwen2", {}),
    "qwen2-sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3-qk-norm": ("Qwen3", {}),
    "mistral-sliding": ("Mistral", {"sliding_window": 12}),
    "gemma-head-256": ("Gemma", {"head_dim": 256}),
    "gemma2-soft-caps": (
        "Gemma2",
        {
            "sliding_window": 12,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3-sliding": ("Gemma3Text", {"sliding_window": 12, "query_pre_attn_scalar": 8}),
    "granite-scales": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.2}),
    "cohere-scale": ("Cohere", {"logit_scale": 0.25}),
    "phi3-fused": ("Phi3", {"sliding_window": 12}),
    "gpt-oss-sinks": (
        "GptOss",
        {"sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
BART = {
    "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
}  # fmt: skip
UNPACKABLE = {
    # Masks its attention by position ids, through which NaN would reach other sequences.
    "gptj-own-attention": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "plbart-ignores-positions": ("PLBart", {**BART, "max_position_embeddings": 1024}),
    "bart-fewer-positions-than-a-pack": ("Bart", {**BART, "max_position_embeddings": 128}),
    "phimoe-asks-for-no-window": ("Phimoe", {"sliding_window": 12, "num_local_experts": 4}),
    "bert-decoder": ("Bert", {"is_decoder": True}),
    "mpt-scale-by-name": (
        "Mpt",
        {
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 256,
            "logit_scale": "inv_sqrt_d_model",
        },
    ),
}
RUNNING_ON = {
    "mamba-state": ("Mamba", {"state_size": 8}),
    "falcon-mamba-state": ("FalconMamba", {"state_size": 8}),
    "mamba2-state": (
        "Mamba2",
        {"head_dim": 8, "num_heads": 8, "n_groups": 1, "state_size": 8},
    ),
    "lfm2-convolution": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "falcon-h1-state-beside-attention": ("FalconH1", {}),
    "qwen3.5-linear-attention": (
        "Qwen3_5Text",
        {
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}


def sequences_of(lengths: list[int], seed: int = 0) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    return [
        TokenSequence(
            random.integers(0, 400, n, dtype=np.int32), ((n // 3 + 1, n),) if n > 2 else ((1, n),)
        )
        for n in lengths
    ]


@torch.no_grad()
def oracle(model: torch.nn.Module, sequence: TokenSequence) -> list[float]:
    """One row, the model's own eager attention, log-softmax in float64."""
    model.set_attn_implementation("eager")
    ids = torch.tensor(sequence.input_ids, dtype=torch.int64)
    logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    nll = -torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
    return [float(nll[start - 1 : end - 1].sum()) for start, end in sequence.spans]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compiled", ["auto", False])
def test_packed_equals_eager_one_row_at_a_time(family: str, compiled: bool) -> None:
    architecture, changes = FAMILIES[family]
    model = tiny_model(architecture, **changes)
    engine = Engine(model, compiled=compiled)
    assert engine.mode == "packed"
    # Several are longer than every window (12), one is longer than the explicit path's limit.
    sequences = sequences_of([40, 3, 25, 2, 60, 13, 12, 33])
    expected = [oracle(model, sequence) for sequence in sequences]
    for budget in (1, 64, 4096):
        engine.max_batch_tokens = budget
        for nll, loss in zip(expected, engine.score(sequences), strict=True):
            assert loss.nll_nats == pytest.approx(nll, rel=1e-5)


def test_fused_attention_of_long_sequences_equals_eager() -> None:
    for changes in ({}, {"sliding_window": 100}):
        model = tiny_model("Mistral", max_position_embeddings=2048, **changes)
        sequences = sequences_of([900, 513, 20])
        for sequence, loss in zip(sequences, Engine(model).score(sequences), strict=True):
            assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@pytest.mark.parametrize("mode", ["packed", "padded"])
@pytest.mark.parametrize("share", [(), ("prefixes",)], ids=str)
def test_longrope_turns_short_sequences_as_if_they_were_alone(
    share: tuple[Share, ...], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers takes the frequencies of all from the longest of a pass."""
    model = tiny_model("Phi3", max_position_embeddings=128, **longrope(32))
    assert longest_together(model.config) == 32
    sequences = sequences_of([100, 20, 40, 32, 33, 9])
    if mode == "padded":
        monkeypatch.setattr("pipeline.probe.find_fault", lambda *_, **__: "of a test")
    engine = Engine(model, share=share)
    assert engine.mode == mode
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


def test_neighbours_of_unlike_lengths_are_grouped_and_ungrouped_right() -> None:
    model = tiny_model("Llama", num_attention_heads=4, num_key_value_heads=1)
    lengths = [30, 30, 29, 25, 24, 23, 22, 12, 11, 9, 9, 5, 4, 4, 2, 2]
    groups = _plan_groups(Pack(tuple(lengths)), 4)
    assert [n for group in groups for n in group.lengths] == lengths
    assert max(len(group.lengths) for group in groups) > 1
    sequences = sequences_of(lengths)
    for sequence, loss in zip(sequences, Engine(model).score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@functools.cache
def llama_engine() -> Engine:
    return Engine(tiny_model("Llama"))


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 50), min_size=1, max_size=12), budget=st.integers(1, 200))
def test_any_packing_gives_the_same_losses(lengths: list[int], budget: int) -> None:
    engine = llama_engine()
    sequences = sequences_of(lengths, seed=len(lengths))
    engine.max_batch_tokens = 10_000
    whole = engine.score(sequences)
    engine.max_batch_tokens = budget
    packed = engine.score(sequences)
    for one, other in zip(whole, packed, strict=True):
        assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-5)


@pytest.mark.parametrize("family", [*UNPACKABLE, *RUNNING_ON])
def test_architectures_that_cannot_be_packed_fall_back_and_are_right(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    architecture, changes = {**UNPACKABLE, **RUNNING_ON}[family]
    model = tiny_model(architecture, **changes)
    engine = Engine(model, max_batch_tokens=128)
    assert engine.mode == "padded"
    assert "padded batches" in caplog.text
    sequences = sequences_of([40, 3, 25, 2, 60])
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@pytest.mark.parametrize("family", [*UNPACKABLE, *RUNNING_ON])
@pytest.mark.parametrize("share", [(), ("prefixes",)], ids=str)
def test_what_fits_no_pack_is_noticed_in_half_precision_too(
    family: str, share: tuple[Share, ...]
) -> None:
    """Rounding explains 0.2 nats there, and a state fades before the end of a sequence."""
    architecture, changes = {**UNPACKABLE, **RUNNING_ON}[family]
    half = tiny_model(architecture, **changes).bfloat16()
    assert Engine(half, share=share).mode == "padded"
    assert find_fault(tiny_model(architecture, **changes), dtype=torch.bfloat16)  # in training


def test_a_model_that_refuses_packed_attention_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transformers warns each time, which would be once a pack."""
    architecture, changes = UNPACKABLE["gptj-own-attention"]
    model = tiny_model(architecture, **changes)
    asked = []
    ask = model.set_attn_implementation
    monkeypatch.setattr(
        model, "set_attn_implementation", lambda name: (asked.append(name), ask(name))
    )
    engine = Engine(model, 16)
    engine.score(sequences_of([10, 12, 14]))
    assert sorted(asked) == sorted(set(asked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_faint_convolution_is_noticed(dtype: torch.dtype) -> None:
    """It reaches two tokens into the next sequence, with a hundredth of their size."""
    model = tiny_model("Lfm2", layer_types=["conv", "full_attention"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".conv." in name and parameter.dim() > 1:
                parameter.normal_(0, 0.06)
    assert Engine(model.to(dtype)).mode == "padded"


@pytest.mark.parametrize("family", [*FAMILIES, *RUNNING_ON])
def test_what_leaks_lies_far_from_the_tolerance(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures at the tolerances in probe.py."""
    found: list[torch.Tensor] = []
    right = probe._leaks
    monkeypatch.setattr(probe, "_leaks", lambda *states: found.append(right(*states)) or found[-1])
    architecture, changes = {**FAMILIES, **RUNNING_ON}[family]
    for dtype in (torch.float32, torch.bfloat16):
        for sharing in (False, True):
            model = tiny_model(architecture, **changes).to(dtype)
            find_fault(model, sharing=sharing)
    noise, leaks = found[::3], [float(x.max()) for at, x in enumerate(found) if at % 3]
    assert (len(noise), len(leaks)) == (4, 8)
    assert not torch.stack(noise).any()
    if family in FAMILIES:
        assert set(leaks) == {0.0}
    else:
        assert 1 < min(leaks) < max(leaks) < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match="BertLMHeadModel is not causal"):
        Engine(tiny_model("Bert").to(dtype))


def test_a_model_of_few_positions_is_probed_within_them() -> None:
    model = tiny_model("Bart", **{**BART, "max_position_embeddings": 20})
    sequences = sequences_of([9, 18])
    for sequence, loss in zip(sequences, Engine(model).score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


def test_tokens_that_fill_a_pack_up_need_no_more_positions_than_there_are() -> None:
    model = tiny_model("GPT2", n_positions=40)
    sequences = sequences_of([5, 3])
    engine = Engine(model)
    assert engine.mode == "packed"
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@pytest.mark.parametrize("positions", [20, 128])
def test_a_probe_has_no_more_tokens_than_the_model_has_positions(
    positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that counts them through a pack would break a GPU until the process ends."""
    counts = []

    def counted(model: Any, pack: Pack, *rest: Any) -> torch.Tensor:
        counts.append(sum(pack.lengths))
        return forward.hidden_packed(model, pack, *rest)

    monkeypatch.setattr("pipeline.probe.hidden_packed", counted)
    model = tiny_model("Bart", **{**BART, "max_position_embeddings": positions})
    assert Engine(model, share=()).mode == "padded"
    assert 0 < max(counts) <= positions


def test_sequences_that_padding_changes_are_scored_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def spoiled(model: Any, lengths: list[int], *rest: Any, **options: Any) -> Any:
        logits_TV, states_TM = run_padded(model, lengths, *rest, **options)
        if len(set(lengths)) > 1:
            logits_TV[:, 7] += 9
        return logits_TV, states_TM

    monkeypatch.setattr("pipeline.probe.run_padded", spoiled)
    monkeypatch.setattr("pipeline.engine.run_padded", spoiled)
    model = tiny_model("Mamba", state_size=8)
    engine = Engine(model)
    assert engine.mode == "padded"
    assert "each sequence alone" in caplog.text
    sequences = sequences_of([9, 20, 14])
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@pytest.mark.parametrize("family", ["gptj-own-attention", "mamba-state", "llama"])
@pytest.mark.parametrize("spoiled", [0, 77])
def test_what_is_no_number_stays_in_its_sequence(family: str, spoiled: int) -> None:
    """Token 0 is what batches are filled up with elsewhere."""
    architecture, changes = {**FAMILIES, **UNPACKABLE, **RUNNING_ON}[family]
    model = tiny_model(architecture, **{**changes, "tie_word_embeddings": False})
    engine = Engine(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[spoiled] = torch.nan
    random = np.random.default_rng(0)
    ids = [random.integers(100, 600, n, dtype=np.int32) for n in (9, 20, 14, 30)]
    ids[1][5] = spoiled
    losses = engine.score([TokenSequence(each, ((1, len(each)),)) for each in ids])
    assert [math.isfinite(loss.nll_nats[0]) for loss in losses] == [True, False, True, True]


def test_a_language_model_within_another_is_asked_for_its_attention() -> None:
    """The vision model refuses to be asked, and the whole is as it was."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16,
        "output_channels": 16, "image_size": 64, "patch_size": 16, "window_size": 2,
        "global_attn_indexes": [0],
    }  # fmt: skip
    text = tiny_config("Qwen2").to_dict()
    config = transformers.GotOcr2Config(text_config=text, vision_config=vision)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    sequences = sequences_of([9, 20])
    for mode in ("packed", "padded"):
        engine = Engine(model)
        assert engine.mode == "packed"
        engine.mode = mode  # type: ignore[assignment]
        for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
            assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


def test_keys_that_are_no_tokens_are_refused() -> None:
    """DeepSeek-V4 attends to entries for many tokens behind those for one."""
    query, key = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 15, 8)
    with pytest.raises(UnsupportedAttentionError, match="keys that are no tokens"):
        packed_attention(torch.nn.Linear(1, 1), query, key, key, None, cherry_pack=Pack((7, 5)))


def test_values_may_have_another_width_than_keys() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8)
    value = torch.randn(1, 2, 12, 5)
    output, _ = packed_attention(
        torch.nn.Linear(1, 1), query, key, value, None, cherry_pack=Pack((7, 5))
    )
    expected = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, part], key[:, :, part], value[:, :, part], is_causal=True, enable_gqa=True
        )
        for part in (slice(0, 7), slice(7, 12))
    ]
    torch.testing.assert_close(output, torch.cat(expected, dim=2).transpose(1, 2))


def test_autocast_rounds_no_scores_of_attention() -> None:
    """It would multiply queries and keys in bfloat16, whatever they are."""
    torch.manual_seed(0)
    query, key, value = (5 * torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    layer, pack = torch.nn.Linear(1, 1), Pack((7, 5))
    expected, _ = packed_attention(layer, query, key, value, None, cherry_pack=pack)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention(layer, query, key, value, None, cherry_pack=pack)
    torch.testing.assert_close(output, expected)


def test_queries_stay_float32_beside_values_in_half_precision() -> None:
    """As the rotary embedding leaves them under autocast; the fused kernel takes one dtype only."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 606, 8) for heads in (4, 2, 2))
    value = value.bfloat16()
    layer, pack = torch.nn.Linear(1, 1), Pack((600, 6))
    output, _ = packed_attention(layer, query, key, value, None, cherry_pack=pack)
    expected, _ = packed_attention(layer, query, key, value.float(), None, cherry_pack=pack)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


def test_padded_batches_stay_within_the_budget_with_their_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.probe.find_fault", lambda *_, **__: "of a test")
    sizes = []

    def noted(model: object, lengths: list[int], *rest: object, **kinds: object) -> object:
        sizes.append(len(lengths) * max(lengths))
        return run_padded(model, lengths, *rest, **kinds)  # type: ignore[arg-type]

    monkeypatch.setattr("pipeline.engine.run_padded", noted)
    model = tiny_model("Llama")
    sequences = sequences_of([60, *[4] * 40])
    losses = Engine(model, max_batch_tokens=64).score(sequences)
    assert max(sizes) <= 64
    for sequence, loss in zip(sequences, losses, strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


def test_the_pack_of_a_gpu_follows_its_memory_the_dtype_the_shape_and_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = SimpleNamespace(total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)

    def tokens(
        dtype: torch.dtype, inner: int | list[int], share: float = 1.0, weights: int = 0
    ) -> int:
        shape = SimpleNamespace(hidden_size=4096, intermediate_size=inner)
        return auto_batch_tokens(torch.device("cuda"), dtype, shape, weights, share)

    assert tokens(torch.bfloat16, 11008) == 42 * 1024
    assert tokens(torch.float32, 11008) == 21 * 1024
    assert tokens(torch.bfloat16, [8192, 11008]) == 42 * 1024  # Gemma 3n has one a layer
    assert tokens(torch.bfloat16, 200) == 65536
    assert tokens(torch.bfloat16, 11008, share=0.5) == 21 * 1024
    assert tokens(torch.bfloat16, 11008, weights=12 << 30) == 15 * 1024  # half of 4 GiB
    assert tokens(torch.bfloat16, 11008, share=0.5, weights=6 << 30) == 7 * 1024
    assert tokens(torch.bfloat16, 11008, weights=20 << 30) == 2048


def test_the_weights_are_those_that_lie_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("pipeline.engine.auto_batch_tokens", lambda *given: asked.append(given[3]))
    model = tiny_model("Llama")
    here = 4 * sum(p.numel() for p in model.parameters())
    elsewhere = torch.nn.Parameter(torch.empty(9, device="meta"))
    model.lm_head.register_parameter("elsewhere", elsewhere)
    Engine(model)
    assert asked == [here]


def test_a_probe_that_is_not_a_number_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is neither more nor less than what went before it."""
    errors = iter([0.0, float("nan"), 0.0] * 2)
    monkeypatch.setattr("pipeline.probe._attention_error", lambda *_: next(errors))
    assert Engine(tiny_model("Llama")).mode == "padded"


def test_memory_that_is_too_small_for_the_probe_is_not_the_architectures_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scarce(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pipeline.probe.hidden_packed", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(tiny_model("Llama"))


@pytest.mark.parametrize("ignored", ["softcap", "sliding_window", "scaling"])
def test_probe_notices_attention_that_ignores_what_a_layer_asks(
    ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(*args: object, **kwargs: object) -> object:
        kwargs[ignored] = None
        return packed_attention(*args, **kwargs)  # type: ignore[arg-type]

    architecture, changes = FAMILIES["gemma2-soft-caps"]
    model = tiny_model(architecture, **{**changes, "query_pre_attn_scalar": 64})
    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, careless)
    assert Engine(model).mode == "padded"


def test_probe_notices_logits_that_are_not_a_plain_projection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projection, "logit_transform", lambda config: LogitTransform())
    architecture, changes = FAMILIES["gemma2-soft-caps"]
    assert Engine(tiny_model(architecture, **changes)).mode == "padded"


def test_attention_refuses_what_it_does_not_know() -> None:
    tensor = torch.zeros(1, 2, 3, 8)
    with pytest.raises(UnsupportedAttentionError, match="position_bias"):
        packed_attention(
            torch.nn.Linear(1, 1), tensor, tensor, tensor, None,
            cherry_pack=Pack((3,)), position_bias=tensor,
        )  # fmt: skip


def test_several_spans_of_one_sequence_are_summed_apart() -> None:
    model = tiny_model("Llama")
    ids = np.arange(30, dtype=np.int32)
    (both,) = Engine(model).score([TokenSequence(ids, ((5, 9), (12, 30)))])
    apart = Engine(model).score([TokenSequence(ids, ((5, 9),)), TokenSequence(ids, ((12, 30),))])
    assert both.nll_nats == pytest.approx([a.nll_nats[0] for a in apart], rel=1e-5)


def test_one_bad_sequence_is_an_error_and_the_others_are_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("Llama")
    good = sequences_of([20, 30, 10])
    bad = TokenSequence(np.array([1, 2, 3, 4], dtype=np.int32), ((1, 4),))
    engine = Engine(model)
    whole = engine._start

    def spoiled(laid: Laid, chosen: list[TokenSequence], hidden: bool) -> object:
        if any(sequence is bad for sequence in chosen):
            raise IndexError("index out of range")
        return whole(laid, chosen, hidden)

    monkeypatch.setattr(engine, "_start", spoiled)
    losses = engine.score([good[0], bad, *good[1:]])
    assert losses[1].error == "IndexError"
    assert losses[1].nll_nats == ()
    for sequence, loss in zip(good, [losses[0], *losses[2:]], strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


def test_out_of_memory_halves_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model("Llama"))
    sequences = sequences_of([20, 20, 20, 20, 20])
    expected = engine.score(sequences)
    sizes = []
    whole = engine._start

    def scarce(laid: Laid, chosen: list[TokenSequence], hidden: bool) -> object:
        sizes.append(len(chosen))
        if len(chosen) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(laid, chosen, hidden)

    monkeypatch.setattr(engine, "_start", scarce)
    losses = engine.score(sequences)
    assert sizes == [5, 2, 3, 1, 2]
    for one, other in zip(losses, expected, strict=True):
        assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-5)


@pytest.mark.parametrize("span", [(0, 3), (3, 3), (2, 9)])
def test_spans_that_have_no_loss_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="spans"):
        Engine(tiny_model("Llama")).score([TokenSequence(np.arange(5, dtype=np.int32), (span,))])


def test_a_model_spread_by_accelerate_gives_the_same() -> None:
    """What `gpus_per_actor: 2` does to a model, on the one device that is here."""
    model = tiny_model("Llama")
    sequences = sequences_of([20, 31, 7])
    expected = Engine(model).score(sequences)
    spread = tiny_model("Llama")
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    for module in (spread.model.embed_tokens, *spread.model.layers, spread.lm_head):
        add_hook_to_module(module, hook)
    engine = Engine(spread)
    assert engine.mode == "packed"
    assert engine.score(sequences) == expected


def test_no_sequences_and_sequences_without_spans() -> None:
    engine = Engine(tiny_model("Llama"))
    assert engine.score([]) == []
    (loss,) = engine.score([TokenSequence(np.arange(4, dtype=np.int32), ())])
    assert loss.nll_nats == ()
    assert loss.error is None


def test_the_engine_and_its_benchmark_know_no_ray() -> None:
    """They run where only torch, transformers and numpy are."""
    code = "import sys, engine; print({'ray', 'pydantic', 'pyarrow'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY / "tests/benchmarks", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "set()\n"


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_dtype_is_bfloat16_only_where_hardware_has_it(
    avx512: bool, amx: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert auto_dtype(torch.device("cpu")) == dtype
    assert auto_dtype(torch.device("cuda")) == torch.bfloat16


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE])
def test_every_family_on_a_gpu_agrees_with_float32_on_the_cpu(
    family: str, dtype: torch.dtype
) -> None:
    architecture, changes = {**FAMILIES, **UNPACKABLE}[family]
    model = tiny_model(architecture, **changes)
    sequences = sequences_of([40, 3, 25, 60, 2, 33, 13, 12])
    for sequence in sequences:  # what they begin with is shared
        sequence.input_ids[:12] = sequences[0].input_ids[:12][: len(sequence.input_ids)]
    expected = [oracle(model, sequence) for sequence in sequences]
    engine = Engine(model.to("cuda", dtype))
    assert engine.mode == ("packed" if family in FAMILIES else "padded")
    assert engine.compiled == (family in FAMILIES)
    tolerance = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    for loss, nll in zip(engine.score(sequences), expected, strict=True):
        assert loss.error is None
        assert loss.nll_nats == pytest.approx(nll, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE])
def test_every_family_in_bfloat16_agrees_with_float32(family: str) -> None:
    architecture, changes = {**FAMILIES, **UNPACKABLE}[family]
    model = tiny_model(architecture, **changes)
    sequences = sequences_of([40, 3, 25, 60, 33])
    expected = [oracle(model, sequence) for sequence in sequences]
    engine = Engine(model.bfloat16())
    assert engine.mode == ("packed" if family in FAMILIES else "padded")
    for loss, nll in zip(engine.score(sequences), expected, strict=True):
        assert loss.nll_nats == pytest.approx(nll, rel=0.05)


def test_what_layers_give_is_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=8)
    with torch.no_grad():
        for layer in model.model.layers:  # each adds a little, as in a model that is trained
            for parameter in layer.parameters():
                parameter.mul_(0.3 if parameter.dim() > 1 else 1)
    model = model.bfloat16()
    sequences = sequences_of([60] * 20)
    exact = copy.deepcopy(model).float()
    expected = np.array([oracle(exact, sequence) for sequence in sequences])

    def error() -> float:
        losses = Engine(copy.deepcopy(model)).score(sequences)
        found = np.array([loss.nll_nats for loss in losses])
        return float(np.sqrt(np.mean((found - expected) ** 2)))

    with_float32 = error()
    monkeypatch.setattr("pipeline.engine.keep_float32_between_layers", lambda _: None)
    assert with_float32 < 0.7 * error()


def test_a_model_that_takes_one_dtype_only_is_left_as_it_is() -> None:
    def strict(_: object, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].dtype != torch.bfloat16:
            raise RuntimeError("expected mat1 and mat2 to have the same dtype")

    model = tiny_model("Llama").bfloat16()
    model.model.layers[0].register_forward_pre_hook(strict)
    sequences = sequences_of([9, 20])
    engine = Engine(model)
    assert model not in forward._float32_between_layers
    assert engine.mode == "packed"
    assert all(loss.error is None for loss in engine.score(sequences))


def test_a_pass_does_not_ask_the_device_where_sequences_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU every pass would wait for the one before."""
    engine = Engine(tiny_model("Llama"))

    def asked(_: torch.Tensor) -> None:
        raise AssertionError

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", asked)
    assert all(loss.error is None for loss in engine.score(sequences_of([9, 30, 4])))


def test_losses_that_do_not_follow_from_the_logits_are_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel of a GPU makes losses without logits."""
    right = projection.Projection.nll
    monkeypatch.setattr(projection.Projection, "nll", lambda *args: right(*args) * 1.001)
    assert "do not follow from its logits" in str(find_fault(tiny_model("Llama")))


@pytest.mark.parametrize("hidden", [False, True])
def test_parts_that_are_planned_apart_give_the_same(
    hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_model("Llama"), max_batch_tokens=50)
    sequences = sequences_of([9, 40, 3, 25, 60, 2, 33, 13, 12, 9, 9, 21])
    whole = engine.score(sequences, hidden=hidden)
    monkeypatch.setattr("pipeline.engine._PART_TOKENS", 40)
    for one, other in zip(engine.score(sequences, hidden=hidden), whole, strict=True):
        assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-6)
        if hidden:
            np.testing.assert_allclose(one.mean_hidden_M, other.mean_hidden_M, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at", [0, 4, 8])
def test_a_token_that_the_model_lacks_spoils_its_own_sequence_only(at: int) -> None:
    engine = Engine(tiny_model("Llama"))
    good, bad = sequences_of([9, 9])
    bad.input_ids[at] = 640
    alone, both = engine.score([good]), engine.score([bad, good, bad])
    assert [loss.error for loss in both] == ["UnknownToken", None, "UnknownToken"]
    assert both[1] == alone[0]
    assert [loss.error for loss in engine.score([good, bad])] == [None, "UnknownToken"]


def test_a_broken_device_is_no_fault_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model("Llama"))

    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered", 710)

    monkeypatch.setattr(engine, "_start", broken)
    with pytest.raises(torch.AcceleratorError):
        engine.score(sequences_of([9, 9]))


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_mean_hidden_states_equal_plain_transformers(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    model = tiny_model("Llama")
    if mode == "padded":
        monkeypatch.setattr("pipeline.probe.find_fault", lambda *_, **__: "of a test")
    sequences = sequences_of([9, 30, 2, 17])
    losses = Engine(model, 32).score(sequences, hidden=True)
    model.set_attn_implementation("eager")
    for sequence, loss in zip(sequences, losses, strict=True):
        ids = torch.from_numpy(sequence.input_ids).long()[None]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(loss.mean_hidden_M, states[0].mean(0), atol=1e-5)
