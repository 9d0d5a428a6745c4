"""Packing: sequences laid end to end under a token budget, what they have in common only once.

::

    sequences   "Translate: cat"   "Translate: dog"   "Hello"
    pack        [Translate: |cat|dog|Hello]
    parent       -           0   0   -            stretch that comes before it
    position     0 1         2   2   0

Only attention has to know of parents (see attention.py).
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakValueDictionary

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
    windows: set[int | None] = field(default_factory=set, repr=False)
    """Sliding windows that layers have asked of its attention."""
    _on_device: dict[torch.device, "PackTensors"] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Give it a handle: int64 (1,), what stands for it where only tensors go."""
        number = next(_numbers)
        self.handle = torch.tensor([number], device="cpu")  # no field: FSDP copies those
        _packs[number] = self

    @staticmethod
    def of_handle(handle: Tensor) -> "Pack":
        """The pack whose handle it is."""
        return _packs[int(handle)]

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
        return ranges(self.prefix_lengths, self.lengths)

    def places(
        self, stretch_S: npt.NDArray[np.int64], position_S: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Where in the pack are the tokens at these positions of the stretches' sequences."""
        starts, past = np.array(self.starts), np.array(self.prefix_lengths)
        own_S = (starts[:-1] - past)[stretch_S]
        parent_S = starts[np.array(self._parents)][stretch_S]  # without a parent, never asked for
        shift_S: npt.NDArray[np.int64] = np.where(position_S < past[stretch_S], parent_S, own_S)
        return position_S + shift_S

    @property
    def key_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens that each stretch attends to, at most: those before it, and its own."""
        return np.add(self.lengths, self.prefix_lengths)

    def keys(self) -> npt.NDArray[np.int64]:
        """Where they lie in the pack, of one stretch after the other."""
        lengths = self.key_lengths
        stretch = np.repeat(np.arange(len(lengths)), lengths)
        return self.places(stretch, ranges(np.zeros_like(lengths), lengths))

    def on(self, device: torch.device) -> "PackTensors":
        """What attention kernels of a device need; made once."""
        if device not in self._on_device:
            self._on_device[device] = self._tensors(device)
        return self._on_device[device]

    @property
    def _parents(self) -> tuple[int, ...]:
        return self.parents or (-1,) * len(self.lengths)

    def _tensors(self, device: torch.device) -> "PackTensors":
        key_lengths = self.key_lengths
        keys = to_device(self.keys(), device) if any(self.prefix_lengths) else None
        return PackTensors(
            to_device(np.array(self.starts, np.int32), device),
            to_device(np.cumsum([0, *key_lengths], dtype=np.int32), device),
            max(self.lengths),
            int(max(key_lengths)),
            keys,
        )


_numbers = itertools.count()
_packs: WeakValueDictionary[int, Pack] = WeakValueDictionary()


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
    num_shared: int
    """Stretches that several sequences begin with; behind them comes one of each sequence."""

    def places(
        self, sequence_S: npt.NDArray[np.int64], token_S: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Where in the pack these tokens of the sequences lie."""
        return self.pack.places(sequence_S + self.num_shared, token_S)

    def places_of_each(self) -> list[npt.NDArray[np.int64]]:
        """Of each sequence, where its tokens lie."""
        ends = np.cumsum(self.pack.key_lengths)
        return np.split(self.pack.keys(), ends[:-1])[self.num_shared :]


def lay_out(sequences: Sequence[TokenIds], prefixes: Sequence[Prefix | None]) -> Laid:
    """Lay sequences end to end: the prefixes that several of them have, then the rest of each."""
    counts = Counter(prefixes)
    shared: dict[Prefix | None, int] = {}  # the stretch of each
    stretches: list[TokenIds] = []
    for ids, prefix in zip(sequences, prefixes, strict=True):
        if prefix is not None and counts[prefix] > 1 and prefix not in shared:
            shared[prefix] = len(stretches)
            stretches.append(ids[: prefix.length])
    num_shared = len(stretches)
    parents = [-1] * num_shared + [shared.get(prefix, -1) for prefix in prefixes]
    for ids, parent in zip(sequences, parents[num_shared:], strict=True):
        stretches.append(ids if parent < 0 else ids[len(stretches[parent]) :])
    pack = Pack(tuple(map(len, stretches)), tuple(parents))
    return Laid(pack, np.concatenate(stretches), num_shared)


Integers = npt.NDArray[np.int64] | Sequence[int]


def ranges(starts: Integers, lengths: Integers) -> npt.NDArray[np.int64]:
    """So many numbers from each start on, one after the other.

    Example:
        `ranges([5, 0], [2, 3]) -> [5, 6, 0, 1, 2]`
    """
    ends = np.cumsum(lengths)
    shifts: npt.NDArray[np.int64] = np.repeat(np.asarray(starts) - ends + lengths, lengths)
    return np.arange(len(shifts)) + shifts


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

    # By the longest of those under one prefix, by prefix, by length; equal ones as they come.
    keys = [
        [-length for length in lengths],
        [0 if prefix is None else prefix.length for prefix in prefixes],
        [-1 if prefix is None else prefix.owner for prefix in prefixes],
        [-longest[prefix] for prefix in prefixes],
    ]
    packs: list[list[int]] = []
    room = 0
    held: set[Prefix] = set()
    for index in np.lexsort(np.array(keys)).tolist():  # the last key is the first
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
