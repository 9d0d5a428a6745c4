"""Attention of a pack in plain products: stretches of like length together, float32 scores.

For training, for CPUs without kernels of our own, for float32 on a GPU, and for what fused kernels
do not take: soft-caps and sinks. Stretches that continue a parent (see packing.py) see its keys
before their own::

    scores of a group      parent's keys | own keys
                            . . . .      | .
                            . . . .      | . .
                            . . . .      | . . .
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.devices import products_by_mkl, to_device
from pipeline.packing import Pack

_SHORT = {torch.float32: 256, torch.bfloat16: 512, torch.float16: 512}
"""Stretches of up to this many tokens are attended to in plain matrix products, on CPUs the faster
way until about there."""

_SMALL = 128
"""Stretches of up to this many tokens are multiplied by MKL on CPUs, in float32. Longer ones, for
which oneDNN is faster, are filled up to multiples of 32, and so are the keys before them: it makes
kernels for each shape."""

_MULTIPLE = 32

_GROUP_SCORES = 1 << 16
"""Scores that are computed at once, 256 KB of float32: measured best of 2^16, 2^18, 2^20, 2^22."""


class Asked(NamedTuple):
    """What a layer asks of its attention."""

    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks_H: Tensor | None

    @property
    def fused(self) -> bool:
        """Whether fused kernels do it."""
        return self.softcap is None and self.sinks_H is None


@dataclass(frozen=True)
class _Group:
    """Neighbouring stretches of a pack that are attended to in one batch."""

    begin: int
    end: int
    """Tokens of the pack."""
    lengths: tuple[int, ...]
    parent: slice
    """Tokens of the pack whose keys come first; none if empty."""
    _bands: dict[tuple[int, int, torch.device], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )
    _padded: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        """Tokens that each is filled up to."""
        return _fill_up(max(self.lengths))

    @property
    def past(self) -> int:
        """Tokens before each stretch."""
        return int(self.parent.stop - self.parent.start)

    @property
    def unused(self) -> int:
        """Keys before those of the parent that fill them up, and that no query sees."""
        return -self.past % _MULTIPLE if self.longest > _SMALL else 0

    @property
    def num_keys(self) -> int:
        """Keys that each is filled up to, in all."""
        return self.unused + self.past + self.longest

    def additive_band(self, window: int, times: int, device: torch.device) -> Tensor:
        """0 where query i sees key j, -inf elsewhere, float32 (times * L, N).

        Once for each head that a key serves, one under the other; made once a pack.
        """
        asked = window, times, device
        if asked not in self._bands:
            with torch.inference_mode(False):  # it is kept, and training may use it next
                seen = _band(self.longest, self.unused + self.past, window, device)
                seen[:, : self.unused] = False
                hidden = ~seen.repeat(times, 1)
                band = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)
            self._bands[asked] = band
        return self._bands[asked]

    def padded_T(self, device: torch.device) -> Tensor | None:
        """Position of each token in the batch padded to the longest, or None if none is padded.

        Made once a pack: a GPU that has to ask for it would be waited for, twice in each layer.
        """
        if min(self.lengths) == self.longest:
            return None
        if device not in self._padded:
            rows = [np.arange(n) + row * self.longest for row, n in enumerate(self.lengths)]
            with torch.inference_mode(False):  # it is kept, and training may use it next
                self._padded[device] = to_device(np.concatenate(rows), device)
        return self._padded[device]


# H=heads, K=key/value heads, T=tokens of the pack, D=head dimension
def grouped_attention(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, pack: Pack, asked: Asked
) -> Tensor:
    """Causal attention of each stretch over its parent and itself; shape (T, H, D)."""
    num_heads = len(query_HTD)
    outputs = []
    for group in _plan_groups(pack, num_heads):
        if asked.fused and group.longest > _SHORT[value_KTD.dtype]:
            assert len(group.lengths) == 1  # more would not fit _GROUP_SCORES
            outputs.append(_fused(query_HTD, key_KTD, value_KTD, group, asked))
        else:
            outputs.append(_explicit(query_HTD, key_KTD, value_KTD, group, asked))
    return torch.cat(outputs)


@functools.lru_cache(maxsize=2)  # every layer of a pass asks for the same pack
def _plan_groups(pack: Pack, num_heads: int) -> tuple[_Group, ...]:
    """Cut a pack into groups of like lengths whose scores stay in the cache.

    Short stretches one by one would cost more in calls than in arithmetic. Packs come longest
    first, so that neighbours are alike.
    """
    return tuple(_groups(pack, num_heads))


def _groups(pack: Pack, num_heads: int) -> Iterator[_Group]:
    stretches = pack.stretches
    first = 0
    while first < len(stretches):
        begin, length, parent = stretches[first]
        longest = _fill_up(length)
        past = slice(0, 0)
        if parent >= 0:
            past = slice(stretches[parent][0], stretches[parent][0] + stretches[parent][1])
        keys = past.stop - past.start + longest
        most = max(1, _GROUP_SCORES // max(1, num_heads * longest * keys))
        last = first + 1
        while (
            last < len(stretches)
            and last - first < most
            and stretches[last][2] == parent
            and 0.75 * length <= stretches[last][1] <= length
        ):
            last += 1
        lengths = tuple(length for _, length, _ in stretches[first:last])
        yield _Group(begin, begin + sum(lengths), lengths, past)
        first = last


def _fill_up(length: int) -> int:
    return length if length <= _SMALL else length + -length % _MULTIPLE


def _fused(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, group: _Group, asked: Asked
) -> Tensor:
    """Attention of one stretch by PyTorch's own kernel; shape (T, H, D).

    The parent's queries go along and are dropped: with as many queries as keys the kernel skips
    what is masked, which with fewer costs more than it saves.
    """
    parts = (group.parent, slice(group.begin, group.end))
    num_tokens = group.past + group.end - group.begin
    length = _fill_up(num_tokens)
    query_HTD, key_KTD, value_KTD = (
        F.pad(torch.cat([x[:, part] for part in parts], dim=1), (0, 0, 0, length - num_tokens))
        for x in (query_HTD, key_KTD, value_KTD)
    )
    query_HTD, key_KTD = query_HTD.to(value_KTD.dtype), key_KTD.to(value_KTD.dtype)
    window = min(asked.sliding_window or length, length)
    mask = None if window == length else _band(length, 0, window, query_HTD.device)
    output_1HTD = F.scaled_dot_product_attention(
        query_HTD[None], key_KTD[None], value_KTD[None],
        attn_mask=mask, is_causal=mask is None, scale=asked.scale, enable_gqa=True,
    )  # fmt: skip
    return output_1HTD[0].transpose(0, 1)[group.past : num_tokens]


# B=stretches of a group, L=longest of them, N=keys, G=queries that a key serves
def _explicit(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, group: _Group, asked: Asked
) -> Tensor:
    """Attention of a group written out, with float32 scores and weights; shape (T, H, D).

    Takes soft-caps and sinks, which fused kernels do not; and on short sequences it is the faster
    one on CPUs.
    """
    if query_HTD.device.type == "cpu" and group.longest <= _SMALL:
        with products_by_mkl():
            output_THD = _written_out(query_HTD, key_KTD, value_KTD.float(), group, asked)
            return output_THD.to(value_KTD.dtype)
    return _written_out(query_HTD, key_KTD, value_KTD, group, asked)


def _written_out(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, group: _Group, asked: Asked
) -> Tensor:
    num_heads, _, head_dim = query_HTD.shape
    num_shared = len(key_KTD)
    batch, longest, keys = len(group.lengths), group.longest, group.num_keys
    # Heads that share keys are rows of one product: keys are never repeated.
    query_BLHD = _padded(query_HTD, group).float()
    query_BKGLD = query_BLHD.unflatten(2, (num_shared, -1)).permute(0, 2, 3, 1, 4)
    key = _with_parent(key_KTD, group).float()
    value = _with_parent(value_KTD, group)
    query = query_BKGLD.reshape(batch * num_shared, -1, head_dim)
    window = min(asked.sliding_window or keys, keys)
    band = group.additive_band(window, num_heads // num_shared, query.device)
    if asked.softcap is None:
        band = band.expand(len(query), *band.shape)
        scores = torch.baddbmm(band, query, key.transpose(1, 2), alpha=asked.scale)
    else:
        scores = torch.bmm(query, key.transpose(1, 2)) * asked.scale
        scores = asked.softcap * torch.tanh(scores / asked.softcap) + band
    scores = scores.view(batch, num_heads, longest, keys)
    if asked.sinks_H is not None:
        sinks = asked.sinks_H.float().reshape(1, -1, 1, 1).expand(batch, num_heads, longest, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :keys].to(value.dtype)
    output = torch.bmm(weights.reshape(batch * num_shared, -1, keys), value)
    output_BHLD = output.view(batch, num_heads, longest, -1)
    output_THD = output_BHLD.transpose(1, 2).flatten(0, 1)
    padded_T = group.padded_T(output_THD.device)
    return output_THD if padded_T is None else output_THD[padded_T]


def _padded(x_HTD: Tensor, group: _Group) -> Tensor:
    """(heads, tokens of the pack, D) -> (B, L, heads, D), zeros behind what is shorter."""
    x_THD = x_HTD[:, group.begin : group.end].transpose(0, 1)
    padded_T = group.padded_T(x_THD.device)
    if padded_T is not None:
        padded = x_THD.new_zeros(len(group.lengths) * group.longest, *x_THD.shape[1:])
        padded[padded_T] = x_THD
        x_THD = padded
    return x_THD.view(len(group.lengths), group.longest, *x_THD.shape[1:])


def _with_parent(x_KTD: Tensor, group: _Group) -> Tensor:
    """Keys or values of a group behind those of its parent: (B * K, N, D)."""
    x_BKLD = _padded(x_KTD, group).transpose(1, 2)
    if group.past:
        parent_KPD = F.pad(x_KTD[:, group.parent], (0, 0, group.unused, 0))
        x_BKLD = torch.cat([parent_KPD.expand(len(x_BKLD), *parent_KPD.shape), x_BKLD], dim=2)
    return x_BKLD.flatten(0, 1)


def _band(length: int, past: int, window: int, device: torch.device) -> Tensor:
    """True where query i sees key j: i - window < j <= i. Window 2: 10000, 11000, 01100, ..."""
    position = torch.arange(past + length, device=device)
    distance = position[past:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
