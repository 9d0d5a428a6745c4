"""The scoring engine: a resident language model, packs in, nats out. Torch only, no Ray.

Sequences of a pack lie end to end (see packing.py), position ids restart at each, and only the
hidden states that predict a scored token meet the vocabulary projection::

    ids         [p p p r r|r' r']           p prompt, r response; the direct pass is r' r'
    positions   [0 1 2 3 4|0  1 ]
    hidden at    . . x x .|x  .             x predicts a scored token: the causal shift
    target           r r   r'

Equal sequences are computed once, and so is what the sequences of a pack begin with in common.

On load, probe sequences are scored in a pack and by transformers' own eager attention. An
architecture that disagrees is scored in padded batches through its own attention instead.
"""

import itertools
import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.compiled import Compiled
from pipeline.devices import auto_batch_tokens, from_device, mark, to_device
from pipeline.forward import (
    hidden_packed,
    keep_float32_between_layers,
    longest_together,
    run_padded,
)
from pipeline.packing import Laid, costs, lay_out, plan_packs, plan_padded, ranges
from pipeline.probe import find_way
from pipeline.projection import Projection
from pipeline.sharing import SHARES, Prefix, Share, TokenIds, find_equal, find_prefixes

log = logging.getLogger("cherry")

_PASSES_AHEAD = 4
"""Passes that a GPU is given before the first is waited for. Each keeps its losses only: what a
pass needs besides is free for the next one, in the order of the device's stream."""

_PART_TOKENS = 1 << 19
"""Tokens for which prefixes and packs are planned at once: a fraction of a second of a GPU's work,
which waits while the first of them are planned, and not for those that follow."""


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


class _Running(NamedTuple):
    """A pass that the device may still be at."""

    sequences: list[TokenSequence]
    nll_S: Tensor = torch.zeros(0)
    """Losses of the tokens that are scored, each once, on their way to the CPU."""
    of_each: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    """Which of them each token of each span has, in the order of spans."""
    mean_BM: Tensor | None = None
    """Mean last hidden state of each sequence, likewise."""
    arrived: Sequence[torch.cuda.Event | None] = ()
    """When both are there."""
    error: str | None = None
    """Or the exception that kept it from running."""


class Engine:
    """A causal language model that turns sequences into per-span sums of nats."""

    def __init__(
        self,
        model: Any,
        max_batch_tokens: int | Literal["auto"] = "auto",
        max_length: int | None = None,
        share: Collection[Share] = SHARES,
        compiled: Compiled = "auto",
        device_share: float = 1.0,
    ) -> None:
        """Take a loaded model in its final dtype and device, and probe it.

        Args:
            model: A transformers causal LM.
            max_batch_tokens: Budget of a pack.
            max_length: Longest sequence that will come, in tokens; None is the model's positions.
            share: Work to do once for several; scores agree within rounding.
            compiled: As `compile_layers`.
            device_share: How much of the device is this engine's, where several share it.
        """
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        config = model.config.get_text_config()
        if max_batch_tokens == "auto":
            weights = sum(p.nbytes for p in model.parameters() if p.device == self.device)
            max_batch_tokens = auto_batch_tokens(
                self.device, self.dtype, config, weights, device_share
            )
        self.max_batch_tokens = max_batch_tokens
        self._longest_together = longest_together(config)
        self._vocab_size = int(config.vocab_size)
        self._num_embeddings = int(model.get_input_embeddings().num_embeddings)
        keep_float32_between_layers(model)
        way = find_way(model, max_length, sharing="prefixes" in share, compiled=compiled)
        self.mode: Literal["packed", "padded"] = "packed" if way.packed else "padded"
        self._together = way.together
        self.share = set(share) if way.packed else set(share) - {"prefixes"}
        self.compiled = way.compiled
        self._projection = Projection(model, way.compiled)

    @torch.inference_mode()
    def score(
        self, sequences: Sequence[TokenSequence], *, hidden: bool = False
    ) -> list[SequenceLoss]:
        """Sum the loss over each span of each sequence.

        A pack that raises is halved and tried again; a sequence that raises alone comes back with
        the exception's class as its error, and so does one with a token that the model lacks, which
        on a GPU would break the device for all that follow. Results do not depend on the order of
        `sequences`, beyond rounding.

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
        results: dict[int, SequenceLoss] = {}
        same_as = list(range(len(sequences)))
        if "equal" in self.share:
            same_as = find_equal([s.input_ids for s in sequences], [s.spans for s in sequences])
        known = sorted(set(same_as))
        for at in _find_lacking([sequences[i].input_ids for i in known], self._num_embeddings):
            results[known[at]] = SequenceLoss(error="UnknownToken")
        known = [index for index in known if index not in results]
        parts = _split(known, [len(sequences[i].input_ids) for i in known])
        passes = itertools.chain.from_iterable(
            self._passes(part, [sequences[i] for i in part], hidden) for part in parts
        )
        # The device is at passes while more are laid out and those before are added up.
        for pack, running in _ahead(passes):
            results.update(zip(pack, _finish(running), strict=True))
        return [results[index] for index in same_as]

    def _passes(
        self, names: list[int], sequences: list[TokenSequence], hidden: bool
    ) -> Iterator[tuple[list[int], _Running]]:
        """Start one pass after the other; yields the names of its sequences with each."""
        ids = [sequence.input_ids for sequence in sequences]
        prefixes: list[Prefix | None] = [None] * len(ids)
        if "prefixes" in self.share:
            prefixes = find_prefixes(ids)
        packs = self._plan([len(each) for each in ids], prefixes)[::-1]
        while packs:
            pack = packs.pop()
            chosen = [sequences[i] for i in pack]
            try:
                laid = lay_out([ids[i] for i in pack], [prefixes[i] for i in pack])
                yield [names[i] for i in pack], self._start(laid, chosen, hidden)
                continue
            except torch.AcceleratorError:
                raise
            except (RuntimeError, IndexError, ValueError, MemoryError) as err:
                # OutOfMemoryError is a RuntimeError; the rest is one sequence spoiling its pack.
                failure, message = type(err).__name__, str(err)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if failure == "OutOfMemoryError":
                log.warning(
                    "a pack of %d tokens does not fit the memory; a lower score.max_batch_tokens "
                    "(here %d) saves trying: %s",
                    sum(len(ids[i]) for i in pack),
                    self.max_batch_tokens,
                    message,
                )
            if len(pack) == 1:
                log.warning("a sequence of %d tokens failed: %s", len(ids[pack[0]]), message)
                yield [names[pack[0]]], _Running(chosen, error=failure)
            else:
                middle = len(pack) // 2
                packs += [pack[middle:], pack[:middle]]

    def _plan(self, lengths: list[int], prefixes: list[Prefix | None]) -> list[list[int]]:
        budget = self.max_batch_tokens
        if not self._together:
            return [[index] for index in range(len(lengths))]
        if self.mode == "padded":  # whole float32 logits of at most 1 GiB
            budget = min(budget, 2**30 // (4 * self._vocab_size))
            return plan_padded(costs(lengths, budget, self._longest_together), budget)
        return plan_packs(costs(lengths, budget, self._longest_together), budget, prefixes)

    # T=tokens of the pack, S=scored tokens, N=those of all spans, B=sequences, M=hidden size,
    # V=vocabulary
    def _start(self, laid: Laid, sequences: list[TokenSequence], hidden: bool) -> _Running:
        """Send a pack through the model, without waiting for what comes out."""
        of_span = [at for at, sequence in enumerate(sequences) for _ in sequence.spans]
        if not of_span:
            return _Running(sequences)
        start, end = np.array([span for sequence in sequences for span in sequence.spans]).T
        sequence_N, token_N = np.repeat(of_span, end - start), ranges(start, end - start)
        target_N = laid.places(sequence_N, token_N)
        # A token of a prefix, scored for several sequences, meets the vocabulary once.
        before_T = np.full(len(laid.ids_T), -1)  # of a token that is not scored
        # The causal shift happens here only: the state at t - 1 predicts token t.
        before_T[target_N] = laid.places(sequence_N, token_N - 1)
        scored_T = before_T >= 0
        of_each = (np.cumsum(scored_T) - 1)[target_N]
        before_S, target_S = before_T[scored_T], laid.ids_T[scored_T]
        ids_T = to_device(laid.ids_T, self.device).long()
        if self.mode == "padded":
            lengths = list(laid.pack.lengths)
            logits_TV, states_TM = run_padded(self.model, lengths, ids_T, hidden=hidden)
            logits_SV = logits_TV[to_device(before_S, logits_TV.device)].float()
            targets = to_device(target_S, logits_TV.device).long()
            nll_S = F.cross_entropy(logits_SV, targets, reduction="none")
        else:
            states_TM = hidden_packed(self.model, laid.pack, ids_T, self.compiled)
            hidden_SM = states_TM[to_device(before_S, states_TM.device)]
            targets = to_device(target_S, states_TM.device).long()
            nll_S = self._projection.nll(hidden_SM, targets)
        arrived = [nll_S.device]
        mean_BM = None
        if hidden and states_TM is not None:
            each = laid.places_of_each()
            places = to_device(np.concatenate(each), states_TM.device).split(list(map(len, each)))
            mean_BM = from_device(torch.stack([states_TM[at].float().mean(0) for at in places]))
            arrived.append(states_TM.device)  # of a model spread over several
        nll_S = from_device(nll_S)
        return _Running(sequences, nll_S, of_each, mean_BM, [mark(each) for each in arrived])


def _finish(running: _Running) -> list[SequenceLoss]:
    """Wait for a pass, and add up the losses of each span."""
    if running.error:
        return [SequenceLoss(error=running.error) for _ in running.sequences]
    for event in running.arrived:
        if event:
            event.synchronize()
    counts = [end - start for sequence in running.sequences for start, end in sequence.spans]
    sums = iter(())
    if counts:
        # float64 sums: a span's sum does not depend on its neighbours.
        nll_S = running.nll_S.numpy().astype(np.float64)[running.of_each]
        sums = iter(np.add.reduceat(nll_S, np.cumsum([0, *counts[:-1]])).tolist())
    means = running.mean_BM.numpy() if running.mean_BM is not None else None
    return [
        SequenceLoss(
            tuple(next(sums) for _ in sequence.spans),
            None if means is None else means[at].copy(),  # or each would keep them all
        )
        for at, sequence in enumerate(running.sequences)
    ]


def _find_lacking(sequences: list[TokenIds], num_embeddings: int) -> set[int]:
    """Those with a token that a model has no embedding for."""
    ids = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
    ends = np.cumsum([len(each) for each in sequences])
    return set(np.searchsorted(ends, np.flatnonzero(ids >= num_embeddings), "right").tolist())


T = TypeVar("T")


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each handed over when some more are made."""
    waiting = deque(itertools.islice(items, _PASSES_AHEAD))
    for item in items:
        yield waiting.popleft()
        waiting.append(item)
    yield from waiting


def _split(items: list[T], sizes: list[int]) -> Iterator[list[T]]:
    """Neighbours together whose sizes are `_PART_TOKENS` or a little more."""
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(items):
        before = ends[begin - 1] if begin else 0
        end = int(np.searchsorted(ends, before + _PART_TOKENS)) + 1
        yield items[begin:end]
        begin = end
