"""The vocabulary projection on a GPU: logits that are never written to memory. Needs Triton.

A program multiplies a tile of states with a tile of the vocabulary and keeps of its logits, which
are float32, what the loss needs: the log of the sum of their exponentials, and the target's.

Source: the tiling, Tillet, Kung and Cox, Triton, MAPL 2019; the idea, Wijmans et al., Cut your
losses in large-vocabulary language models, arXiv:2411.09009.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_STATES, _ENTRIES, _DEPTH, _WARPS = 128, 256, 64, 8
"""Of a tile: scored tokens, vocabulary entries, and how much of the hidden size at a time."""

_GROUP = 8
"""Tiles of states that meet the same vocabulary entries one after the other, from the cache."""

_ROWS = 8192
"""States a launch: a float32 for each and each 256 entries is 32 MiB for 256,000 entries."""


# S=scored tokens, M=hidden size, V=vocabulary
def cross_entropy(
    hidden_SM: Tensor,
    weight_VM: Tensor,
    bias_V: Tensor | None,
    targets_S: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Negative log-likelihood of the targets, in nats, float32 (S,).

    Args:
        hidden_SM: float16 or bfloat16, on a GPU.
        weight_VM: Likewise, contiguous.
        bias_V: Added to the logits, or None.
        targets_S: int64.
        scale: Logits are multiplied by it.
        softcap: Then they become `softcap * tanh(logit / softcap)`; None leaves them.
    """
    depth, vocabulary = hidden_SM.shape[1], len(weight_VM)
    losses = []
    for states_SM, wanted_S in zip(hidden_SM.split(_ROWS), targets_S.split(_ROWS), strict=True):
        num_states = len(states_SM)
        tiles = triton.cdiv(num_states, _STATES), triton.cdiv(vocabulary, _ENTRIES)
        lse_ES = states_SM.new_empty(tiles[1], num_states, dtype=torch.float32)
        picked_S = states_SM.new_empty(num_states, dtype=torch.float32)
        _tile_of_logits[(tiles[0] * tiles[1],)](
            states_SM.contiguous(),
            weight_VM,
            bias_V,
            wanted_S,
            lse_ES,
            picked_S,
            num_states,
            vocabulary,
            scale,
            softcap or 0.0,
            DEPTH=depth,
            HAS_BIAS=bias_V is not None,
            HAS_CAP=softcap is not None,
            STATES=_STATES,
            ENTRIES=_ENTRIES,
            STEP=_DEPTH,
            GROUP=_GROUP,
            num_warps=_WARPS,
            num_stages=_num_stages(states_SM.device),
        )
        losses.append(torch.logsumexp(lse_ES, dim=0) - picked_S)
    return torch.cat(losses)


def _num_stages(device: torch.device) -> int:
    """Steps of the product in flight: as many as the card's shared memory holds, up to 3."""
    if device.type != "cuda":  # Triton's interpreter
        return 1
    card: Any = torch.cuda.get_device_properties(device)  # its stub lacks this
    held = int(card.shared_memory_per_block_optin)
    return min(3, max(1, held // (2 * _DEPTH * (_STATES + _ENTRIES))))


@triton.jit  # type: ignore[untyped-decorator]
def _tile_of_logits(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    targets,
    lse,
    picked,
    num_states,
    vocabulary,
    scale,
    softcap,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STATES: tl.constexpr,
    ENTRIES: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that run together share tiles of the vocabulary and of the states in the cache.
    tiles_of_states = tl.cdiv(num_states, STATES)
    per_group = GROUP * tl.cdiv(vocabulary, ENTRIES)
    first = tl.program_id(0) // per_group * GROUP
    high = min(tiles_of_states - first, GROUP)
    state_tile = first + tl.program_id(0) % per_group % high
    entry_tile = tl.program_id(0) % per_group // high

    state = state_tile * STATES + tl.arange(0, STATES)
    entry = entry_tile * ENTRIES + tl.arange(0, ENTRIES)
    # What lies past the end is read from the beginning, and left out of the result.
    rows = hidden + (state % num_states).to(tl.int64)[:, None] * DEPTH
    columns = weight + (entry % vocabulary).to(tl.int64)[None, :] * DEPTH
    logits = tl.zeros((STATES, ENTRIES), dtype=tl.float32)
    for begin in range(0, DEPTH, STEP):
        at = begin + tl.arange(0, STEP)
        if DEPTH % STEP == 0:
            one = tl.load(rows + at[None, :])
            other = tl.load(columns + at[:, None])
        else:
            one = tl.load(rows + at[None, :], mask=at[None, :] < DEPTH, other=0.0)
            other = tl.load(columns + at[:, None], mask=at[:, None] < DEPTH, other=0.0)
        logits = tl.dot(one, other, logits)

    if HAS_BIAS:
        logits += tl.load(bias + entry % vocabulary).to(tl.float32)[None, :]
    logits *= scale
    if HAS_CAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
    logits = tl.where(entry[None, :] < vocabulary, logits, float("-inf"))
    highest = tl.max(logits, axis=1)
    total = highest + tl.log(tl.sum(tl.exp(logits - highest[:, None]), axis=1))
    inside = state < num_states
    tl.store(lse + entry_tile.to(tl.int64) * num_states + state, total, mask=inside)

    target = tl.load(targets + state, mask=inside, other=-1)
    found = tl.sum(tl.where(entry[None, :] == target[:, None], logits, 0.0), axis=1)
    here = (target >= entry_tile * ENTRIES) & (target < (entry_tile + 1) * ENTRIES)
    tl.store(picked + state, found, mask=inside & here)
