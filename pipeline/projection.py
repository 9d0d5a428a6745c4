"""The vocabulary projection: from hidden states to losses, a chunk of the vocabulary at a time.

Logits are float32 from the product on, and those of a whole pack never exist at once; where there
are kernels they are not even written (projection_kernel.py, cpu_kernels.py).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import cpu_kernels
from pipeline.devices import fast_float32, products_by_onednn, tokens_to_fill_up

_TILES = {"cpu": (1024, 2048), "cuda": (8192, 8192)}
"""Scored tokens and vocabulary entries projected at once. 8 MB of float32 stay in a CPU's cache;
on a GPU, where the kernel does not do it, 256 MiB and some of these at once, whatever the
vocabulary."""


# S=scored tokens, M=hidden size, V=vocabulary, C=chunk of it
class Projection:
    """A model's output embeddings, and what its architecture does to logits after them."""

    def __init__(self, model: Any, compiled: bool = False) -> None:
        """Take the head of a transformers causal LM, and whether kernels can be compiled."""
        self._compiled = compiled
        self._head = model.get_output_embeddings()
        self._transform = logit_transform(model.config.get_text_config())

    def nll(self, hidden_SM: Tensor, targets_S: Tensor) -> Tensor:
        """Negative log-likelihood of the targets, in nats, float32.

        Streams over the vocabulary: a running log-sum-exp, and each target's logit picked from
        the chunk that holds it.
        """
        weight_VM = self._head.weight
        targets_S = targets_S.to(weight_VM.device)
        # A model may be spread over several devices, and float32 between its layers.
        hidden_SM = hidden_SM.to(weight_VM)
        if kernel := self._kernel():
            bias_V = getattr(self._head, "bias", None)
            return kernel(hidden_SM, weight_VM, bias_V, targets_S, *self._transform)
        rows, _ = _tile(hidden_SM)
        missing = tokens_to_fill_up(len(targets_S), hidden_SM.device)
        hidden, targets = F.pad(hidden_SM, (0, 0, 0, missing)), F.pad(targets_S, (0, missing))
        pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([self._nll(*piece) for piece in pieces])[: len(targets_S)]

    def _kernel(self) -> Callable[..., Tensor] | None:
        """What makes losses without logits, where a device has it for these weights."""
        weight_VM = self._head.weight
        if not self._compiled or not weight_VM.is_contiguous():
            return None
        if weight_VM.is_cuda and weight_VM.dtype != torch.float32:
            from pipeline import projection_kernel  # needs Triton

            return projection_kernel.cross_entropy
        if weight_VM.device.type == "cpu" and cpu_kernels.takes_losses(weight_VM):
            return cpu_kernels.cross_entropy
        return None

    def _nll(self, hidden_SM: Tensor, targets_S: Tensor) -> Tensor:
        # Of the chunk that holds the target, its loss; of all others, their log-sum-exp. The loss
        # of a token that is all but certain would be lost in the rounding of two large logits.
        own_S = torch.zeros_like(targets_S, dtype=torch.float32)
        others_S = torch.full_like(own_S, -torch.inf)
        picked_S = torch.zeros_like(own_S)
        for begin, logits_SC in self.chunks(hidden_SM):
            inside = (targets_S >= begin) & (targets_S < begin + logits_SC.shape[1])
            local = torch.where(inside, targets_S - begin, 0)
            found = logits_SC.gather(1, local.unsqueeze(1)).squeeze(1)
            picked_S = torch.where(inside, found, picked_S)
            # logsumexp itself sweeps the logits several times.
            loss_S = F.cross_entropy(logits_SC, local, reduction="none")
            own_S = torch.where(inside, loss_S, own_S)
            chunk_S = torch.where(inside, -torch.inf, loss_S + found)
            others_S = torch.logaddexp(others_S, chunk_S)
        # -inf - -inf: of a target that cannot be, in a vocabulary of one chunk.
        beside_S = torch.where(others_S == -torch.inf, others_S, others_S - picked_S)
        return torch.logaddexp(own_S, beside_S)

    def chunks(self, hidden_SM: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first vocabulary entry, float32 logits) of each chunk of the vocabulary."""
        weight_VM, bias_V = self._head.weight, getattr(self._head, "bias", None)
        hidden_SM = hidden_SM.to(weight_VM)
        _, chunk = _tile(hidden_SM)
        for begin in range(0, weight_VM.shape[0], chunk):
            with torch.autocast(hidden_SM.device.type, enabled=False):
                logits_SC = _product(hidden_SM, weight_VM[begin : begin + chunk])
            if bias_V is not None:
                logits_SC = logits_SC + bias_V[begin : begin + chunk].float()
            yield begin, self._transform(logits_SC)


def _tile(hidden_SM: Tensor) -> tuple[int, int]:
    return _TILES["cuda" if hidden_SM.is_cuda else "cpu"]


def _product(hidden_SM: Tensor, chunk_CM: Tensor) -> Tensor:
    """Products of whatever precision, added up and given out in float32: shape (S, C)."""
    dtype = chunk_CM.dtype
    if hidden_SM.is_cuda and dtype != torch.float32:
        return torch.mm(hidden_SM, chunk_CM.T, out_dtype=torch.float32)
    # A CPU's bfloat16 product comes out rounded; that of bfloat16 values in float32 does not, and
    # oneDNN, which may round them to bfloat16, finds nothing to round.
    exact = dtype == torch.bfloat16
    with products_by_onednn() if exact else fast_float32(hidden_SM.device):
        return hidden_SM.float() @ chunk_CM.float().T


class LogitTransform(NamedTuple):
    """What an architecture does to its logits after the projection."""

    scale: float = 1.0
    softcap: float | None = None
    """Logits become `softcap * tanh(logit / softcap)`, after the scale."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Float32 logits of any shape."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def logit_transform(config: Any) -> LogitTransform:
    """The scale and soft-cap that a config names.

    Whatever is not known here shows in the probe.
    """
    multiply = getattr(config, "logit_scale", None)  # Cohere; MPT may have a name there
    divide = getattr(config, "logits_scaling", None)  # Granite
    scale = (multiply if isinstance(multiply, float | int) and multiply else 1.0) / (divide or 1.0)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
