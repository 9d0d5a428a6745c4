"""Attention over packs: sequences end to end, each attending to itself only.

Plugged into transformers through its attention and mask registries, so that any architecture that
asks those for its attention can be scored without padding::

    pack        [a a a|b b|c c c c]       cu_seq_lens_q = [0, 3, 5, 9]
    attention    causal, within a, within b, within c

What a layer asks for (scale, sliding window, soft-cap, sinks, grouped heads) is honoured; what is
not known here is refused with UnsupportedAttentionError, never ignored.
"""

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "cherry_packed"

_SHORT = 512
"""Sequences up to this many tokens are attended to in plain matrix products on CPUs."""

# Arguments that models hand through and that change nothing here: no cache, no dropout, positions
# already applied, and the pack's boundaries say where sequences end.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "past_key_values",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "cu_seq_lens_k",
    "max_length_k",
    "position_embeddings",
    "cross_attn",
    "is_causal",
    "layer_idx",
    "num_items_in_batch",
    "logits_to_keep",
    "labels",
}


class UnsupportedAttentionError(ValueError):
    """A layer asks for something that packed attention does not do."""


def register() -> None:
    """Make `attn_implementation="cherry_packed"` known to transformers. Harmless to repeat."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)


# H=heads, K=key/value heads, T=tokens of the pack, D=head dimension
def packed_attention(
    module: torch.nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a pack.

    Args:
        module: The layer that asks.
        query_1HTD: Float.
        key_1KTD: Float; H is a multiple of K.
        value_1KTD: Float.
        attention_mask: Must be None: boundaries come from `cu_seq_lens_q`.
        scaling: Factor of the scores; None is 1/sqrt(D).
        dropout: Must be 0.
        sliding_window: Keys a query sees, itself included; None is all before it.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        s_aux: One sink logit per head, shape (H,).
        cu_seq_lens_q: int32 (sequences + 1,), on the query's device.
        max_length_q: Longest sequence, in tokens.
        rest: What else the layer passes; unknown arguments are refused.

    Returns:
        Output of shape (1, T, H, D), and None for the weights.

    Raises:
        UnsupportedAttentionError: An argument asks for something else.
    """
    unknown = [k for k, v in rest.items() if v is not None and k not in _HARMLESS]
    if unknown or attention_mask is not None or dropout or cu_seq_lens_q is None:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} asks attention for {', '.join(unknown) or 'a mask'}, "
            "which packed attention does not do"
        )
    if not getattr(module, "is_causal", True) or rest.get("is_causal") is False:
        raise UnsupportedAttentionError(f"{type(module).__name__} is not causal")
    fused = softcap is None and s_aux is None
    if query_1HTD.is_cuda and fused and query_1HTD.dtype != torch.float32:
        assert max_length_q is not None
        output_THD = _varlen(
            query_1HTD, key_1KTD, value_1KTD, cu_seq_lens_q, max_length_q, scaling, sliding_window
        )
        return output_THD.unsqueeze(0), None
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    bounds = cu_seq_lens_q.tolist()
    outputs = []
    for begin, end in itertools.pairwise(bounds):
        length = end - begin
        q, k, v = (x[:, :, begin:end] for x in (query_1HTD, key_1KTD, value_1KTD))
        window = min(sliding_window or length, length)
        if fused and (length > _SHORT or q.is_cuda):
            mask = None if window == length else _band(length, window, q.device)
            output = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        else:
            output = _explicit(q[0], k[0], v[0], scale, window, softcap, s_aux).unsqueeze(0)
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _varlen(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    # (left, right): a window of w keys, itself included, is w - 1 to the left.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output_THD = varlen_attn(
        query_1HTD[0].transpose(0, 1),
        key_1KTD[0].transpose(0, 1),
        value_1KTD[0].transpose(0, 1),
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        scale=scaling,
        window_size=window,
        enable_gqa=query_1HTD.shape[1] != key_1KTD.shape[1],
    )
    assert isinstance(output_THD, Tensor)
    return output_THD


def _explicit(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    scale: float,
    window: int,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of one sequence written out, with float32 scores and weights.

    Takes soft-caps and sinks, which fused kernels do not; and on short sequences it is the faster
    one on CPUs: 200 tokens of 9 heads of 64 in bfloat16 take 0.7 ms, the fused kernel 1.2 ms.
    """
    num_heads, length, _ = query_HTD.shape
    groups = num_heads // key_KTD.shape[0]
    key = key_KTD.repeat_interleave(groups, dim=0).float()
    value = value_KTD.repeat_interleave(groups, dim=0)
    mask = _additive_band(length, window, query_HTD.device).expand(num_heads, length, length)
    if softcap is None:
        scores = torch.baddbmm(mask, query_HTD.float(), key.transpose(1, 2), alpha=scale)
    else:
        scores = torch.bmm(query_HTD.float(), key.transpose(1, 2)) * scale
        scores = softcap * torch.tanh(scores / softcap) + mask
    if s_aux is not None:
        sinks = s_aux.float().reshape(-1, 1, 1).expand(num_heads, length, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    return torch.bmm(weights[..., :length].to(value.dtype), value)


def _additive_band(length: int, window: int, device: torch.device) -> Tensor:
    """0 where query i sees key j, -inf elsewhere, float32: a corner of one cached mask."""
    size = max(_SHORT, 1 << (length - 1).bit_length())
    return _cached_band(size, window if window < length else size, device)[:length, :length]


@functools.lru_cache(maxsize=8)
def _cached_band(size: int, window: int, device: torch.device) -> Tensor:
    hidden = ~_band(size, window, device)
    return torch.zeros(size, size, device=device).masked_fill(hidden, -torch.inf)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """True where query i sees key j: i - window < j <= i. Window 2: 10000, 11000, 01100, ..."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Boundaries travel as `cu_seq_lens_q`; a mask of the whole pack is never built."""
