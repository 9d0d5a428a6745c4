"""One forward pass of sequences that lie end to end: packed, or padded the model's own way."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.attention import PACKED, UnsupportedAttentionError
from pipeline.devices import fast_float32, to_device, tokens_to_fill_up
from pipeline.packing import Pack
from pipeline.sharing import TokenIds

_refused: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""Attention that a model was asked for and did not take."""

_float32_between_layers: WeakSet[Any] = WeakSet()
"""Models in half precision that add up in float32."""


@torch.inference_mode()
def keep_float32_between_layers(model: Any) -> None:
    """Have a model in half precision add up in float32 what its layers give.

    Matrix products stay in half precision and so do weights; what each layer adds to is not rounded
    each time: with it the top tenth of 2,000 Alpaca rows, SmolLM2-135M in bfloat16, had 98.5 % of
    float32's rows, without it 97.5 %. An architecture that cannot mix the two is left as it is.
    """
    if next(model.parameters()).dtype == torch.float32:
        return
    hook = model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].float())
    _float32_between_layers.add(model)
    try:
        run_alone(model, model, np.zeros(2, np.int32))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError):
        hook.remove()
        _float32_between_layers.discard(model)


@contextmanager
def _products(model: Any) -> Iterator[None]:
    """Matrix products in the dtype of the weights, whatever meets them."""
    with ExitStack() as stack:
        stack.enter_context(fast_float32(model.device))
        if model in _float32_between_layers:
            dtype = next(model.parameters()).dtype
            stack.enter_context(torch.autocast(model.device.type, dtype))
        yield


# T=tokens of all sequences, M=hidden size, V=vocabulary, B=sequences, L=longest of them
def hidden_packed(model: Any, pack: Pack, ids_T: Tensor, kernels: bool = False) -> Tensor:
    """Last hidden states of a pack, shape (T, M), in the model's dtype or float32.

    With a CPU's own `kernels`, where it has them (cpu_kernels.py).
    """
    _use_attention(model, PACKED)
    num_tokens = len(ids_T)
    pack, ids_T = _filled_up(pack, ids_T, model.device)
    with _products(model):
        output = model.base_model(
            input_ids=ids_T.unsqueeze(0).to(model.device),
            position_ids=to_device(pack.positions(), model.device).unsqueeze(0),
            use_cache=False,
            cherry_pack=pack,
            cherry_kernels=kernels,
        )
    return output.last_hidden_state[0, :num_tokens]  # type: ignore[no-any-return]


def _filled_up(pack: Pack, ids_T: Tensor, device: torch.device) -> tuple[Pack, Tensor]:
    """A pack with more tokens, which nobody asks about, where the device wants them."""
    missing = tokens_to_fill_up(len(ids_T), device)
    if not missing:
        return pack, ids_T
    # In stretches that are no longer than others: a model may have no positions for more.
    longest = max(pack.lengths)
    more = [min(longest, missing - done) for done in range(0, missing, longest)]
    parents = pack.parents and (*pack.parents, *(-1 for _ in more))
    return Pack((*pack.lengths, *more), parents, pack.windows), F.pad(ids_T, (0, missing))


def run_padded(
    model: Any, lengths: list[int], ids_T: Tensor, *, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The slow, sure way: right-padded, the model's own eager attention and its own logits.

    Args:
        model: A transformers causal LM.
        lengths: Of the sequences.
        ids_T: Their tokens.
        hidden: Also give the last hidden states; to do so, transformers keeps those of all layers.

    Returns:
        Logits of shape (T, V), in the model's dtype, and hidden states of shape (T, M) or None.
    """
    length_B1 = torch.tensor(lengths).unsqueeze(1)
    start_B1 = length_B1.cumsum(0) - length_B1
    column_L = torch.arange(max(lengths))
    # Filled up with a row's own last token: one without a number in its embedding would reach all.
    at_BL = start_B1 + torch.minimum(column_L, length_B1 - 1)
    ids_BL = ids_T[at_BL.to(ids_T.device)].to(model.device)
    mask_BL = (column_L < length_B1).to(model.device)
    _use_attention(model, "eager")
    with _products(model):
        output = model(
            input_ids=ids_BL,
            attention_mask=mask_BL.long(),
            use_cache=False,
            output_hidden_states=hidden,
        )
    return output.logits[mask_BL], output.hidden_states[-1][mask_BL] if hidden else None


def run_alone(module: Any, model: Any, ids: TokenIds) -> Any:
    """What a model, or the body of it, gives for one sequence through its own eager attention.

    Never compiled: it is what the engine is compared with.
    """
    _use_attention(model, "eager")
    ids_1T = torch.from_numpy(ids).long().unsqueeze(0).to(model.device)
    with torch.compiler.set_stance("force_eager"), _products(model):
        return module(input_ids=ids_1T, use_cache=False)


def longest_together(config: Any) -> int:
    """Tokens up to which sequences may share a pass: LongRoPE turns all of a pass by its longest.

    Source: arXiv:2402.13753; transformers.modeling_rope_utils.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # by kind of layer
    limits = [
        int(kind["original_max_position_embeddings"])
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min(limits, default=2**31)


def _use_attention(model: Any, implementation: str) -> None:
    # An architecture that never asks for its attention refuses, and warns each time.
    if not _uses(model, implementation) and implementation not in _refused.get(model, ()):
        model.set_attn_implementation(implementation)
        if not _uses(model, implementation):
            _refused.setdefault(model, set()).add(implementation)
    # Some mask their own attention by position ids. Masks are added to scores, and a sequence with
    # a weight of NaN would reach all others of its pack through them.
    if implementation == PACKED and PACKED in _refused.get(model, ()):
        raise UnsupportedAttentionError("it has its own attention")


def _uses(model: Any, implementation: str) -> bool:
    """Whether a model's layers, or those of the language model within it, have this attention."""
    return bool(model.config.get_text_config()._attn_implementation == implementation)
