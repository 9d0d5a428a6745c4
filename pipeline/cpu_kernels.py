"""Losses and attention of CPUs with AVX-512: kernels in C, compiled when a process first asks.

That takes a C compiler. Without one PyTorch does the same, slower. Both kernels are matrix products
whose results are used up where they are made, and both sum up in float32::

    cpu_tile.h          what multiplies
    cpu_losses.c        hidden states and the vocabulary in, losses out, no logits
    cpu_attention.c     queries, keys and values in, outputs out, no scores
"""

import ctypes
import functools
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.grouped_attention import Asked
from pipeline.packing import Pack

log = logging.getLogger("cherry")

_SOURCES = [str(Path(__file__).with_name(name)) for name in ("cpu_losses.c", "cpu_attention.c")]
_LANES = 64
"""Values that a tile has side by side."""

_WIDTH = 16
"""Values of a vector. Fewer than so many are read past the end."""

_SLICES = 4
"""Of the vocabulary, for different threads: tokens alone would not keep many of them busy."""

_PIECE = 256
"""Queries of a stretch that a thread takes at most at once."""

_int64, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Losses(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("states", "weight", "bias", "targets")),
        *((name, _pointer) for name in ("highest", "total", "picked")),
        *((name, _int64) for name in ("slices", "panels", "vocabulary", "depth", "pairs")),
        *((name, _float) for name in ("scale", "softcap")),
        ("next", _int64),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("query", "key", "value", "output", "sinks", "pieces")),
        *((name, _int64) for name in ("query_head", "query_token", "key_stride", "tokens")),
        *((name, _int64) for name in ("heads", "shared_heads", "depth", "value_depth")),
        *((name, _int64) for name in ("num_pieces", "window", "half")),
        *((name, _float) for name in ("scale", "softcap")),
        ("next", _int64),
        ("failed", _int64),
    )


def can_run() -> bool:
    """Whether the kernels are there, for float32 at least; compiles them at the first call."""
    return _library() is not None


def takes_losses(weight_VM: Tensor) -> bool:
    """Whether there is a kernel for losses of such weights, and nothing is faster.

    In bfloat16 matrix instructions are (AMX), through oneDNN.
    """
    if weight_VM.dtype == torch.bfloat16:
        in_pairs = weight_VM.shape[1] % 2 == 0
        matrices = torch.cpu._is_amx_tile_supported()
        return in_pairs and _has_bfloat16() and not matrices and can_run()
    return weight_VM.dtype == torch.float32 and can_run()


# S=scored tokens, M=hidden size, V=vocabulary, C=slices of it
def cross_entropy(
    hidden_SM: Tensor,
    weight_VM: Tensor,
    bias_V: Tensor | None,
    targets_S: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """As `projection_kernel.cross_entropy`, of float32 or bfloat16: what `takes_losses` takes."""
    missing = -len(targets_S) % _LANES
    words_SW = F.pad(hidden_SM, (0, 0, 0, missing)).contiguous().view(torch.int32)
    states_PWL = words_SW.unflatten(0, (-1, _LANES)).transpose(1, 2).contiguous()
    targets = F.pad(targets_S, (0, missing)).contiguous()
    highest_CS = torch.full((_SLICES, len(targets)), torch.finfo(torch.float32).min)
    total_CS, picked_S = torch.zeros_like(highest_CS), torch.zeros(len(targets))
    bias = None if bias_V is None else bias_V.float().contiguous()
    work = _Losses(
        *map(_address, (states_PWL, weight_VM, bias, targets, highest_CS, total_CS, picked_S)),
        slices=_SLICES,
        panels=len(states_PWL),
        vocabulary=len(weight_VM),
        depth=words_SW.shape[1],
        pairs=hidden_SM.dtype == torch.bfloat16,
        scale=scale,
        softcap=softcap or 0,
    )
    _run("cherry_losses", work)
    # The loss of a token that is all but certain would be lost in the rounding of two large logits.
    others_S = torch.logsumexp(highest_CS + total_CS.log(), dim=0)
    loss_S = F.softplus(others_S - picked_S)
    return torch.where(picked_S == torch.inf, torch.nan, loss_S)[: len(targets_S)]


# H=heads, K=key/value heads, T=tokens of the pack, D=head dimension
def takes_attention(query_HTD: Tensor) -> bool:
    """Whether there is a kernel for attention here; it gives no gradients."""
    return query_HTD.device.type == "cpu" and not torch.is_grad_enabled() and can_run()


def attention(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, pack: Pack, asked: Asked
) -> Tensor:
    """Causal attention of each stretch over its parent and itself; shape (T, H, D).

    Scores, weights and sums are float32, whatever goes in.

    Raises:
        ValueError: Heads do not share keys evenly, or lack a sink, or the pack has other tokens.
        MemoryError: There is none for the scores of a few queries.
    """
    if len(query_HTD) % len(key_KTD) or sum(pack.lengths) != query_HTD.shape[1]:
        raise ValueError(f"heads {len(query_HTD)} and {len(key_KTD)}, {query_HTD.shape[1]} tokens")
    if asked.sinks_H is not None and len(asked.sinks_H) != len(query_HTD):
        raise ValueError(f"{len(asked.sinks_H)} sinks of {len(query_HTD)} heads")
    query_HTD = query_HTD.float()
    if query_HTD.stride(2) != 1:
        query_HTD = query_HTD.contiguous()
    num_heads, num_tokens, depth = query_HTD.shape
    num_shared, value_depth = len(key_KTD), value_KTD.shape[2]
    # An odd number of cache lines from one to the next, or all would fall in the same place.
    key_stride = num_tokens + -num_tokens % (2 * _WIDTH) + _WIDTH
    key_KDS = query_HTD.new_empty(num_shared, depth, key_stride)
    key_KDS[:, :, :num_tokens] = key_KTD.transpose(1, 2)
    value = query_HTD.new_empty(num_shared * num_tokens * value_depth + _WIDTH)
    value[:-_WIDTH].view_as(value_KTD).copy_(value_KTD)
    half = value_KTD.dtype == torch.bfloat16 and _has_bfloat16()
    output_THD = value.new_empty(
        num_tokens, num_heads, value_depth, dtype=torch.bfloat16 if half else torch.float32
    )
    sinks_H = None if asked.sinks_H is None else asked.sinks_H.float().contiguous()
    pieces = _cut(pack)
    work = _Attention(
        *map(_address, (query_HTD, key_KDS, value, output_THD, sinks_H, pieces)),
        query_head=query_HTD.stride(0),
        query_token=query_HTD.stride(1),
        key_stride=key_stride,
        tokens=num_tokens,
        heads=num_heads,
        shared_heads=num_shared,
        depth=depth,
        value_depth=value_depth,
        num_pieces=len(pieces),
        window=min(asked.sliding_window or num_tokens, num_tokens),
        half=half,
        scale=asked.scale,
        softcap=asked.softcap or 0,
    )
    _run("cherry_attention", work)
    if work.failed:
        raise MemoryError("no memory for the scores of attention")
    return output_THD.to(value_KTD.dtype)


@functools.lru_cache(maxsize=2)  # every layer of a pass asks for the same pack
def _cut(pack: Pack) -> Tensor:
    """Pieces of stretches, int64 (P, 5): begin, end, begin of the stretch; begin, length of parent.

    A thread takes one of them at once.
    """
    stretches = pack.stretches
    pieces = []
    for begin, length, parent in stretches:
        before = stretches[parent][:2] if parent >= 0 else (0, 0)
        for at in range(begin, begin + length, _PIECE):
            pieces.append((at, min(at + _PIECE, begin + length), begin, *before))
    return torch.tensor(pieces)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(name: str, work: ctypes.Structure) -> None:
    """Have all of PyTorch's threads work at it until it is done.

    They are those of the OpenMP that PyTorch itself has loaded: another pool would wait for cores
    while that one's threads spin on them.
    """
    kernel = getattr(_library(), name)
    _openmp().GOMP_parallel(kernel, ctypes.byref(work), torch.get_num_threads(), 0)


@functools.cache
def _openmp() -> ctypes.CDLL:
    return ctypes.CDLL(f"{Path(torch.__file__).parent}/lib/libtorch_cpu.so")


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels; None where the CPU has no AVX-512 or they cannot be compiled."""
    needed = ("avx512_f", "avx512_bw", "avx512_vl")
    if not all(torch.cpu.get_capabilities().get(each) for each in needed):
        return None
    flags = ["-m" + each.replace("_", "") for each in needed]
    if _has_bfloat16():
        flags.append("-mavx512bf16")
    found = filter(shutil.which, ("cc", "gcc", "clang"))
    compiler = os.environ.get("CC", "").strip() or next(found, None)
    try:
        if compiler is None:
            raise FileNotFoundError("there is no C compiler")
        with tempfile.TemporaryDirectory(prefix="cherry-kernels-") as folder:
            built = f"{folder}/cpu_kernels.so"
            # Floats and pairs of bfloat16 are both read as words.
            flags += ["-O3", "-fno-strict-aliasing", "-shared", "-fPIC"]
            command = [*compiler.split(), *flags, *_SOURCES, "-o", built]
            subprocess.run(command, check=True, capture_output=True, errors="replace", timeout=300)
            _ = _openmp().GOMP_parallel
            return ctypes.CDLL(built)
    except (OSError, AttributeError, subprocess.SubprocessError) as err:
        said = (getattr(err, "stderr", "") or str(err)).strip()
        said = re.sub(r"\S*cherry-kernels-\w+/", "", said)  # another one in each process
        log.warning(
            "kernels for this CPU cannot be compiled (%s); scoring runs without them, slower. "
            "They need a C compiler on the nodes, gcc from version 10 or clang from 9 on, and a "
            "temporary directory (TMPDIR) that programs can run from.",
            said.splitlines()[0] if said else type(err).__name__,
        )
        return None
