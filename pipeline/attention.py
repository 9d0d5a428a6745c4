"""Attention over packs: sequences end to end, each attending to itself only.

Plugged into transformers through its registry of attention, so that any architecture that asks it
for its attention can be scored without padding::

    pack        [p p|a a a|b b|c c c c]   a and b begin with p
    attention    causal, within p, p and a, p and b, c

What a layer asks for (scale, sliding window, soft-cap, sinks, grouped heads) is honoured; what is
not known here is refused with UnsupportedAttentionError, never ignored.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from pipeline import cpu_kernels
from pipeline.grouped_attention import Asked, grouped_attention
from pipeline.packing import Pack

PACKED = "cherry_packed"

# Keys that serve several heads: PyTorch 2.11 just takes them, 2.13 wants to be told.
_SHARED_KEYS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)

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
    cherry_pack: Pack | None = None,
    cherry_kernels: bool = False,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a pack.

    Args:
        module: The layer that asks.
        query_1HTD: Float.
        key_1KTD: Float; H is a multiple of K.
        value_1KTD: Float; its last dimension may be another, which the output's is then.
        attention_mask: Must be None: boundaries come from `cherry_pack`.
        scaling: Factor of the scores; None is 1/sqrt(D).
        dropout: Must be 0.
        sliding_window: Keys a query sees, itself included; None is all before it.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        s_aux: One sink logit per head, shape (H,).
        cherry_pack: Where the sequences lie.
        cherry_kernels: Whether a CPU's own kernels may do it.
        rest: What else the layer passes; unknown arguments are refused.

    Returns:
        Output of shape (1, T, H, D), and None for the weights.

    Raises:
        UnsupportedAttentionError: An argument asks for something else.
    """
    unknown = [k for k, v in rest.items() if v is not None and k not in _HARMLESS]
    if unknown or attention_mask is not None or dropout or cherry_pack is None:
        raise UnsupportedAttentionError(
            f"{type(module).__name__} asks attention for {', '.join(unknown) or 'a mask'}, "
            "which packed attention does not do"
        )
    if not getattr(module, "is_causal", True) or rest.get("is_causal") is False:
        raise UnsupportedAttentionError(f"{type(module).__name__} is not causal")
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    asked = scale, sliding_window, softcap, s_aux
    tensors = query_1HTD, key_1KTD, value_1KTD
    if torch.compiler.is_compiling():
        return _attend_compiled(*tensors, cherry_pack.handle, *asked, cherry_kernels), None
    return _attend(*tensors, cherry_pack, Asked(*asked), cherry_kernels), None


def _attend(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    pack: Pack,
    asked: Asked,
    kernels: bool,
) -> Tensor:
    """What `packed_attention` gives, (1, T, H, D) in the dtype of the values."""
    counts = query_1HTD.shape[2], key_1KTD.shape[2], sum(pack.lengths)
    if len(set(counts)) > 1:
        queries, keys, tokens = counts
        raise UnsupportedAttentionError(
            f"there are keys that are no tokens: {queries} queries and {keys} keys in a pack of "
            f"{tokens} tokens"
        )
    pack.windows.add(asked.sliding_window)
    attend = grouped_attention
    if asked.fused and _varlen_takes(query_1HTD, value_1KTD):
        attend = _varlen
    elif kernels and cpu_kernels.takes_attention(query_1HTD):
        attend = cpu_kernels.attention
    # Each rounds what it may; autocast would round the scores as well.
    with torch.autocast(query_1HTD.device.type, enabled=False):
        return attend(query_1HTD[0], key_1KTD[0], value_1KTD[0], pack, asked)[None]


@torch.library.custom_op("cherry::attend", mutates_args=())
def _attend_compiled(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    handle: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    kernels: bool,
) -> Tensor:
    """`_attend` as an operation of a compiled layer, which is given tensors and numbers only.

    It has no gradient: what is trained is never compiled.
    """
    asked = Asked(scale, sliding_window, softcap, sinks_H)
    pack = Pack.of_handle(handle)
    output_1THD = _attend(query_1HTD, key_1KTD, value_1KTD, pack, asked, kernels)
    return output_1THD.contiguous()  # as the next function promises


@_attend_compiled.register_fake
def _(query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, *_: Any) -> Tensor:
    num_heads, num_tokens = query_1HTD.shape[1:3]
    return value_1KTD.new_empty(1, num_tokens, num_heads, value_1KTD.shape[-1])


def _varlen_takes(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention, which varlen attention is, has a kernel for this."""
    return (
        query.is_cuda
        and value.dtype != torch.float32
        and query.shape[-1] == value.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, pack: Pack, asked: Asked
) -> Tensor:
    tensors = pack.on(query_HTD.device)
    # Under autocast the rotary embedding leaves queries and keys in float32.
    query_THD, key_TKD, value_TKD = (
        x.transpose(0, 1).to(value_KTD.dtype) for x in (query_HTD, key_KTD, value_KTD)
    )
    if tensors.keys is not None:
        key_TKD, value_TKD = key_TKD[tensors.keys], value_TKD[tensors.keys]
    # (left, right): a window of w keys, itself included, is w - 1 to the left. Where there are more
    # keys than queries, the last of both are at the same position.
    window = (-1 if asked.sliding_window is None else asked.sliding_window - 1, 0)
    output_THD = varlen_attn(
        query_THD,
        key_TKD,
        value_TKD,
        tensors.query_bounds,
        tensors.key_bounds,
        tensors.longest_query,
        tensors.longest_key,
        scale=asked.scale,
        window_size=window,
        **_SHARED_KEYS,
    )
    assert isinstance(output_THD, Tensor)
    return output_THD


# Without a function for masks, transformers makes none and does not look at the positions for one,
# which would wait for the GPU in every pass. Boundaries travel as `cherry_pack`.
AttentionInterface.register(PACKED, packed_attention)
