"""Scores as a selection sees them: read from parts, ordered by key, eligible or not.

A key is a float64 ratio as an unsigned integer; a smaller key ranks first. Its top 20 bits are its
bin: 256 bins for ratios from 0.5 to 1, so that the bin of a cut holds about a percent of a corpus.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.budgets import SelectSettings
from pipeline.config import Order
from pipeline.rows import read_rows
from pipeline.units import Plan, Unit

Keys = npt.NDArray[np.uint64]

NUM_BINS = 1 << 20
_BIN_SHIFT = np.uint64(44)
_SIGN = np.uint64(1 << 63)

_READERS = 8
_ROWS_PER_TASK = 250_000
_MOST_TASKS = 512


def to_keys(ratios: npt.NDArray[np.float64], order: Order) -> Keys:
    """Keys of ratios; -0.0 and 0.0 are one value. NaN has no place here.

    In ascending order negative numbers are complemented, others get their sign bit set:
    -1.0 -> 0x400fffffffffffff, 0.0 -> 0x8000000000000000, 1.0 -> 0xbff0000000000000. In
    descending order all of it is complemented.
    """
    assert not np.isnan(ratios).any()
    bits = (ratios + 0.0).view(np.uint64)
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return ascending if order == "ascending" else ~ascending


def from_keys(keys: Keys, order: Order) -> npt.NDArray[np.float64]:
    """The inverse of `to_keys`."""
    ascending = keys if order == "ascending" else ~keys
    return np.where(ascending & _SIGN, ascending ^ _SIGN, ~ascending).view(np.float64)


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


def tasks(plan: Plan) -> Iterator[Task]:
    """Cut a plan into tasks of about 250,000 rows; larger ones where there would be over 512."""
    rows_per_task = max(_ROWS_PER_TASK, plan.num_rows // _MOST_TASKS)
    first = num_rows = 0
    for index, unit in enumerate(plan.units, start=1):
        num_rows += unit.num_rows
        if num_rows >= rows_per_task or index == len(plan.units):
            yield Task(first, plan.units[first:index], plan.scores_url)
            first, num_rows = index, 0


def read_scores(task: Task, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of the task's parts, in order; several are read at a time, which is mostly waiting.

    Raises:
        InputError: A part is missing or cannot be read.
    """
    urls = [unit.part_url(task.scores_url) for unit in task.units]
    readers = 1 if storage.is_local(task.scores_url) else _READERS
    with ThreadPoolExecutor(max_workers=readers) as pool:
        yield from pool.map(partial(_read_part, columns=columns), urls)


def read_groups(unit: Unit, column: str) -> pa.Array:
    """What a column of the input says of each row of a unit, as text; null where it is absent."""
    rows = read_rows(unit, {column})
    if column not in rows.schema.names:
        return pa.nulls(unit.num_rows, pa.string())
    return rows[column].cast(pa.string()).combine_chunks()


def score_columns(settings: SelectSettings, *more: str) -> list[str]:
    """Columns of a part that say whether a row is eligible, and others."""
    tokens = ["num_response_tokens"] if settings.min_response_tokens > 1 else []
    return ["status", settings.by, *tokens, *more]


@dataclass(frozen=True)
class Eligibility:
    """Which rows of a part may be selected. Arrays are by row."""

    ok: npt.NDArray[np.bool_]
    eligible: npt.NDArray[np.bool_]
    ratios: npt.NDArray[np.float64]
    """NaN where there is none."""
    rejected: Counter[str]
    """Rows with status ok that are not eligible, by the first reason that holds."""


def eligible_rows(part: pa.Table, settings: SelectSettings) -> Eligibility:
    """Tell which rows of a part may be selected; a ratio that is NaN never may."""
    ratios = part[settings.by].to_numpy()
    ok = eligible = pc.equal(part["status"], "ok").to_numpy()
    rejected: Counter[str] = Counter()
    rules = [("not_a_number", np.isnan(ratios))]
    if settings.min_response_tokens > 1:  # a row with status ok has at least one
        tokens = part["num_response_tokens"].to_numpy()
        rules.append(("too_few_tokens", tokens < settings.min_response_tokens))
    if settings.max_ifd is not None:
        rules.append(("at_or_over_max_ifd", ratios >= settings.max_ifd))
    if settings.min_ifd is not None:
        rules.append(("under_min_ifd", ratios < settings.min_ifd))
    for reason, hit in rules:
        if count := int(np.count_nonzero(eligible & hit)):
            rejected[reason] = count
        eligible = eligible & ~hit
    return Eligibility(ok, eligible, ratios, rejected)


def count_values(column: pa.ChunkedArray) -> Counter[str]:
    """How often each value occurs."""
    counts = pc.value_counts(column).to_pylist()
    return Counter({each["values"]: each["counts"] for each in counts})


def encode(groups: pa.Array, codes: dict[str | None, int]) -> npt.NDArray[np.int64]:
    """The code of each value; values that have none yet get the next ones."""
    encoded = groups.dictionary_encode(null_encoding="encode")
    values = encoded.dictionary.to_pylist()
    code_of = np.array([codes.setdefault(v, len(codes)) for v in values], np.int64)
    return np.asarray(code_of[encoded.indices.to_numpy()])


def _read_part(url: str, columns: Sequence[str]) -> pa.Table:
    with storage.open_parquet(url) as parquet:
        return parquet.read(columns=list(columns), use_threads=False)
