"""Compiled layers, and losses that need no logits: as on a GPU, on one or without one.

Without a GPU, layers are traced and guarded as there and run by what a test names, and the kernel
runs in Triton's interpreter.
"""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_engine import FAMILIES, UNPACKABLE, oracle, sequences_of

from pipeline import forward, projection
from pipeline.compiled import repeated_layers, what_runs_compiled
from pipeline.engine import Engine
from pipeline.packing import Pack


def compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    """Layers are traced and guarded as on a GPU, and `backend` runs what comes out of it."""

    def compile_layers(model: torch.nn.Module, compiled: object) -> bool:
        if not compiled:
            return False
        for layer in repeated_layers(model):
            layer.compile(dynamic=True, backend=backend)
        return True

    torch.compiler.reset()
    monkeypatch.setattr("pipeline.probe.compile_layers", compile_layers)


@pytest.mark.parametrize(
    ("family", "kinds"), [("llama", 1), ("gpt2-learned-positions", 1), ("gemma2-soft-caps", 2)]
)
def test_a_layer_is_compiled_once_for_all_packs_and_as_a_whole(
    family: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    compile_without_a_compiler(monkeypatch, counted)
    architecture, changes = FAMILIES[family]
    model = tiny_model(architecture, **changes)  # not compiled, of the same weights
    engine = Engine(tiny_model(architecture, **changes), max_batch_tokens=120)
    assert (engine.mode, engine.compiled) == ("packed", True)
    before = len(compiled)
    for seed in range(1, 12):  # more packs than PyTorch would compile a layer for
        lengths = np.random.default_rng(seed).integers(2, 60, 2 * seed).tolist()
        sequences = sequences_of(lengths, seed)
        losses = engine.score(sequences)
        for sequence, loss in zip(sequences[:3], losses, strict=False):
            assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)
    assert len(compiled) == before == kinds  # in parts, each would cost a GPU's host its time


@pytest.mark.parametrize("family", UNPACKABLE)
def test_compiled_layers_refuse_what_packed_attention_does_not_do(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_without_a_compiler(monkeypatch, "eager")
    architecture, changes = UNPACKABLE[family]
    model = tiny_model(architecture, **changes)
    sequences = sequences_of([40, 3, 25])
    expected = [oracle(model, sequence) for sequence in sequences]
    engine = Engine(model)
    assert (engine.mode, engine.compiled) == ("padded", False)
    for loss, nll in zip(engine.score(sequences), expected, strict=True):
        assert loss.nll_nats == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_attention_gives_a_compiled_layer_what_it_promises(sinks: bool) -> None:
    pack = Pack((4, 3, 2), (-1, 0, -1))
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)  # float32 under autocast
    value = torch.randn(1, 2, 9, 6).bfloat16()
    asked = 0.3, None, None, torch.randn(4) if sinks else None, False
    with torch.inference_mode():
        torch.library.opcheck(
            torch.ops.cherry.attend,
            (query, key, value, pack.handle, *asked),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_layers_that_cannot_be_compiled_run_as_they_are_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    compile_without_a_compiler(monkeypatch, broken)
    model = tiny_model("Llama")
    sequences = sequences_of([40, 3, 25])
    engine = Engine(model)
    assert (engine.mode, engine.compiled) == ("packed", False)
    assert "prefixes" in engine.share
    assert "nothing runs compiled" in caplog.text
    for sequence, loss in zip(sequences, engine.score(sequences), strict=True):
        assert loss.nll_nats == pytest.approx(oracle(model, sequence), rel=1e-5)


def test_what_compiled_layers_are_compared_with_is_never_compiled() -> None:
    def asked(*_: object) -> None:
        raise AssertionError

    model = tiny_model("Llama")
    for layer in repeated_layers(model):
        layer.compile(backend=asked)
    forward.run_alone(model, model, np.arange(5, dtype=np.int32))


def test_parts_say_what_ran_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama")
    monkeypatch.setattr("pipeline.cpu_kernels.can_run", lambda: False)
    assert what_runs_compiled(model, True) == "nothing"
    monkeypatch.setattr("pipeline.cpu_kernels.can_run", lambda: True)
    assert what_runs_compiled(model, True) == "kernels"
    assert what_runs_compiled(model, False) == "nothing"
    repeated_layers(model)[0].compile(backend="eager")
    assert what_runs_compiled(model, False) == "layers"


def test_a_compiler_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: torch.fx.GraphModule, _: object) -> object:
        return lambda *inputs: tuple(
            1.5 * x if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in graph.forward(*inputs)
        )

    compile_without_a_compiler(monkeypatch, wrong)
    assert not Engine(tiny_model("Llama")).compiled


@pytest.mark.parametrize("family", ["llama-tied", "gpt2-learned-positions", "gemma2-soft-caps"])
def test_losses_without_logits_agree_with_float32(
    family: str, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import projection_kernel

    calls = []
    right = projection_kernel.cross_entropy

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(projection_kernel, "cross_entropy", counted)
    if kernel_device.type == "cpu":
        compile_without_a_compiler(monkeypatch, "eager")
        monkeypatch.setattr(
            projection.Projection, "_kernel", lambda _: projection_kernel.cross_entropy
        )
    architecture, changes = FAMILIES[family]
    model = tiny_model(architecture, **changes)
    sequences = sequences_of([40, 3, 25, 60, 2])
    expected = [oracle(model, sequence) for sequence in sequences]
    engine = Engine(model.to(kernel_device, torch.float16))
    assert (engine.mode, engine.compiled) == ("packed", True)
    calls.clear()
    for loss, nll in zip(engine.score(sequences), expected, strict=True):
        assert loss.nll_nats == pytest.approx(nll, rel=0.01)
    assert calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gpt2-learned-positions"])
def test_shared_prefixes_and_compiled_layers_change_nothing_on_a_gpu(family: str) -> None:
    architecture, changes = FAMILIES[family]
    model = tiny_model(architecture, **changes).to("cuda")
    sequences = sequences_of([40, 30, 25, 60, 33, 130])
    for sequence in sequences:
        sequence.input_ids[:20] = sequences[0].input_ids[:20]
    plain = Engine(model, share=(), compiled=False).score(sequences)
    engine = Engine(model)
    assert engine.compiled
    assert "prefixes" in engine.share
    for one, other in zip(engine.score(sequences), plain, strict=True):
        assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-5)
