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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.attention import PACKED, register
from pipeline.packing import plan_packs
from pipeline.projection import VOCABULARY_CHUNK, Projection

log = logging.getLogger("cherry")

# What rounding alone explains, per dtype. First, the mean absolute difference in nats per token
# between packed and eager attention at the end of a probe: 1e-7, 0.009 and 0.07 on SmolLM2-135M,
# where a soft-cap or window that is ignored gives 0.1 to 5. Second, the largest relative
# difference of a logit: 0.0, 5e-4 and 4e-3 there.
_ATTENTION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

# malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD, in bytes.
_MALLOC_OPTIONS = {-1: 2**31 - 1, -2: 2**26, -3: 2**30}

_PROBE_LENGTHS = (33, 64, 47)
_PROBE_TAIL = 32
"""Tokens compared at the end of each probe, where a window would have slid furthest."""


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
        register()
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
        if fault := self._probe(config, max_length):
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
        if hidden:
            means = [h_TM.float().mean(0).cpu().numpy() for h_TM in hidden_TM.split(lengths)]
        return [
            SequenceLoss(tuple(next(values) for _ in s.spans), mean)
            for s, mean in zip(sequences, means, strict=True)
        ]

    # T=tokens of the pack, S=scored tokens, M=hidden size, V=vocabulary
    def _forward(
        self, lengths: list[int], ids_T: Tensor, position_S: Tensor, hidden: bool
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states, and the loss of the tokens at `position_S`, in nats, float32.

        In padded batches an empty tensor stands for the states unless `hidden` asks for them: to
        give them, transformers keeps those of every layer.
        """
        targets_S = ids_T[position_S].to(self.device)
        if self.mode == "padded":
            return self._forward_padded(lengths, ids_T, position_S, targets_S, hidden)
        hidden_TM = hidden_packed(self.model, lengths, ids_T)
        # The causal shift happens here only: the state at t - 1 predicts token t.
        hidden_SM = hidden_TM[position_S.to(self.device) - 1]
        return hidden_TM, self._projection.nll(hidden_SM, targets_S)

    def _forward_padded(
        self,
        lengths: list[int],
        ids_T: Tensor,
        position_S: Tensor,
        targets_S: Tensor,
        hidden: bool,
    ) -> tuple[Tensor, Tensor]:
        """The slow, sure way: right-padded, the model's own eager attention and its own logits."""
        rows = torch.split(ids_T, lengths)
        ids_BL = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        mask_BL = torch.arange(ids_BL.shape[1]) < torch.tensor(lengths)[:, None]
        with attention(self.model, "eager"):
            output = self.model(
                input_ids=ids_BL.to(self.device),
                attention_mask=mask_BL.long().to(self.device),
                use_cache=False,
                output_hidden_states=hidden,
            )
        mask_BL = mask_BL.to(self.device)
        hidden_TM = output.hidden_states[-1][mask_BL] if hidden else torch.empty(0)
        logits_SV = output.logits[mask_BL][position_S.to(self.device) - 1].float()
        return hidden_TM, F.cross_entropy(logits_SV, targets_S, reduction="none")

    @torch.inference_mode()
    def _probe(self, config: Any, max_length: int | None) -> str | None:
        """Score probes in a pack and the model's own way; says what differs beyond rounding."""
        positions = int(getattr(config, "max_position_embeddings", None) or 2**31)
        limit = min(positions, max_length or positions)
        window = _longest_window(config)
        longest = [2 * window] if window and window < limit else []  # else no window ever slides
        lengths = [min(n, limit) for n in (*_PROBE_LENGTHS, *longest)]
        generator = torch.Generator().manual_seed(0)
        probes = [torch.randint(self._vocab_size, (n,), generator=generator) for n in lengths]
        try:
            hidden_TM = hidden_packed(self.model, lengths, torch.cat(probes))
            attention_error, logit_error = self._compare(probes, hidden_TM.split(lengths))
        except (RuntimeError, TypeError, ValueError, AttributeError) as err:
            return f"cannot be scored in packs: {err}"
        if not attention_error <= _ATTENTION_TOLERANCE[self.dtype]:
            return f"packed attention is off by {attention_error:.2g} nats per token"
        if not logit_error <= _LOGIT_TOLERANCE[self.dtype]:
            return f"its logits are not a plain projection (off by {100 * logit_error:.2g} %)"
        return None

    def _compare(self, probes: list[Tensor], packed: tuple[Tensor, ...]) -> tuple[float, float]:
        """Mean error of packed attention in nats, and largest relative error of a logit."""
        differences, logit_errors = [], []
        for ids_T, packed_TM in zip(probes, packed, strict=True):
            inputs = {"input_ids": ids_T.unsqueeze(0).to(self.device), "use_cache": False}
            with attention(self.model, "eager"):
                own_TM = self.model.base_model(**inputs).last_hidden_state[0]
                own_TV = self.model(**inputs).logits[0].float()
            targets_S = ids_T[1:][-_PROBE_TAIL:].to(self.device)
            tail = slice(-1 - len(targets_S), -1)  # the states that predict the targets
            error_S = self._projection.nll(packed_TM[tail], targets_S) - self._projection.nll(
                own_TM[tail], targets_S
            )
            differences.append(error_S.abs().mean())
            ours_TV = torch.cat([logits for _, logits in self._projection.chunks(own_TM)], dim=1)
            logit_errors.append(((ours_TV - own_TV).abs() / (1 + own_TV.abs())).max())
        return float(torch.stack(differences).max()), float(torch.stack(logit_errors).max())


def hidden_packed(model: Any, lengths: list[int], ids_T: Tensor) -> Tensor:
    """Last hidden states of a pack of sequences that lie end to end, shape (T, M)."""
    device = model.device
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    with attention(model, PACKED):
        output = model.base_model(
            input_ids=ids_T.unsqueeze(0).to(device),
            position_ids=positions_T.unsqueeze(0).to(device),
            use_cache=False,
            cu_seq_lens_q=bounds.to(device),
            max_length_q=max(lengths),
        )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def _longest_window(config: Any) -> int | None:
    """Longest attention window or chunk that any layer has, in tokens."""
    names = ("sliding_window", "attention_chunk_size", "window_size")
    found = [w for name in names if isinstance(w := getattr(config, name, None), int)]
    return max(found, default=None)


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """Run the model under one attention implementation."""
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)
    yield
