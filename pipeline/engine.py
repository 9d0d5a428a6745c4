"""The scoring engine: a resident language model, packs in, nats out. Torch only, no Ray.

Sequences of a pack lie end to end (see attention.py), position ids restart at each, and only the
hidden states that predict a scored token meet the vocabulary projection::

    ids         [p p p r r|r' r']           p prompt, r response; the direct pass is r' r'
    positions   [0 1 2 3 4|0  1 ]
    hidden at    . . x x .|x  .             x predicts a scored token: the causal shift
    target           r r   r'

On load, probe sequences are scored in a pack and by transformers' own eager attention. An
architecture that disagrees is scored in padded batches through its own attention instead.
"""

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.forward import hidden_packed, run_padded
from pipeline.packing import plan_packs
from pipeline.probe import find_fault
from pipeline.projection import VOCABULARY_CHUNK, Projection

log = logging.getLogger("cherry")

# malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes.
_MALLOC_OPTIONS = {-1: 2**31 - 1, -2: 2**26, -3: 2**30}

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of one forward pass and the spans whose loss is wanted."""

    input_ids: TokenIds
    spans: tuple[tuple[int, int], ...]
    """Half-open token ranges; none may contain position 0, which nothing predicts."""


@dataclass(frozen=True)
class SequenceLoss:
    """What the engine says of one sequence."""

    nll_nats: tuple[float, ...] = ()
    """Sum over each span; empty if `error` is set."""
    mean_hidden_M: npt.NDArray[np.float32] | None = None
    """Mean of the last hidden states over all tokens, where it is asked for."""
    error: str | None = None
    """Class of the exception that this sequence alone raised."""


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it in hardware, float32 otherwise."""
    if device.type == "cuda":
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory() -> None:
    """Let glibc keep what a pack frees for the next pack, instead of handing it to the system.

    Activations of some megabytes are otherwise mapped, zeroed by page faults and unmapped again in
    every layer: SmolLM2-135M in bfloat16 on two cores scored 787 tokens/s without and 964 with.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; musl and macOS have their own ways
        for option, value in _MALLOC_OPTIONS.items():
            libc.mallopt(option, value)


def auto_batch_tokens(device: torch.device, config: Any) -> int:
    """Tokens of a pack, from the kind of device and the model's shape, never from timing.

    CPU: 4,096. CUDA: what fits a third of the device's memory, at most 65,536.
    """
    if device.type != "cuda":
        return 4096
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    # Two bytes each of residual, norms, query, key, value and output, and of both halves of a
    # gated MLP, plus a float32 chunk of logits and its softmax.
    bytes_per_token = 2 * (8 * hidden + 3 * inner) + 2 * 4 * VOCABULARY_CHUNK
    total = torch.cuda.get_device_properties(device).total_memory
    return int(min(65536, max(2048, total / 3 / bytes_per_token) // 1024 * 1024))


class Engine:
    """A causal language model that turns sequences into per-span sums of nats."""

    def __init__(
        self,
        model: Any,
        max_batch_tokens: int | Literal["auto"] = "auto",
        max_length: int | None = None,
    ) -> None:
        """Take a loaded model in its final dtype and device, and probe it.

        Args:
            model: A transformers causal LM.
            max_batch_tokens: Budget of a pack.
            max_length: Longest sequence that will come, in tokens; None is the model's positions.
        """
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        config = model.config.get_text_config()
        self.max_batch_tokens = (
            auto_batch_tokens(self.device, config) if max_batch_tokens == "auto"
            else max_batch_tokens
        )  # fmt: skip
        self._vocab_size = int(config.vocab_size)
        self._num_embeddings = int(model.get_input_embeddings().num_embeddings)
        self._projection = Projection(model)
        self.mode: Literal["packed", "padded"] = "packed"
        if fault := find_fault(model, max_length):
            log.warning(
                "%s: %s; scoring in padded batches through its own attention instead, which is "
                "slower",
                type(model).__name__,
                fault,
            )
            self.mode = "padded"

    @torch.inference_mode()
    def score(
        self, sequences: Sequence[TokenSequence], *, hidden: bool = False
    ) -> list[SequenceLoss]:
        """Sum the loss over each span of each sequence.

        A pack that raises is halved and tried again; a sequence that raises alone comes back with
        the exception's class as its error, and so does one with a token that the model lacks, which
        on a GPU would break the device for all that follow. Results do not depend on the order of
        `sequences`.

        Args:
            sequences: Any number, any lengths.
            hidden: Also give the mean of each sequence's last hidden states.

        Returns:
            One SequenceLoss per sequence, in order.

        Raises:
            ValueError: A span is empty, contains position 0 or reaches past its sequence.
            torch.AcceleratorError: The device is broken until the process ends.
        """
        for sequence in sequences:
            if any(not 0 < s < e <= len(sequence.input_ids) for s, e in sequence.spans):
                raise ValueError(f"spans {sequence.spans} over {len(sequence.input_ids)} tokens")
        results: list[SequenceLoss | None] = [None] * len(sequences)
        budget = self.max_batch_tokens
        if self.mode == "padded":  # whole float32 logits of at most 1 GiB
            budget = max(1, min(budget, 2**30 // (4 * self._vocab_size)))
        known = []
        for index, sequence in enumerate(sequences):
            if np.max(sequence.input_ids, initial=0) < self._num_embeddings:
                known.append(index)
            else:
                results[index] = SequenceLoss(error="UnknownToken")
        for pack in plan_packs([len(sequences[i].input_ids) for i in known], budget):
            self._score_pack(sequences, [known[i] for i in pack], results, hidden)
        return [result for result in results if result is not None]

    def _score_pack(
        self,
        sequences: Sequence[TokenSequence],
        pack: list[int],
        results: list[SequenceLoss | None],
        hidden: bool,
    ) -> None:
        chosen = [sequences[i] for i in pack]
        failure = None
        try:
            losses = self._losses(chosen, hidden)
        except torch.AcceleratorError:
            raise
        except (RuntimeError, IndexError, ValueError, MemoryError) as err:
            # OutOfMemoryError is a RuntimeError; the rest is one bad sequence spoiling its pack.
            failure = type(err).__name__
            message = str(err)
        if failure is None:
            for index, loss in zip(pack, losses, strict=True):
                results[index] = loss
            return
        if len(pack) == 1:
            log.warning("a sequence of %d tokens failed: %s", len(chosen[0].input_ids), message)
            results[pack[0]] = SequenceLoss(error=failure)
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(pack) // 2
        self._score_pack(sequences, pack[:middle], results, hidden)
        self._score_pack(sequences, pack[middle:], results, hidden)

    def _losses(self, sequences: list[TokenSequence], hidden: bool) -> list[SequenceLoss]:
        positions, owners = [], []
        offset = num_spans = 0
        for sequence in sequences:
            for start, end in sequence.spans:
                positions.append(torch.arange(offset + start, offset + end))
                owners.append(torch.full((end - start,), num_spans))
                num_spans += 1
            offset += len(sequence.input_ids)
        if not num_spans:
            return [SequenceLoss() for _ in sequences]
        ids_T = torch.from_numpy(np.concatenate([s.input_ids for s in sequences])).long()
        position_S = torch.cat(positions)
        lengths = [len(s.input_ids) for s in sequences]
        hidden_TM, nll_S = self._forward(lengths, ids_T, position_S, hidden)
        # float64 sums, in token order: a span's sum does not depend on its neighbours.
        sums = torch.zeros(num_spans, dtype=torch.float64)
        sums.index_add_(0, torch.cat(owners), nll_S.to("cpu", torch.float64))
        values = iter(sums.tolist())
        means: Sequence[Any] = [None] * len(sequences)
        if hidden and hidden_TM is not None:
            means = [h_TM.float().mean(0).cpu().numpy() for h_TM in hidden_TM.split(lengths)]
        return [
            SequenceLoss(tuple(next(values) for _ in s.spans), mean)
            for s, mean in zip(sequences, means, strict=True)
        ]

    # T=tokens of the pack, S=scored tokens, M=hidden size, V=vocabulary
    def _forward(
        self, lengths: list[int], ids_T: Tensor, position_S: Tensor, hidden: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Last hidden states if asked for, and the loss of the tokens at `position_S`, in nats."""
        targets_S = ids_T[position_S].to(self.device)
        # The causal shift happens here only: the state at t - 1 predicts token t.
        before_S = position_S.to(self.device) - 1
        if self.mode == "padded":
            logits_TV, states_TM = run_padded(self.model, lengths, ids_T, hidden=hidden)
            nll_S = F.cross_entropy(logits_TV[before_S].float(), targets_S, reduction="none")
            return states_TM, nll_S
        hidden_TM = hidden_packed(self.model, lengths, ids_T)
        return hidden_TM, self._projection.nll(hidden_TM[before_S], targets_S)
