"""Losses and attention in C, against float64 written out; and what runs where they cannot."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from test_engine import FAMILIES, oracle, sequences_of
from test_projection import ANY_KERNEL, SIZES, kernel_and_float64
from torch import Tensor

from pipeline import attention, cpu_kernels
from pipeline.compiled import _why_not, compile_layers, repeated_layers
from pipeline.engine import Engine
from pipeline.grouped_attention import Asked
from pipeline.packing import Pack
from pipeline.projection import LogitTransform, Projection

pytestmark = pytest.mark.skipif(
    not cpu_kernels.can_run(), reason="needs a CPU with AVX-512 and a C compiler"
)
HALF = pytest.param(
    torch.bfloat16,
    id="bfloat16",
    marks=pytest.mark.skipif(
        not torch.cpu._is_avx512_bf16_supported(), reason="needs bfloat16 in hardware"
    ),
)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    SIZES,
    [
        *ANY_KERNEL,
        pytest.param(1, 2, 1, False, LogitTransform(), id="one-entry"),
        pytest.param(700, 32, 5, False, LogitTransform(), id="more-panels-than-an-item"),
        pytest.param(130, 576, 49153, False, LogitTransform(), id="large-vocabulary"),
    ],
)
def test_losses_equal_float64(
    dtype: torch.dtype,
    states: int,
    depth: int,
    vocabulary: int,
    biased: bool,
    transform: LogitTransform,
) -> None:
    losses, expected = kernel_and_float64(
        cpu_kernels.cross_entropy,
        dtype,
        torch.device("cpu"),
        *(states, depth, vocabulary, biased, transform),
    )
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)


def test_the_loss_of_what_is_all_but_certain_keeps_its_digits() -> None:
    torch.manual_seed(0)
    weight, targets = torch.randn(600, 32), torch.arange(600)
    hidden = 17 * weight / weight.square().sum(1, keepdim=True)
    logits = hidden.double() @ weight.double().T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert 1e-5 < float(expected.median()) < 1e-2
    found = cpu_kernels.cross_entropy(hidden, weight, None, targets, 1.0, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("at", [0, 70])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_state_that_is_no_number_has_no_loss_and_spoils_no_other(at: int, value: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(150, 16), torch.randn(300, 16)
    targets = torch.randint(300, (150,))
    whole = cpu_kernels.cross_entropy(hidden, weight, None, targets, 1.0, None)
    hidden[at] = value
    found = cpu_kernels.cross_entropy(hidden, weight, None, targets, 1.0, None)
    assert not torch.isfinite(found[at])
    others = torch.arange(150) != at
    assert torch.equal(found[others], whole[others])


def test_entries_that_cannot_be_count_for_nothing_and_surprise_infinitely() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 16), torch.randn(100, 16), torch.zeros(100)
    bias[40:] = -torch.inf  # entries that fill a vocabulary up, more than are looked at together
    targets = torch.tensor([3, 99, 39])
    found = cpu_kernels.cross_entropy(hidden, weight, bias, targets, 1.0, None)
    expected = cpu_kernels.cross_entropy(
        hidden, weight[:40].contiguous(), None, targets.clamp(max=39), 1.0, None
    )
    assert found[1] == torch.inf
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=1e-6)
    certain = torch.zeros(1, 16)
    bias[:] = -torch.inf
    bias[0] = torch.inf  # as an overflow leaves it
    assert cpu_kernels.cross_entropy(certain, weight, bias, targets[:1] * 0, 1.0, None).isnan()


# H=heads, K=key/value heads, T=tokens of the pack, D=head dimension
def written_out(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, pack: Pack, asked: Asked
) -> Tensor:
    """A query at a time, in float64; shape (T, H, D)."""
    num_heads, num_tokens, _ = query_HTD.shape
    output_THD = torch.zeros(num_tokens, num_heads, value_KTD.shape[2], dtype=torch.float64)
    for begin, length, parent in pack.stretches:
        before = pack.stretches[parent][:2] if parent >= 0 else (0, 0)
        for token in range(begin, begin + length):
            keys = [*range(before[0], sum(before)), *range(begin, token + 1)]
            keys = keys[-(asked.sliding_window or len(keys)) :]
            for head in range(num_heads):
                shared = head * len(key_KTD) // num_heads
                scores = key_KTD[shared, keys].double() @ query_HTD[head, token].double()
                scores = scores * asked.scale
                if asked.softcap is not None:
                    scores = asked.softcap * torch.tanh(scores / asked.softcap)
                if asked.sinks_H is not None:
                    scores = torch.cat([scores, asked.sinks_H[head, None].double()])
                weights = torch.softmax(scores, 0)[: len(keys)]
                output_THD[token, head] = weights @ value_KTD[shared, keys].double()
    return output_THD


SHORT = Pack((9, 40, 1, 7, 30), (-1, 0, 0, -1, 3))
LONG = Pack((70, 530, 3), (-1, 0, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
@pytest.mark.parametrize(
    ("pack", "heads", "shared", "depth", "value_depth", "asked"),
    [
        pytest.param(SHORT, 4, 4, 64, 64, Asked(0.125, None, None, None), id="plain"),
        pytest.param(SHORT, 9, 3, 64, 64, Asked(0.3, None, None, None), id="shared-keys"),
        pytest.param(SHORT, 7, 1, 8, 8, Asked(0.3, None, None, None), id="one-head-of-keys"),
        pytest.param(SHORT, 4, 2, 80, 96, Asked(0.1, None, None, None), id="odd-dimensions"),
        pytest.param(SHORT, 4, 2, 100, 7, Asked(0.1, None, None, None), id="odder-dimensions"),
        pytest.param(SHORT, 4, 2, 192, 128, Asked(0.1, None, None, None), id="wide"),
        pytest.param(SHORT, 4, 2, 16, 16, Asked(0.3, 12, None, None), id="window"),
        pytest.param(SHORT, 4, 2, 16, 16, Asked(0.3, 1, None, None), id="window-of-one"),
        pytest.param(SHORT, 4, 2, 16, 16, Asked(0.9, None, 2.0, None), id="soft-cap"),
        pytest.param(SHORT, 4, 2, 16, 16, Asked(0.9, 12, 50.0, torch.randn(4)), id="sinks"),
        pytest.param(LONG, 2, 1, 16, 16, Asked(0.3, None, None, None), id="several-pieces"),
        pytest.param(LONG, 2, 1, 16, 16, Asked(0.3, 90, None, None), id="window-over-pieces"),
        pytest.param(Pack((1,)), 2, 1, 16, 16, Asked(0.3, None, None, None), id="one-token"),
        pytest.param(Pack((1, 31)), 2, 1, 16, 16, Asked(0.3, None, None, None), id="whole-lines"),
    ],
)
def test_attention_equals_float64(
    dtype: torch.dtype,
    pack: Pack,
    heads: int,
    shared: int,
    depth: int,
    value_depth: int,
    asked: Asked,
) -> None:
    torch.manual_seed(0)
    num_tokens = sum(pack.lengths)
    query, key, value = (
        torch.randn(num_tokens, count, width).transpose(0, 1)
        for count, width in ((heads, depth), (shared, depth), (shared, value_depth))
    )
    value = value.to(dtype)
    found = cpu_kernels.attention(query, key, value, pack, asked)
    assert (found.dtype, found.shape) == (dtype, (num_tokens, heads, value_depth))
    expected = written_out(query, key, value, pack, asked)
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=5e-6)


def test_tensors_may_lie_in_any_order() -> None:
    torch.manual_seed(0)
    asked = Asked(0.25, None, None, None)
    tensors = [torch.randn(heads, sum(SHORT.lengths), 16) for heads in (4, 2, 2)]
    expected = cpu_kernels.attention(*tensors, SHORT, asked)
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        turned = [each.permute(order).contiguous().permute(order) for each in tensors]
        assert torch.equal(cpu_kernels.attention(*turned, SHORT, asked), expected)


@pytest.mark.parametrize("spoiled", range(len(SHORT.lengths)))
def test_what_is_no_number_reaches_no_stretch_that_does_not_continue_it(spoiled: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, sum(SHORT.lengths), 16) for heads in (4, 2, 2))
    asked = Asked(0.25, None, None, None)
    whole = cpu_kernels.attention(query, key, value, SHORT, asked)
    begin, length, _ = SHORT.stretches[spoiled]
    for each in (query, key, value):
        each[:, begin : begin + length] = torch.nan
    found = cpu_kernels.attention(query, key, value, SHORT, asked)
    for at, (start, count, parent) in enumerate(SHORT.stretches):
        part = slice(start, start + count)
        if spoiled in (at, parent):
            assert found[part].isnan().all()
        else:
            assert torch.equal(found[part], whole[part])


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_nothing_is_read_or_written_past_its_end() -> None:
    """The numbers above once more, with every access of the kernels checked."""
    asked = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    sanitizer = asked.stdout.strip()
    if not Path(sanitizer).is_absolute():
        pytest.skip("needs gcc's AddressSanitizer")
    checked = {
        "CC": "gcc -fsanitize=address",
        "LD_PRELOAD": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    tests = "float64 or any_order or no_number or certain or cannot_be"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-qs", "-k", tests, "-p", "no:faulthandler"],
        env=os.environ | checked, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout  # and not all left out, as without kernels


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, sum(LONG.lengths), 16) for heads in (4, 2, 2))
    hidden, weight = torch.randn(1000, 64), torch.randn(5000, 64)
    targets = torch.randint(5000, (1000,))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outputs = cpu_kernels.attention(query, key, value, LONG, Asked(0.25, None, None, None))
        losses = cpu_kernels.cross_entropy(hidden, weight, None, targets, 1.0, None)
        found.append((outputs, losses))
    for outputs, losses in found[1:]:
        assert torch.equal(outputs, found[0][0])
        assert torch.equal(losses, found[0][1])


def count_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []
    right = getattr(cpu_kernels, name)

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(cpu_kernels, name, counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("compiled", ["auto", False])
def test_the_engine_has_kernels_unless_it_is_told_otherwise(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    attentions = count_calls("attention", monkeypatch)
    losses = count_calls("cross_entropy", monkeypatch)
    model = tiny_model("Llama")
    sequences = sequences_of([40, 3, 25])
    expected = [oracle(model, sequence) for sequence in sequences]
    engine = Engine(model.to(dtype), compiled=compiled)
    assert engine.compiled == bool(compiled)
    attentions.clear()
    losses.clear()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for loss, nll in zip(engine.score(sequences), expected, strict=True):
        assert loss.nll_nats == pytest.approx(nll, rel=rounding)
    assert (len(attentions), len(losses)) == ((2, 1) if compiled else (0, 0))  # of two layers


def test_attention_that_is_learned_from_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls("attention", monkeypatch)
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    layer, pack = torch.nn.Linear(1, 1), Pack((3, 2))
    output, _ = attention.packed_attention(
        layer, query, key, value, None, cherry_pack=pack, cherry_kernels=True
    )
    output.sum().backward()
    assert value.grad is not None
    assert not calls


@pytest.mark.parametrize("name", ["attention", "cross_entropy"])
def test_a_kernel_that_is_wrong_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = getattr(cpu_kernels, name)
    monkeypatch.setattr(cpu_kernels, name, lambda *arguments: 1.01 * right(*arguments))
    model = tiny_model("Llama")
    sequences = sequences_of([40, 3])
    engine = Engine(model)
    assert (engine.mode, engine.compiled) == ("packed", False)
    assert "nothing runs compiled" in caplog.text
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


def test_layers_that_are_wrong_leave_the_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(graph: torch.fx.GraphModule, _: object) -> object:
        return lambda *inputs: tuple(
            1.5 * x if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in graph.forward(*inputs)
        )

    def compile_layers(model: torch.nn.Module, compiled: object) -> bool:
        if compiled is True:
            for layer in repeated_layers(model):
                layer.compile(backend=wrong)
        return bool(compiled)

    torch.compiler.reset()
    monkeypatch.setattr("pipeline.probe.compile_layers", compile_layers)
    model = tiny_model("Llama")
    sequences = sequences_of([40, 3])
    engine = Engine(model, compiled=True)
    assert (engine.mode, engine.compiled) == ("packed", True)
    assert "its layers run uncompiled" in caplog.text
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


@pytest.mark.parametrize(
    ("heads", "shared", "sinks", "said"),
    [(5, 2, None, "heads 5 and 2"), (2, 4, None, "heads 2 and 4"), (4, 2, 1, "1 sinks of 4")],
)
def test_attention_that_does_not_fit_together_is_refused(
    heads: int, shared: int, sinks: int | None, said: str
) -> None:
    query, key, value = (torch.randn(count, 9, 8) for count in (heads, shared, shared))
    asked = Asked(1.0, None, None, None if sinks is None else torch.randn(sinks))
    with pytest.raises(ValueError, match=said):
        cpu_kernels.attention(query, key, value, Pack((9,)), asked)


@pytest.mark.parametrize("broken", ["no compiler", "it fails", "no OpenMP"])
def test_without_kernels_scores_are_the_same(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("Llama")
    sequences = sequences_of([40, 3])
    expected = Engine(model).score(sequences)
    monkeypatch.delenv("CC", raising=False)
    if broken == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    elif broken == "it fails":
        monkeypatch.setenv("CC", "false")
    else:
        monkeypatch.setattr(cpu_kernels, "_openmp", object)
    cpu_kernels._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            engine = Engine(model)
        assert not engine.compiled
        assert caplog.text.count("kernels for this CPU cannot be compiled") == 1  # and cached
        for one, other in zip(engine.score(sequences), expected, strict=True):
            assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-5)
    finally:
        cpu_kernels._library.cache_clear()


def test_weights_that_the_kernel_does_not_take_go_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("Llama", hidden_size=32)
    assert Projection(model, compiled=True)._kernel() is cpu_kernels.cross_entropy
    assert Projection(model, compiled=False)._kernel() is None
    assert Projection(model.half(), compiled=True)._kernel() is None
    assert not cpu_kernels.takes_losses(torch.zeros(5, 3, dtype=torch.bfloat16))  # no whole words
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)  # oneDNN is faster
    assert not cpu_kernels.takes_losses(torch.zeros(5, 4, dtype=torch.bfloat16))
    assert cpu_kernels.takes_losses(torch.zeros(5, 4))
    model = tiny_model("Llama")
    model.lm_head.weight.data = model.lm_head.weight.data.T.contiguous().T
    assert Projection(model, compiled=True)._kernel() is None


def test_a_model_over_several_devices_is_left_as_it_is() -> None:
    devices = (torch.device("cpu"), torch.device("cpu:0"))
    parameters = [SimpleNamespace(device=device) for device in devices]
    spread = SimpleNamespace(parameters=lambda: parameters)
    assert not compile_layers(spread, "auto")
    assert compile_layers(SimpleNamespace(parameters=lambda: parameters[:1]), "auto")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # PyTorch's compiler has deprecated things of its own
@pytest.mark.parametrize("family", ["llama", "gemma2-soft-caps"])
def test_layers_of_a_cpu_are_compiled_where_it_is_asked_for(family: str) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    _why_not.cache_clear()
    architecture, changes = FAMILIES[family]
    model = tiny_model(architecture, **changes)
    sequences = sequences_of([40, 3, 25, 60, 2])
    expected = [oracle(model, sequence) for sequence in sequences]
    engine = Engine(model, compiled=True)
    assert (engine.mode, engine.compiled) == ("packed", True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for loss, nll in zip(engine.score(sequences), expected, strict=True):
        assert loss.nll_nats == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("compiled", [True, "auto"])
def test_without_a_cpp_compiler_layers_run_as_they_are_written(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.compiled._why_not", lambda _: "there is none")
    engine = Engine(tiny_model("Llama"), compiled=compiled)
    assert engine.compiled  # its kernels are
    assert ("there is none; layers run uncompiled" in caplog.text) == (compiled is True)
