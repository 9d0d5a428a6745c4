"""The probe: whether a model can be run in packs, by doing it and comparing with its own way.

A few sequences, one longer than any sliding window, go through packed attention and through
transformers' own eager attention. Two runs of our own attention would agree with each other and
both be wrong: a Gemma-2 without its soft-cap differed by 4.7 nats.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.forward import hidden_packed, run_alone
from pipeline.packing import lay_out
from pipeline.projection import Projection
from pipeline.sharing import Prefix

# What rounding alone explains, per dtype. First, the mean absolute difference in nats per token
# between packed and eager attention at the end of a probe: 1e-7, 0.009 and 0.07 on SmolLM2-135M,
# where a soft-cap or window that is ignored gives 0.1 to 5. Second, the largest relative
# difference of a logit: 0.0, 5e-4 and 4e-3 there.
_ATTENTION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

_PROBE_LENGTHS = (33, 64, 47)
_PROBE_TAIL = 32
"""Tokens compared at the end of each probe, where a window would have slid furthest."""


@torch.inference_mode()
def find_fault(
    model: Any,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    sharing: bool = False,
) -> str | None:
    """Say what of a model differs in packs beyond rounding; None if nothing does.

    Args:
        model: A transformers causal LM, on its device.
        max_length: Longest sequence that will come, in tokens; None is the model's positions.
        dtype: Of matrix products, where weights have another one; None is the weights' own.
        sharing: Whether sequences of a pack may begin with the same tokens, computed once.
    """
    own = next(model.parameters()).dtype
    if dtype is None or dtype == own:
        return _find_fault(model, max_length, own, sharing)
    with torch.autocast(model.device.type, dtype):
        return _find_fault(model, max_length, dtype, sharing)


def _find_fault(
    model: Any, max_length: int | None, dtype: torch.dtype, sharing: bool
) -> str | None:
    config = model.config.get_text_config()
    positions = int(getattr(config, "max_position_embeddings", None) or 2**31)
    limit = min(positions, max_length or positions)
    window = _longest_window(config)
    longest = [2 * window] if window and window < limit else []  # else no window ever slides
    lengths = [min(n, limit) for n in (*_PROBE_LENGTHS, *longest)]
    random = np.random.default_rng(0)
    probes = [random.integers(0, config.vocab_size, n, dtype=np.int32) for n in lengths]
    prefixes: list[Prefix | None] = [None] * len(probes)
    if sharing and (common := min(lengths) // 2):  # by all but the first
        for at in range(1, len(probes)):
            probes[at][:common] = probes[1][:common]
            prefixes[at] = Prefix(1, common)
    laid = lay_out(probes, prefixes)
    try:
        hidden_TM = hidden_packed(model, laid.pack, torch.from_numpy(laid.ids_T).long())
        packed = [hidden_TM[torch.from_numpy(place)] for place in laid.places]
        attention_error, logit_error = _compare(
            model, [torch.from_numpy(ids).long() for ids in probes], packed
        )
    except (RuntimeError, TypeError, ValueError, AttributeError) as err:
        return f"cannot be scored in packs: {err}"
    if not attention_error <= _ATTENTION_TOLERANCE[dtype]:
        return f"packed attention is off by {attention_error:.2g} nats per token"
    if not logit_error <= _LOGIT_TOLERANCE[dtype]:
        return f"its logits are not a plain projection (off by {100 * logit_error:.2g} %)"
    return None


# T=tokens of a probe, S=tokens compared, M=hidden size, V=vocabulary
def _compare(model: Any, probes: list[Tensor], packed: list[Tensor]) -> tuple[float, float]:
    """Mean error of packed attention in nats, and largest relative error of a logit."""
    projection = Projection(model)
    differences, logit_errors = [], []
    for ids_T, packed_TM in zip(probes, packed, strict=True):
        logits_TV, own_TM = run_alone(model, ids_T)
        targets_S = ids_T[1:][-_PROBE_TAIL:].to(model.device)
        tail = slice(-1 - len(targets_S), -1)  # the states that predict the targets
        error_S = projection.nll(packed_TM[tail], targets_S) - projection.nll(
            own_TM[tail], targets_S
        )
        differences.append(error_S.abs().mean())
        ours_TV = torch.cat([logits for _, logits in projection.chunks(own_TM)], dim=1)
        own_TV = logits_TV.float().to(ours_TV.device)
        logit_errors.append(((ours_TV - own_TV).abs() / (1 + own_TV.abs())).max())
    return float(torch.stack(differences).max()), float(torch.stack(logit_errors).max())


def _longest_window(config: Any) -> int | None:
    """Longest attention window or chunk that any layer has, in tokens."""
    names = ("sliding_window", "attention_chunk_size", "window_size")
    found = [w for name in names if isinstance(w := getattr(config, name, None), int)]
    return max(found, default=None)
