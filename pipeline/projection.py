"""The vocabulary projection: from hidden states to losses, a chunk of the vocabulary at a time.

Logits are float32 from the product on, and those of a whole pack never exist at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_TILES = {"cpu": (1024, 2048), "cuda": (8192, 8192)}
"""Scored tokens and vocabulary entries projected at once. 8 MB of float32 stay in a CPU's cache;
on a GPU it is 256 MiB, and some of these at once, whatever the vocabulary."""


# S=scored tokens, M=hidden size, V=vocabulary, C=chunk of it
class Projection:
    """A model's output embeddings, and what its architecture does to logits after them."""

    def __init__(self, model: Any) -> None:
        """Take the head of a transformers causal LM."""
        self._head = model.get_output_embeddings()
        self._transform = logit_transform(model.config.get_text_config())

    def nll(self, hidden_SM: Tensor, targets_S: Tensor) -> Tensor:
        """Negative log-likelihood of the targets, in nats, float32.

        Streams over the vocabulary: a running log-sum-exp, and each target's logit picked from
        the chunk that holds it.
        """
        targets_S = targets_S.to(self._head.weight.device)
        rows, _ = _tile(hidden_SM)
        pieces = zip(hidden_SM.split(rows), targets_S.split(rows), strict=True)
        return torch.cat([self._nll(hidden, targets) for hidden, targets in pieces])

    def _nll(self, hidden_SM: Tensor, targets_S: Tensor) -> Tensor:
        total_S = torch.full_like(targets_S, -torch.inf, dtype=torch.float32)
        picked_S = torch.zeros_like(total_S)
        for begin, logits_SC in self.chunks(hidden_SM):
            inside = (targets_S >= begin) & (targets_S < begin + logits_SC.shape[1])
            local = torch.where(inside, targets_S - begin, 0)
            found = logits_SC.gather(1, local.unsqueeze(1)).squeeze(1)
            picked_S = torch.where(inside, found, picked_S)
            total_S = torch.logaddexp(total_S, torch.logsumexp(logits_SC, dim=-1))
        return total_S - picked_S

    def chunks(self, hidden_SM: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first vocabulary entry, float32 logits) of each chunk of the vocabulary."""
        weight_VM, bias_V = self._head.weight, getattr(self._head, "bias", None)
        hidden_SM = hidden_SM.to(weight_VM.device)  # a model may be spread over several
        # CUDA multiplies half precision with float32 accumulation and output; CPUs do not offer it.
        half_on_cuda = hidden_SM.is_cuda and weight_VM.dtype != torch.float32
        hidden_SM = hidden_SM if half_on_cuda else hidden_SM.float()
        _, chunk = _tile(hidden_SM)
        for begin in range(0, weight_VM.shape[0], chunk):
            chunk_CM = weight_VM[begin : begin + chunk]
            if half_on_cuda:
                logits_SC = torch.mm(hidden_SM, chunk_CM.T, out_dtype=torch.float32)
            else:
                logits_SC = hidden_SM @ chunk_CM.float().T
            if bias_V is not None:
                logits_SC = logits_SC + bias_V[begin : begin + chunk].float()
            yield begin, self._transform(logits_SC)


def _tile(hidden_SM: Tensor) -> tuple[int, int]:
    return _TILES["cuda" if hidden_SM.is_cuda else "cpu"]


def logit_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What an architecture does to its logits after the projection: scales and soft-caps.

    Whatever is not known here shows in the probe.
    """
    multiply = getattr(config, "logit_scale", None)  # Cohere
    divide = getattr(config, "logits_scaling", None)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma

    def transform(logits: Tensor) -> Tensor:
        if multiply is not None:
            logits = logits * multiply
        if divide is not None:
            logits = logits / divide
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits

    return transform
