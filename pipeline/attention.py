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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "cherry_packed"

_SHORT = 512
"""Sequences up to this many tokens are attended to in plain matrix products on CPUs."""

_GROUP_SCORES = 1 << 16
"""Scores that are computed at once, 256 KB of float32: measured best of 2^16, 2^18, 2^20, 2^22."""

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
    # Under autocast the rotary embedding leaves queries and keys in float32.
    query_1HTD, key_1KTD = query_1HTD.to(value_1KTD.dtype), key_1KTD.to(value_1KTD.dtype)
    fused = softcap is None and s_aux is None
    if query_1HTD.is_cuda and fused and query_1HTD.dtype != torch.float32:
        assert max_length_q is not None
        output_THD = _varlen(
            query_1HTD, key_1KTD, value_1KTD, cu_seq_lens_q, max_length_q, scaling, sliding_window
        )
        return output_THD.unsqueeze(0), None
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    num_heads = query_1HTD.shape[1]
    outputs = []
    for group in _plan_groups(tuple(cu_seq_lens_q.tolist()), num_heads):
        q, k, v = (x[:, :, group.begin : group.end] for x in (query_1HTD, key_1KTD, value_1KTD))
        window = min(sliding_window or group.longest, group.longest)
        if fused and group.longest > _SHORT:
            assert len(group.lengths) == 1  # more would not fit _GROUP_SCORES
            mask = None if window == group.longest else _band(group.longest, window, q.device)
            output = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )[0].transpose(0, 1)
        else:
            output = _explicit(q[0], k[0], v[0], group, scale, window, softcap, s_aux)
        outputs.append(output)
    return torch.cat(outputs).unsqueeze(0), None


@dataclass(frozen=True)
class _Group:
    """Neighbouring sequences of a pack that are attended to in one batch."""

    begin: int
    end: int
    """Tokens of the pack."""
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @functools.cached_property
    def padded_T(self) -> Tensor | None:
        """Position of each token in the batch padded to the longest, or None if none is padded."""
        if min(self.lengths) == self.longest:
            return None
        with torch.inference_mode(False):  # it is kept, and training may use it next
            return torch.cat(
                [torch.arange(n) + row * self.longest for row, n in enumerate(self.lengths)]
            )


@functools.lru_cache(maxsize=4)  # every layer of a pass asks for the same pack
def _plan_groups(bounds: tuple[int, ...], num_heads: int) -> tuple[_Group, ...]:
    """Cut a pack into groups of like lengths whose scores stay in the cache.

    Short sequences one by one would cost more in calls than in arithmetic. Packs come longest
    first, so that neighbours are alike.
    """
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    groups: list[_Group] = []
    first = 0
    while first < len(lengths):
        longest = lengths[first]
        last = first + 1
        most = max(1, _GROUP_SCORES // (num_heads * longest * longest))
        while (
            last < len(lengths)
            and last - first < most
            and 0.75 * longest <= lengths[last] <= longest
        ):
            last += 1
        groups.append(_Group(bounds[first], bounds[last], tuple(lengths[first:last])))
        first = last
    return tuple(groups)


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


# B=sequences of a group, L=longest of them
def _explicit(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    group: _Group,
    scale: float,
    window: int,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention of a group written out, with float32 scores and weights; shape (T, H, D).

    Takes soft-caps and sinks, which fused kernels do not; and on short sequences it is the faster
    one on CPUs: 200 tokens of 9 heads of 64 in bfloat16 take 0.7 ms, the fused kernel 1.2 ms.
    """
    num_heads, _, head_dim = query_HTD.shape
    batch, longest = len(group.lengths), group.longest
    shape = (batch * num_heads, longest, longest)
    query, key, value = (
        _padded(x, group, num_heads) for x in (query_HTD.float(), key_KTD.float(), value_KTD)
    )
    mask = _additive_band(longest, window, query_HTD.device).expand(shape)
    if softcap is None:
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
    else:
        scores = torch.bmm(query, key.transpose(1, 2)) * scale
        scores = softcap * torch.tanh(scores / softcap) + mask
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(batch, num_heads, longest, 1)
        scores = torch.cat([scores, sinks.reshape(*shape[:2], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :longest].to(value.dtype)
    output_BHLD = torch.bmm(weights, value).view(batch, num_heads, longest, head_dim)
    output_THD = output_BHLD.transpose(1, 2).reshape(batch * longest, num_heads, head_dim)
    return output_THD if group.padded_T is None else output_THD[group.padded_T]


def _padded(x_HTD: Tensor, group: _Group, num_heads: int) -> Tensor:
    """(heads, T, D) -> (B * H, L, D), key and value heads repeated for the queries they serve."""
    x_THD = x_HTD.transpose(0, 1)
    batch, longest = len(group.lengths), group.longest
    if group.padded_T is not None:
        padded = x_THD.new_zeros(batch * longest, *x_THD.shape[1:])
        padded[group.padded_T] = x_THD
        x_THD = padded
    x_BHLD = x_THD.reshape(batch, longest, *x_THD.shape[1:]).transpose(1, 2)
    x_BHLD = x_BHLD.repeat_interleave(num_heads // x_BHLD.shape[1], dim=1)
    return x_BHLD.reshape(batch * num_heads, longest, -1)


def _additive_band(length: int, window: int, device: torch.device) -> Tensor:
    """0 where query i sees key j, -inf elsewhere, float32: a corner of one cached mask."""
    size = max(_SHORT, 1 << (length - 1).bit_length())
    return _cached_band(size, window if window < length else size, device)[:length, :length]


@functools.lru_cache(maxsize=8)
def _cached_band(size: int, window: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept, and training may use it next
        hidden = ~_band(size, window, device)
        return torch.zeros(size, size, device=device).masked_fill(hidden, -torch.inf)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """True where query i sees key j: i - window < j <= i. Window 2: 10000, 11000, 01100, ..."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Boundaries travel as `cu_seq_lens_q`; a mask of the whole pack is never built."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
