"""The probe: how a model can be run in packs, by doing it and comparing with its own way.

A few sequences, one longer than any sliding window, go through packed attention and through
transformers' own eager attention. Two runs of our own attention would agree with each other and
both be wrong: a Gemma-2 without its soft-cap differed by 4.7 nats. What rounding explains in half
precision could hide a state that runs on from one sequence into the next, so a pack is run again
with another sequence in front, which must change none of the others. A model that fits no pack goes
through padded batches, which are compared likewise.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.compiled import Compiled, compile_layers, run_as_written
from pipeline.devices import has_experts
from pipeline.errors import ModelError
from pipeline.forward import hidden_packed, run_alone, run_padded
from pipeline.packing import lay_out
from pipeline.projection import Projection
from pipeline.sharing import Prefix, TokenIds

log = logging.getLogger("cherry")

# What rounding alone explains, per dtype. First, the mean absolute difference in nats per token
# between packed and eager attention at the end of a probe: 1e-7, 0.009 and 0.07 on SmolLM2-135M,
# where a soft-cap or window that is ignored gives 0.1 to 5. Second, the largest relative
# difference of a logit: 0.0, 5e-4 and 4e-3 there. Third, how much any of the first states of a
# sequence changes, relatively, with as many other tokens before it in the pack: attention gives
# 0.0, a faint convolution 0.002, and what else runs on more than 1. Fourth, their mean change where
# products may be rounded otherwise: with more tokens before it, and among experts, which get their
# tokens in other batches, and near a tie by the last bits.
_ATTENTION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_LOSS_TOLERANCE = 1e-4  # float32 everywhere
_LEAK_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
_MEAN_LEAK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}

_PROBE_LENGTHS = (33, 64, 47)
_PROBE_TAIL = 32
"""Tokens compared at the end of each probe, where a window would have slid furthest."""
_PROBE_HEAD = 8
"""Tokens compared behind a boundary, where what leaks through it is strongest."""


_LESS_AND_LESS: dict[Compiled, tuple[Compiled, ...]] = {
    True: (True, "auto", False),
    "auto": ("auto", False),
    False: (False,),
}
"""What is compiled: as much as is asked for, or what of it does not change the scores."""


class Way(NamedTuple):
    """How a model is run."""

    packed: bool
    compiled: bool = False
    together: bool = True
    """In padded batches of several, where it is not packed."""


def find_way(model: Any, max_length: int | None, *, sharing: bool, compiled: Compiled) -> Way:
    """Take packs, kernels and compiled layers, or what of them a model can have.

    Compiles its layers in place, or leaves them as they are written.

    Args:
        model: A transformers causal LM, on its device.
        max_length: As `find_fault`.
        sharing: As `find_fault`.
        compiled: As `compile_layers`.

    Raises:
        ModelError: The model is not causal.
    """
    name = type(model).__name__
    fault = None
    for less in _LESS_AND_LESS[compiled]:
        compiled_fault, kernels = fault, compile_layers(model, less)
        fault = find_fault(model, max_length, sharing=sharing, compiled=kernels)
        if fault is None:
            if compiled_fault:
                what = "its layers run uncompiled" if kernels else "nothing runs compiled"
                log.warning("%s: %s; %s, which is slower", name, compiled_fault, what)
            return Way(packed=True, compiled=kernels)
        run_as_written(model)
        if not kernels:  # it is not what was compiled
            break
    together = _padding_is_right(model, max_length)
    instead = "in padded batches" if together else "each sequence alone, as padding changes it,"
    log.warning("%s: %s; scoring %s instead, which is slower", name, fault, instead)
    return Way(packed=False, together=together)


@torch.inference_mode()
def find_fault(
    model: Any,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    sharing: bool = False,
    compiled: bool = False,
) -> str | None:
    """Say what of a model differs in packs beyond rounding; None if nothing does.

    Args:
        model: A transformers causal LM, on its device.
        max_length: Longest sequence that will come, in tokens; None is the model's positions.
        dtype: Of matrix products, where weights have another one; None is the weights' own.
        sharing: Whether sequences of a pack may begin with the same tokens, computed once.
        compiled: Whether kernels are compiled (compiled.py).

    Raises:
        ModelError: The model is not causal.
    """
    own = next(model.parameters()).dtype
    if dtype is None or dtype == own:
        return _find_fault(model, max_length, own, sharing, compiled)
    with torch.autocast(model.device.type, dtype):
        return _find_fault(model, max_length, dtype, sharing, compiled)


def _find_fault(
    model: Any, max_length: int | None, dtype: torch.dtype, sharing: bool, compiled: bool
) -> str | None:
    config = model.config.get_text_config()
    limit = _longest_probe(config, max_length)
    window = _longest_window(config)
    longest = [2 * window] if window and window < limit else []  # else no window ever slides
    # Some count positions through a whole pack, and past the last one they would break a GPU until
    # the process ends: four probes have room, but for one that is longer than a window.
    short = min(limit, max(2, _num_positions(config) // 5))
    lengths = [*(min(n, short) for n in _PROBE_LENGTHS), *(min(n, limit) for n in longest)]
    random = np.random.default_rng(0)
    first, other, longer, *rest = (
        random.integers(0, config.vocab_size, n, dtype=np.int32)
        for n in (lengths[0], lengths[0], lengths[1], *lengths)
    )
    common = min(lengths) // 2 if sharing else 0
    for ids in rest:  # the first one shares nothing, and lies before all that does
        ids[:common] = rest[0][:common]
    prefixes = [None, *[Prefix(1, common) if common else None for _ in rest]]
    experts = has_experts(model)
    try:
        if not experts:
            _refuse_unless_causal(model, first, dtype)
        packed, windows = _run_packed(model, [first, *rest], prefixes, compiled)
        again = (
            _run_packed(model, [front, *rest], prefixes, compiled)[0]
            for front in (first, other, longer)
        )
        noise_BS, leaks_BS, others_BS = (_leaks(packed[1:], one[1:], common) for one in again)
        # A device that adds up in any order says something else each time.
        leak = 0.0 if experts else float(leaks_BS.max() - 4 * noise_BS.max())
        mean_leak = float(torch.cat([leaks_BS, others_BS]).mean(1).max())
        projection = Projection(model, compiled)
        alone = [run_alone(model.base_model, model, ids) for ids in (first, *rest)]
        own = [output.last_hidden_state[0] for output in alone]
        errors = list(map(partial(_attention_error, projection), [first, *rest], own, packed))
        attention_error = float(np.max(errors))  # NaN if any is
        ours_TV = torch.cat([logits for _, logits in projection.chunks(own[0])], dim=1)
        logit_error = _logit_error(ours_TV, run_alone(model, model, first).logits[0])
        loss_error = _loss_error(projection, first, own[0], ours_TV)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # no fault of the architecture
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as err:
        return f"cannot be scored in packs ({type(err).__name__}: {err})"
    if not (leak <= _LEAK_TOLERANCE[dtype] and mean_leak <= _MEAN_LEAK_TOLERANCE[dtype]):
        most = 100 * float(np.max([leak, mean_leak]))
        return f"a sequence changes the next one of its pack by {most:.2g} %"
    if longest and not windows - {None} and _may_have_windows(config):
        return f"its layers do not ask for the window of {window:,} tokens that its config has"
    if not attention_error <= _ATTENTION_TOLERANCE[dtype]:
        return f"packed attention is off by {attention_error:.2g} nats per token"
    if not logit_error <= _LOGIT_TOLERANCE[dtype]:
        return f"its logits are not a plain projection (off by {100 * logit_error:.2g} %)"
    if not loss_error <= _LOSS_TOLERANCE:
        return f"its losses do not follow from its logits (off by {100 * loss_error:.2g} %)"
    return None


# T=tokens of a probe, S=tokens compared, M=hidden size, V=vocabulary
def _run_packed(
    model: Any, probes: list[TokenIds], prefixes: Sequence[Prefix | None], kernels: bool
) -> tuple[list[Tensor], set[int | None]]:
    """Last hidden states of each probe, (T, M), from one pack, and the windows asked for."""
    laid = lay_out(probes, prefixes)
    hidden_TM = hidden_packed(model, laid.pack, torch.from_numpy(laid.ids_T).long(), kernels)
    states = [hidden_TM[torch.from_numpy(place)] for place in laid.places_of_each()]
    return states, laid.pack.windows


def _leaks(packed: list[Tensor], changed: list[Tensor], common: int) -> Tensor:
    """Relative changes of the first states that are a sequence's own, (B, S)."""
    head = slice(common, common + _PROBE_HEAD)
    pairs = zip(packed, changed, strict=True)
    return torch.stack([_changes(one[head], other[head]) for one, other in pairs])


def _changes(one_SM: Tensor, other_SM: Tensor) -> Tensor:
    """Relative change of each vector, (S,)."""
    one_SM, other_SM = one_SM.float(), other_SM.float()
    size_S = one_SM.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    change_S: Tensor = (one_SM - other_SM).norm(dim=1) / size_S
    return change_S


def _refuse_unless_causal(model: Any, ids: TokenIds, dtype: torch.dtype) -> None:
    """Change the last token, which must change no logits but its own."""
    changed = ids.copy()
    changed[-1] = (ids[-1] + 1) % model.config.get_text_config().vocab_size
    one_TV, other_TV = (run_alone(model, model, each).logits[0] for each in (ids, changed))
    change = float(_changes(one_TV[:-1], other_TV[:-1]).max())
    if change > _LOGIT_TOLERANCE[dtype]:
        raise ModelError(
            f"model: {type(model).__name__} is not causal: its logits change by {100 * change:.2g} "
            "% with a token that comes after them. Expected a causal language model; name another "
            "one as model.path."
        )


# L=tokens of a sequence
@torch.inference_mode()
def _padding_is_right(model: Any, max_length: int | None) -> bool:
    """Whether sequences have the losses in a padded batch that they have alone, beyond rounding."""
    config = model.config.get_text_config()
    limit = _longest_probe(config, max_length)
    lengths = [min(n, limit) for n in _PROBE_LENGTHS]
    random = np.random.default_rng(0)
    probes = [random.integers(0, config.vocab_size, n, dtype=np.int32) for n in lengths]
    ids_T = torch.from_numpy(np.concatenate(probes)).long()
    try:
        together_TV, _ = run_padded(model, lengths, ids_T)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    errors = []
    for ids, together_LV in zip(probes, together_TV.split(lengths), strict=True):
        targets_L = torch.from_numpy(ids[1:]).long().to(together_LV.device)
        alone_LV = run_alone(model, model, ids).logits[0].to(together_LV.device)
        one_L, other_L = (
            F.cross_entropy(logits_LV[:-1].float(), targets_L, reduction="none")
            for logits_LV in (together_LV, alone_LV)
        )
        errors.append(float((one_L - other_L).abs().mean()))
    return float(np.max(errors)) <= _ATTENTION_TOLERANCE[next(model.parameters()).dtype]


def _attention_error(
    projection: Projection, ids: TokenIds, own_TM: Tensor, packed_TM: Tensor
) -> float:
    """Mean difference of packed and own attention at the end of a probe, in nats."""
    targets_S = torch.from_numpy(ids[1:][-_PROBE_TAIL:]).long()
    tail = slice(-1 - len(targets_S), -1)  # the states that predict the targets
    own_S, packed_S = (projection.nll(x_TM[tail], targets_S) for x_TM in (own_TM, packed_TM))
    return float((packed_S - own_S).abs().mean())


def _logit_error(ours_TV: Tensor, own_TV: Tensor) -> float:
    """Largest relative error of a logit of a short probe, all of whose logits exist at once."""
    own_TV = own_TV.float().to(ours_TV.device)
    return float(((ours_TV - own_TV).abs() / (1 + own_TV.abs())).max())


def _loss_error(projection: Projection, ids: TokenIds, own_TM: Tensor, ours_TV: Tensor) -> float:
    """Largest relative error of a loss against one from whole logits, both float32."""
    targets_S = torch.from_numpy(ids[1:]).long().to(ours_TV.device)
    ours_S = projection.nll(own_TM[:-1], targets_S)
    whole_S = F.cross_entropy(ours_TV[:-1], targets_S, reduction="none")
    return float(((ours_S - whole_S).abs() / (1 + whole_S)).max())


def _longest_probe(config: Any, max_length: int | None) -> int:
    """Tokens of the longest sequence that will come, and that the model has positions for."""
    positions = _num_positions(config)
    return min(positions, max_length or positions)


def _num_positions(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _may_have_windows(config: Any) -> bool:
    """Whether some of its layers have a window, or it does not say which have."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return any("sliding" in kind or "chunked" in kind for kind in kinds)


def _longest_window(config: Any) -> int | None:
    """Longest attention window or chunk that any layer has, in tokens."""
    names = ("sliding_window", "attention_chunk_size", "window_size")
    found = [w for name in names if isinstance(w := getattr(config, name, None), int)]
    return max(found, default=None)
