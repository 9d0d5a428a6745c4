"""The loss of a pack's answers, with gradients: what a training steps on and is judged by.

Sequences lie in packs as in scoring, without padding, and the vocabulary meets only states that
predict a token with a loss, some at a time, and again in the backward pass.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from pipeline.devices import tokens_to_fill_up
from pipeline.forward import hidden_packed, run_padded
from pipeline.packing import Pack
from pipeline.parallel import rank, sum_over_workers
from pipeline.projection import logit_transform
from pipeline.training_data import Examples

_TOKENS_PROJECTED = 1024
"""Tokens that meet the vocabulary at once: 1,024 x 128,000 logits are half a gigabyte."""

_NO_TARGET = -100
"""What cross_entropy takes for a token without a loss."""

Deal = Callable[[Sequence[int]], list[list[list[int]]]]
"""From lengths of rows to the packs of each worker, as `batches.deal_packs`."""


class ResponseLoss(nn.Module):
    """A causal language model whose forward pass is the summed loss of a pack's targets."""

    def __init__(self, model: Any, packed: bool) -> None:
        """Take a model, and whether it can be run in packs (see probe.py)."""
        super().__init__()
        self.model = model
        self._packed = packed
        self._transform = logit_transform(model.config.get_text_config())

    # T=tokens of the pack, S=tokens with a loss, M=hidden size, V=vocabulary
    def forward(
        self, ids_T: Tensor, lengths: list[int], position_S: Tensor, *, whole: bool = True
    ) -> Tensor:
        """Loss of the tokens at `position_S`, in nats, summed.

        With `whole=False`, of each of them, and whether it is the most likely one: shape (2, S).
        """
        # The causal shift: the state at t - 1 predicts token t.
        before_S, target_S = position_S - 1, ids_T[position_S]
        if not self._packed:  # its logits may be more than a projection
            logits_TV, _ = run_padded(self.model, lengths, ids_T)
            judged = _judge(logits_TV[before_S].float(), target_S)
            return judged[0].sum() if whole else judged
        hidden_SM = hidden_packed(self.model, Pack(tuple(lengths)), ids_T)[before_S]
        num_targets = len(target_S)
        missing = tokens_to_fill_up(num_targets, hidden_SM.device)
        hidden_SM = F.pad(hidden_SM, (0, 0, 0, missing))
        target_S = F.pad(target_S, (0, missing), value=_NO_TARGET)
        pieces = list(
            zip(hidden_SM.split(_TOKENS_PROJECTED), target_S.split(_TOKENS_PROJECTED), strict=True)
        )
        if not whole:
            judged = torch.cat([_judge(self._logits(h), t) for h, t in pieces], dim=1)
            return judged[:, :num_targets]
        losses = [checkpoint(self._nll, h, t, use_reentrant=False) for h, t in pieces]
        return torch.stack(losses).sum()

    def _logits(self, hidden_SM: Tensor) -> Tensor:
        logits_SV: Tensor = self.model.get_output_embeddings()(hidden_SM)
        return self._transform(logits_SV.float())

    def _nll(self, hidden_SM: Tensor, target_S: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden_SM), target_S, reduction="sum")


def _judge(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    nll_S = F.cross_entropy(logits_SV, target_S, reduction="none")
    return torch.stack([nll_S, (logits_SV.argmax(-1) == target_S).float()])


def forward_pack(
    wrapped: nn.Module, examples: Examples, rows: Any, dtype: torch.dtype, *, whole: bool = True
) -> Tensor:
    """What ResponseLoss gives of a pack of rows."""
    device = next(wrapped.parameters()).device
    ids, mask = (
        np.concatenate([values[examples.span(row)] for row in rows])
        for values in (examples.ids, examples.targets)
    )
    # FSDP casts weights itself.
    casts = dtype != torch.float32 and not isinstance(wrapped, FSDPModule)
    with torch.autocast(device.type, dtype) if casts else nullcontext():
        nll: Tensor = wrapped(
            torch.from_numpy(ids).long().to(device),
            [int(examples.lengths[row]) for row in rows],
            torch.from_numpy(np.flatnonzero(mask)).to(device),
            whole=whole,
        )
    return nll


@torch.no_grad()
def evaluate(
    wrapped: nn.Module, held_out: dict[str, Examples], deal: Deal, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Judge a model by held-out sets; every worker must call it.

    Args:
        wrapped: A ResponseLoss, or what shares it among workers.
        held_out: The sets, by name.
        deal: Puts rows, of which it gets the lengths, into packs for each worker.
        dtype: Of matrix products.

    Returns:
        Of each set: `loss` in nats a token of its answers, and `exact_match`, the share of rows
        whose answer is the most likely one token by token. That is what greedy decoding would give,
        so no text has to be generated to know.
    """
    dropping = [module for module in wrapped.modules() if module.training]  # adapters' dropout
    for module in dropping:
        module.training = False
    found = {name: _evaluate(wrapped, rows, deal, dtype) for name, rows in held_out.items()}
    for module in dropping:
        module.training = True
    return found


def _evaluate(
    wrapped: nn.Module, examples: Examples, deal: Deal, dtype: torch.dtype
) -> dict[str, float]:
    dealt = deal(examples.lengths.tolist())
    sums = torch.zeros(2, dtype=torch.float64)
    for pack in dealt[rank()]:
        found = forward_pack(wrapped, examples, pack or [0], dtype, whole=False).double().cpu()
        if not pack:  # it only joined in
            continue
        counts = [int(examples.targets[examples.span(row)].sum()) for row in pack]
        sums[0] += found[0].sum()
        sums[1] += sum(bool(hits.all()) for hits in found[1].split(counts))
    sums = sum_over_workers(sums.to(next(wrapped.parameters()).device))
    return {
        "loss": float(sums[0]) / examples.num_targets,
        "exact_match": float(sums[1]) / len(examples),
    }
