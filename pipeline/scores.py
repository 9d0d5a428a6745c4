"""Scores as a selection sees them: read from parts, ordered by key, eligible or not.

A key is a float64 ratio as an unsigned integer; a smaller key ranks first. Its top 20 bits are its
bin: 256 bins for ratios from 0.5 to 1, so that the bin of a cut holds about a percent of a corpus.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.budgets import SelectSettings
from pipeline.config_select import Order
from pipeline.errors import InputError
from pipeline.rows import take_rows
from pipeline.units import Plan, Unit

Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]

NUM_BINS = 1 << 20
_BIN_SHIFT = np.uint64(44)
_SIGN = np.uint64(1 << 63)
END_OF_KEYS = np.uint64((1 << 64) - 1)
"""Above the key of any ratio: the last ones would be NaN."""

_ROWS_PER_TASK = 500_000
_UNITS_PER_TASK = 64
"""However few rows they have: of a store, each part and shard is a request or a few."""
_MOST_TASKS = 256
_SMALL_SHARD = 8 << 20
"""Bytes."""


def to_keys(ratios: npt.NDArray[np.float64], order: Order) -> Keys:
    """Keys of ratios; -0.0 and 0.0 are one value. NaN has no place here.

    In ascending order negative numbers are complemented, others get their sign bit set:
    -1.0 -> 0x400fffffffffffff, 0.0 -> 0x8000000000000000, 1.0 -> 0xbff0000000000000. In
    descending order all of it is complemented.
    """
    assert not np.isnan(ratios).any()
    bits = (ratios + 0.0).view(np.int64)
    ascending = bits.view(np.uint64) ^ ((bits >> 63).view(np.uint64) | _SIGN)
    return ascending if order == "ascending" else ~ascending


def from_keys(keys: Keys, order: Order) -> npt.NDArray[np.float64]:
    """The inverse of `to_keys`."""
    ascending = keys if order == "ascending" else ~keys
    return np.where(ascending & _SIGN, ascending ^ _SIGN, ~ascending).view(np.float64)


def first_keys(bins: npt.NDArray[np.int64]) -> Keys:
    """The smallest key of each bin; no ratio is in the last one, so that the next has one too."""
    return bins.astype(np.uint64) << _BIN_SHIFT


def to_bins(keys: Keys) -> npt.NDArray[np.int64]:
    """The bin of each key, from 0 to NUM_BINS - 1."""
    return (keys >> _BIN_SHIFT).astype(np.int64)


@dataclass(frozen=True)
class Task:
    """Neighbouring units that one Ray task looks at."""

    first_unit: int
    """Its index in the plan."""
    units: tuple[Unit, ...]
    scores_url: str

    @property
    def num_rows(self) -> int:
        """Rows of all units."""
        return sum(unit.num_rows for unit in self.units)

    def locate(self, at: Positions) -> tuple[Positions, Positions]:
        """Unit (its index in the plan) and row in the shard, of rows of the task by number."""
        sizes = np.array([unit.num_rows for unit in self.units])
        ends = np.cumsum(sizes)
        unit = np.searchsorted(ends, at, side="right")
        offsets = np.array([unit.start for unit in self.units]) - (ends - sizes)
        return unit + self.first_unit, at + offsets[unit]


def tasks(plan: Plan) -> Iterator[Task]:
    """Cut a plan into tasks of about 500,000 rows or 64 units; larger ones where it is large."""
    rows_per_task = max(_ROWS_PER_TASK, 2 * plan.num_rows // _MOST_TASKS)
    units_per_task = max(_UNITS_PER_TASK, 2 * len(plan.units) // _MOST_TASKS)
    first = num_rows = 0
    for index, unit in enumerate(plan.units, start=1):
        num_rows += unit.num_rows
        full = num_rows >= rows_per_task or index - first >= units_per_task
        if full or index == len(plan.units):
            yield Task(first, plan.units[first:index], plan.scores_url)
            first, num_rows = index, 0


@dataclass(frozen=True)
class Scores:
    """The rows of a task, part after part. Arrays are by row."""

    rows_by_status: Counter[str]
    ok: Mask
    eligible: Mask
    rejected: Counter[str]
    """Rows with status ok that are not eligible, by the first reason that holds."""
    ratios: npt.NDArray[np.float64]
    """NaN where there is none."""
    groups: Positions
    """Codes, as `codes` said when they were read; all 0 without `group_by`."""
    table: pa.Table


def read_scores(
    task: Task, settings: SelectSettings, codes: dict[str | None, int], *more: str
) -> Scores:
    """Read what a selection goes by.

    Args:
        task: Which parts.
        settings: Say which ratio counts, and which rows are eligible.
        codes: By value of `group_by`; values that have none yet get the next ones.
        *more: Further columns of the parts, for `table`.

    Raises:
        InputError: A part is missing or cannot be read.
    """
    tokens = ["num_response_tokens"] if settings.min_response_tokens > 1 else []
    table = read_columns(task, ["status", settings.by, *tokens, *more])
    status = table["status"].combine_chunks()
    names = status.dictionary.to_pylist()
    status_of_row = status.indices.to_numpy()
    counts = np.bincount(status_of_row, minlength=len(names)).tolist()
    ratios = table[settings.by].to_numpy()
    ok = eligible = status_of_row == (names.index("ok") if "ok" in names else -1)
    rejected: Counter[str] = Counter()
    for reason, hit in _rules(table, ratios, settings):
        if count := int(np.count_nonzero(eligible & hit)):
            rejected[reason] = count
        eligible = eligible & ~hit
    if settings.group_by:
        group_of_row = encode(read_groups(task, settings.group_by), codes)
    else:
        group_of_row = np.broadcast_to(np.int64(0), len(table))
    return Scores(
        rows_by_status=Counter({n: c for n, c in zip(names, counts, strict=True) if c}),
        ok=ok,
        eligible=eligible,
        rejected=rejected,
        ratios=ratios,
        groups=group_of_row,
        table=table,
    )


def read_columns(task: Task, columns: Sequence[str]) -> pa.Table:
    """Columns of the task's parts, in order.

    Raises:
        InputError: A part is missing or cannot be read.
    """
    urls = [unit.part_url(task.scores_url) for unit in task.units]
    each = map if storage.is_local(task.scores_url) else storage.several
    return pa.concat_tables(each(partial(_read_part, columns), urls)).unify_dictionaries()


def read_groups(task: Task, column: str) -> pa.Array:
    """What a column of the input says of each row of a task, as text; null where it is absent.

    Raises:
        InputError: A shard cannot be read, or its text is not UTF-8.
    """
    shards = [list(some) for _, some in itertools.groupby(task.units, lambda unit: unit.read_url)]
    found = reader_of(task.units)(partial(_read_groups, column), shards)
    return pa.chunked_array(list(found), pa.string()).combine_chunks()


def reader_of(units: Sequence[Unit]) -> Any:
    """How shards are read one after the other: `map`, or several at a time, for small ones.

    Of a store these are mostly waited for; each large one holds a row group.
    """
    small = all(unit.file.size <= _SMALL_SHARD for unit in units)
    return storage.several if small and not storage.is_local(units[0].read_url) else map


def encode(groups: pa.Array, codes: dict[str | None, int]) -> Positions:
    """The code of each value; values that have none yet get the next ones."""
    encoded = groups.dictionary_encode(null_encoding="encode")
    values = encoded.dictionary.to_pylist()
    code_of = np.array([codes.setdefault(v, len(codes)) for v in values], np.int64)
    return np.asarray(code_of[encoded.indices.to_numpy()])


def _rules(
    table: pa.Table, ratios: npt.NDArray[np.float64], settings: SelectSettings
) -> Iterator[tuple[str, Mask]]:
    """Why a row with status ok is not eligible, and which rows that is true of."""
    yield "not_a_number", np.isnan(ratios)
    if settings.min_response_tokens > 1:  # a row with status ok has at least one
        tokens = table["num_response_tokens"].to_numpy()
        yield "too_few_tokens", tokens < settings.min_response_tokens
    if settings.max_ifd is not None:
        yield "at_or_over_max_ifd", ratios >= settings.max_ifd
    if settings.min_ifd is not None:
        yield "under_min_ifd", ratios < settings.min_ifd


def _read_groups(column: str, units: list[Unit]) -> pa.Array:
    """Of units of one shard."""
    rows = np.concatenate([np.arange(unit.start, unit.stop) for unit in units])
    table = take_rows(units[0].file, rows, {column})
    if column not in table.schema.names:
        return pa.nulls(len(rows), pa.string())
    text = table[column].cast(pa.string()).combine_chunks()
    try:
        text.validate(full=True)  # Parquet does not look at the bytes
    except pa.ArrowInvalid as err:
        raise InputError(
            f"shard {units[0].shard_url}: column '{column}', whose values are the groups of "
            f"select.group_by: {err}. Convert it to UTF-8, or name another column."
        ) from None
    return text


def _read_part(columns: Sequence[str], url: str) -> pa.Table:
    with storage.open_parquet(url) as parquet:
        return parquet.read(columns=list(columns), use_threads=False)
