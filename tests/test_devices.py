"""What a process that scores on CPUs gets: the library that multiplies, memory and its pages."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model

from pipeline import devices, models, scoring
from pipeline.cluster import Workers
from pipeline.devices import fast_float32, products_by_onednn
from pipeline.scoring import UnitScorer
from pipeline.settings import Scoring

CPU = torch.device("cpu")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def said_by(code: str, **variables: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("rows", [16, 300, 4096])
@pytest.mark.parametrize(("inner", "columns"), [(64, 64), (576, 192), (1536, 576), (4096, 96)])
def test_the_faster_product_of_float32_rounds_nothing(rows: int, inner: int, columns: int) -> None:
    one, other = torch.randn(rows, inner), torch.randn(columns, inner)
    exact = one.double() @ other.double().T
    with fast_float32(CPU):
        found = one @ other.T
    # Rounded to bfloat16 beforehand, the products would be off by some thousandths.
    assert (found - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("keys", [30, 300])
def test_the_faster_product_of_batches_rounds_nothing(keys: int) -> None:
    band, one, other = torch.randn(1, keys), torch.randn(3, 300, 64), torch.randn(3, keys, 64)
    exact = torch.baddbmm(band.double(), one.double(), other.double().transpose(1, 2), alpha=0.125)
    with fast_float32(CPU):
        found = torch.baddbmm(band, one, other.transpose(1, 2), alpha=0.125)
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_amd_with_avx512_multiplies_float32_by_onednn() -> None:
    cpu = torch.cpu.get_capabilities()
    if "AMD" not in cpu.get("cpu_name", "") or not cpu.get("avx512_f"):
        pytest.skip("MKL is not slow here")
    code = (
        "import torch; from pipeline.devices import fast_float32\n"
        "one = torch.randn(512, 512)\n"
        "one @ one; print('then', flush=True)\n"
        "with fast_float32(torch.device('cpu')): one @ one\n"
    )
    said = said_by(code, ONEDNN_VERBOSE="1")
    before, _, after = said.partition("then")
    assert not re.search("exec.*matmul.*512x512:512x512", before)
    assert re.search("exec.*matmul.*512x512:512x512", after)


@pytest.mark.parametrize("rounds", [False, True])
def test_a_library_that_rounds_is_not_taken(monkeypatch: pytest.MonkeyPatch, rounds: bool) -> None:
    amd = {"cpu_name": "AMD EPYC", "avx512_f": True}
    dtype = torch.bfloat16 if rounds else torch.float64
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: amd)
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda one, other: torch.mm(one.to(dtype), other.to(dtype)).float(),
    )
    devices._mkl_is_slow.cache_clear()
    try:
        assert devices._mkl_is_slow() is not rounds
    finally:
        devices._mkl_is_slow.cache_clear()


@pytest.mark.parametrize(
    ("num_gpus", "share", "devices_of_model"), [(0.25, 0.25, 1), (1, 1, 1), (2, 1, 2), (0, 1, 1)]
)
def test_an_actor_sizes_its_packs_for_its_share_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, num_gpus: float, share: float, devices_of_model: int
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(models, "load", lambda *_, **given: asked.update(given))
    monkeypatch.setattr(scoring, "keep_few_kernels", lambda _: None)
    monkeypatch.setattr(scoring, "Engine", lambda *_, **given: asked.update(given))
    monkeypatch.setattr(scoring, "renderer", lambda _: SimpleNamespace(prefix_ids=()))
    settings: Any = SimpleNamespace(
        model="m",
        dtype="bfloat16",
        max_batch_tokens="auto",
        max_length=512,
        share=(),
        compiled=True,
    )
    workers = Workers(1, num_gpus, 0, 1)
    UnitScorer(Scoring(settings, "nowhere", workers, timeout_s=60)).load()
    assert asked == {"device_share": share, "num_devices": devices_of_model}


def test_the_choice_of_library_ends_with_its_block() -> None:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    with pytest.raises(ZeroDivisionError), products_by_onednn():
        raise ZeroDivisionError
    assert settings.fp32_precision == before


def test_activations_lie_in_huge_pages() -> None:
    if not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("the system gives no huge pages")
    code = (
        "import torch; from pipeline.devices import keep_freed_memory\n"
        "keep_freed_memory(); kept = torch.ones(50_000_000)\n"
        "print(open('/proc/self/smaps_rollup').read())\n"
    )
    said = said_by(code)
    found = re.search(r"AnonHugePages:\s+(\d+) kB", said)
    assert found
    assert int(found[1]) > 100_000


def test_kernels_are_kept_for_so_many_shapes_and_no_more() -> None:
    """PyTorch and oneDNN keep those of 1,024 shapes each: 600 more took 390 MB."""
    code = """
import ctypes, torch, torch.nn.functional as F
from pipeline.devices import keep_few_kernels
keep_few_kernels(torch.nn.Linear(1, 1))
weight, x = (torch.ones(n, 576, dtype=torch.bfloat16) for n in (1536, 1024))
def held():
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096
with torch.inference_mode():
    for length in range(300):
        F.linear(x[: 1 + length], weight)
    before = held()
    for length in range(300, 900):
        F.linear(x[: 1 + length], weight)
print(held() - before)
"""
    assert int(said_by(code)) < 50e6


def test_experts_get_room_for_their_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, experts = tiny_model("Llama"), tiny_model("Mixtral")
    variables: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", variables)
    devices.keep_few_kernels(experts)
    assert not variables
    devices.keep_few_kernels(dense)
    assert variables == {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_lengths_seen(dtype: str) -> None:
    """oneDNN makes kernels for each shape: half a megabyte for each length, product and layer."""
    code = f"""
import numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from pipeline.devices import keep_freed_memory
from pipeline.engine import Engine, TokenSequence
keep_freed_memory()
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2,
)
engine = Engine(AutoModelForCausalLM.from_config(config).to(torch.{dtype}), 2048)
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def score(*lengths):
    ids = [np.arange(n, dtype=np.int32) % 300 for n in lengths]
    engine.score([TokenSequence(each, ((n // 2, n),)) for each, n in zip(ids, lengths)])
def score_behind(past, own):
    before = np.arange(past, dtype=np.int32) % 300
    ids = [np.append(before, (np.arange(own) + k) % 300).astype(np.int32) for k in (100, 101)]
    engine.score([TokenSequence(each, ((past + 1, past + own),)) for each in ids])
for length in range(64, 1025, 64):
    score(length)
    score_behind(length, 200)
before = rss()
for length in range(20, 1000, 3):
    score(length)
    score(length, 17)
    score_behind(length, 200)
print(rss() - before)
"""
    said = said_by(code)
    assert int(said) < 150e6
