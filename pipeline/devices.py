"""What each kind of device gets: its dtype, its products, its pack size, its way with memory.

Measured once and kept here; nothing is timed at run time, so that scores can be reproduced.
"""

import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

# malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes.
_MALLOC_OPTIONS = {-1: 2**31 - 1, -2: 2**26, -3: 2**30}

_CPU_MULTIPLE = 64
"""Tokens come to a CPU's products in multiples of so many: oneDNN makes kernels for each number of
them."""


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it in hardware, float32 otherwise."""
    if device.type == "cuda":
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def fast_float32(device: torch.device) -> AbstractContextManager[None]:
    """Products of float32 by the faster of PyTorch's two libraries for CPUs, MKL and oneDNN.

    On AMD's CPUs with AVX-512 oneDNN multiplies twice as fast.
    """
    return products_by_onednn() if device.type == "cpu" and _mkl_is_slow() else nullcontext()


def products_by_onednn() -> AbstractContextManager[None]:
    """Products of float32 on CPUs by oneDNN, which may round what goes in to bfloat16.

    PyTorch gives it those that may be rounded, and no others. It does round where a CPU has matrix
    instructions (AMX), and what is float32 in bfloat16's precision already is exact either way.
    """
    return _float32_products("bf16")


def products_by_mkl() -> AbstractContextManager[None]:
    """Products of float32 on CPUs by MKL, which makes no kernels for shapes."""
    return _float32_products("ieee")


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before


@functools.cache
def _mkl_is_slow() -> bool:
    """An AMD CPU with AVX-512, on which oneDNN is seen not to round."""
    cpu = torch.cpu.get_capabilities()
    if "AMD" not in cpu.get("cpu_name", "") or not cpu.get("avx512_f") or cpu.get("amx_tile"):
        return False
    exact = torch.full((256, 256), 1 + 2**-12)  # bfloat16 has 1 and 1 + 2**-7
    with products_by_onednn():
        return torch.equal(exact @ torch.eye(256), exact)


def tokens_to_fill_up(num_tokens: int, device: torch.device) -> int:
    """How many to add for products of few shapes; none on a GPU."""
    return -num_tokens % _CPU_MULTIPLE if device.type == "cpu" else 0


def keep_freed_memory() -> None:
    """Let a pack's memory be kept for the next pack, in huge pages.

    glibc otherwise hands it to the system: activations of some megabytes are mapped, zeroed by page
    faults and unmapped again in every layer. SmolLM2-135M in bfloat16 on two cores scored 787
    tokens/s without and 964 with.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first tensor
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; musl and macOS have their own ways
        for option, value in _MALLOC_OPTIONS.items():
            libc.mallopt(option, value)


def keep_few_kernels(model: Any) -> None:
    """Have PyTorch and oneDNN keep kernels of 128 shapes of products each, and not of 1,024.

    A pass has some dozens of shapes. With experts it may have hundreds, one for each number of
    tokens that an expert gets, and each layer would make anew what is not kept.

    Call it before the first product: then the variables are read.
    """
    if has_experts(model):
        return
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def has_experts(model: Any) -> bool:
    """Whether a model is a mixture of experts."""
    return any("expert" in name for name, _ in model.named_parameters())


def auto_batch_tokens(
    device: torch.device,
    dtype: torch.dtype,
    config: Any,
    weights_bytes: int,
    device_share: float = 1.0,
) -> int:
    """Tokens of a pack, from the kind of device and the model's shape, never from timing.

    CPU: 4,096. CUDA: 2,048 to 65,536, as many as fit a third of the memory that `device_share` of
    it is, and half of what the weights leave of that.
    """
    if device.type != "cuda":
        return 4096
    hidden = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, Sequence) else int(inner)  # Gemma 3n: one a layer
    # Residual, norms, query, key, value and output, and both halves of a gated MLP; logits are
    # bounded apart (projection.py).
    bytes_per_token = dtype.itemsize * (8 * hidden + 3 * inner)
    memory = device_share * torch.cuda.get_device_properties(device).total_memory
    for_packs = min(memory / 3, (memory - weights_bytes) / 2)
    return int(min(65536, max(2048, for_packs / bytes_per_token) // 1024 * 1024))


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy to a device; to a GPU without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def from_device(tensor: Tensor) -> Tensor:
    """Copy to the CPU; from a GPU without waiting for it: wait for `mark` before reading."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event after all that a GPU was asked for so far; None for a CPU, which never waits."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
