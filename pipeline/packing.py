"""Packing: sequences laid end to end under a token budget, what they have in common only once.

::

    sequences   "Translate: cat"   "Translate: dog"   "Hello"
    pack        [Translate: |cat|dog|Hello]
    parent       -           0   0   -            stretch that comes before it
    position     0 1         2   2   0

Only attention has to know of parents (see attention.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.devices import to_device
from pipeline.sharing import Prefix, TokenIds

_KEY_COST = 8
"""Tokens of a prefix, per sequence that has it, that need as much memory as one token computed:
their keys and values are copied to each, all other activations exist once."""


@dataclass(eq=False)  # frozen, PyTorch 2.11 compiled layers anew for each pack
class Pack:
    """Stretches of tokens that lie end to end in one forward pass; none of them is ever changed."""

    lengths: tuple[int, ...]
    """Tokens of each stretch."""
    parents: tuple[int, ...] = ()
    """Of each stretch, the one that its sequence begins with, which lies before it and has no
    parent itself; or -1. Empty: all are -1."""
    windows: set[int | None] = field(default_factory=set, compare=False, repr=False)
    """Sliding windows that layers have asked of its attention."""
    _on_device: dict[torch.device, "PackTensors"] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        """Tokens that come before each stretch."""
        return tuple(0 if p < 0 else self.lengths[p] for p in self._parents)

    @property
    def starts(self) -> tuple[int, ...]:
        """Of the stretches in the pack, and its end."""
        return tuple(np.cumsum([0, *self.lengths]).tolist())

    @property
    def stretches(self) -> list[tuple[int, int, int]]:
        """Start, length and parent of each."""
        return list(zip(self.starts, self.lengths, self._parents, strict=False))

    def positions(self) -> npt.NDArray[np.int64]:
        """Of each token in its sequence, (T,)."""
        before = zip(self.lengths, self.prefix_lengths, strict=True)
        return np.concatenate([np.arange(past, past + n) for n, past in before])

    def on(self, device: torch.device) -> "PackTensors":
        """What attention kernels of a device need; made once."""
        if device not in self._on_device:
            self._on_device[device] = self._tensors(device)
        return self._on_device[device]

    @property
    def _parents(self) -> tuple[int, ...]:
        return self.parents or (-1,) * len(self.lengths)

    def _tensors(self, device: torch.device) -> "PackTensors":
        key_lengths = np.add(self.lengths, self.prefix_lengths)
        starts = self.starts
        keys = None
        if any(self.prefix_lengths):
            places = []
            for start, length, parent in self.stretches:
                if parent >= 0:
                    places.append(np.arange(starts[parent], starts[parent + 1]))
                places.append(np.arange(start, start + length))
            keys = to_device(np.concatenate(places), device)
        return PackTensors(
            to_device(np.array(starts, np.int32), device),
            to_device(np.cumsum([0, *key_lengths], dtype=np.int32), device),
            max(self.lengths),
            int(max(key_lengths)),
            keys,
        )


class PackTensors(NamedTuple):
    """A pack as attention of variable lengths takes it."""

    query_bounds: Tensor
    """int32 (stretches + 1,)"""
    key_bounds: Tensor
    """int32 (stretches + 1,), over keys in which each stretch follows its parent."""
    longest_query: int
    longest_key: int
    keys: Tensor | None
    """Places in the pack of these keys, int64; None: all of them, as they lie."""


class Laid(NamedTuple):
    """Sequences as a pack."""

    pack: Pack
    ids_T: npt.NDArray[np.int32]
    """Tokens of the pack."""
    places: list[npt.NDArray[np.int64]]
    """Of each sequence, where its tokens lie in the pack."""


def lay_out(sequences: Sequence[TokenIds], prefixes: Sequence[Prefix | None]) -> Laid:
    """Lay sequences end to end: the prefixes that several of them have, then the rest of each."""
    counts: dict[Prefix, int] = {}
    for prefix in prefixes:
        if prefix is not None:
            counts[prefix] = counts.get(prefix, 0) + 1
    shared: dict[Prefix, int] = {}  # the stretch of each
    stretches: list[TokenIds] = []
    for ids, prefix in zip(sequences, prefixes, strict=True):
        if prefix is not None and counts[prefix] > 1 and prefix not in shared:
            shared[prefix] = len(stretches)
            stretches.append(ids[: prefix.length])
    parents = [-1] * len(stretches)
    starts = np.cumsum([0, *map(len, stretches)]).tolist()
    end = starts[-1]
    places = []
    for ids, prefix in zip(sequences, prefixes, strict=True):
        parent = -1 if prefix is None else shared.get(prefix, -1)
        length = 0 if parent < 0 else len(stretches[parent])
        own = np.arange(end, end + len(ids) - length)
        before = own[:0] if parent < 0 else np.arange(starts[parent], starts[parent] + length)
        places.append(np.concatenate([before, own]))
        parents.append(parent)
        stretches.append(ids[length:])
        end += len(own)
    pack = Pack(tuple(map(len, stretches)), tuple(parents))
    return Laid(pack, np.concatenate(stretches), places)


def costs(lengths: Sequence[int], max_batch_tokens: int, longest_together: int) -> list[int]:
    """What each sequence takes of a pack: its tokens, or all if it is too long to share a pass.

    Example:
        `costs([3, 9], 64, 8) -> [3, 64]`
    """
    return [max(n, max_batch_tokens) if n > longest_together else n for n in lengths]


def plan_padded(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group sequences into batches of at most `max_batch_tokens` tokens, padding included.

    Args:
        lengths: Tokens of each sequence.
        max_batch_tokens: Of a batch: its longest sequence times their number.

    Returns:
        Batches of indices into `lengths`, longest first; together a partition of all of them. A
        sequence over the budget is a batch of its own.

    Example:
        `plan_padded([3, 5, 4], 8) -> [[1], [2, 0]]`
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def plan_packs(
    lengths: Sequence[int],
    max_batch_tokens: int,
    prefixes: Sequence[Prefix | None] | None = None,
) -> list[list[int]]:
    """Group sequences into packs of at most `max_batch_tokens` tokens.

    Those of one prefix stay together, and longest come first, so that a pack's sequences are of
    like length and the largest pack, which decides whether memory suffices, comes first. A sequence
    over the budget is a pack of its own. The order depends on the arguments alone.

    Args:
        lengths: Tokens of each sequence.
        max_batch_tokens: Budget of a pack, in tokens; a prefix counts once.
        prefixes: What sequences have in common.

    Returns:
        Packs of indices into `lengths`; together a partition of all of them.

    Example:
        `plan_packs([3, 5, 4], 8) -> [[1], [2, 0]]`
    """
    prefixes = prefixes or [None] * len(lengths)
    longest: dict[Prefix | None, int] = {}
    for prefix, length in zip(prefixes, lengths, strict=True):
        longest[prefix] = max(length, longest.get(prefix, 0))

    def order(index: int) -> tuple[int, Prefix, int, int]:
        prefix = prefixes[index]
        return -longest[prefix], prefix or Prefix(-1, 0), -lengths[index], index

    packs: list[list[int]] = []
    room = 0
    held: set[Prefix] = set()
    for index in sorted(range(len(lengths)), key=order):
        prefix = prefixes[index]
        own = again = lengths[index]
        if prefix is not None:
            own += prefix.length // _KEY_COST - prefix.length * (prefix in held)
            again += prefix.length // _KEY_COST
        if not packs or own > room:
            packs.append([])
            room, held, own = max_batch_tokens, set(), again
        packs[-1].append(index)
        room -= own
        if prefix is not None:
            held.add(prefix)
    return packs
