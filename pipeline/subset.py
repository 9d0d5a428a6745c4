"""The cherry subset: selected rows, with all their own columns, written in the order of rank.

::

    extract   a task per 64 MiB of selected rows, or 64 units, reads the row groups of its units
              that hold one, and keeps those rows
    write     a task per part, or few parts, takes its ranks from all extracts, sorts, publishes

Every object is one request, and the manifest comes last: a selection without one is not done.
"""

import hashlib
import io
import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipeline import storage
from pipeline.budgets import SelectSettings
from pipeline.columns import added_columns
from pipeline.errors import ChangedError, InputError
from pipeline.examples import is_example, message_keys, to_lines
from pipeline.inputs import Corpus
from pipeline.ranking import Ranking
from pipeline.rows import take_rows
from pipeline.schemas import SMALLEST_FRACTION
from pipeline.scores import Task, read_columns, reader_of
from pipeline.storage_faults import is_outage
from pipeline.units import Plan, Unit

WRITER_VERSION = 3

_ROWS_PER_GROUP = 10_000
_BYTES_PER_EXTRACT = 64 << 20
_UNITS_PER_EXTRACT = 64
_MOST_BYTES_PER_PART = 1 << 30
_MOST_TASKS = 256
"""Extracts, and writers: each extract hands a table to each writer."""

Chosen = npt.NDArray[Any]
"""Of the dtype ranking.CHOSEN."""


def write_subset(
    plan: Plan,
    corpus: Corpus,
    ranking: Ranking,
    settings: SelectSettings,
    schema: pa.Schema,
    url: str,
) -> list[dict[str, Any]]:
    """Write the rows of a selection.

    Args:
        plan: Whose units are meant.
        corpus: Of the plan.
        ranking: The selected rows.
        settings: Of the selection.
        schema: From `output_schema`.
        url: Directory of the parts.

    Returns:
        Name, rows and content hash of each part, for the manifest.
    """
    num_rows = int(ranking.selected[-1].sum())
    if not num_rows:
        return []
    row_bytes = _row_bytes(corpus)
    counts = _count_by_unit(plan, ranking)
    rows_per_part = _rows_per_part(plan, counts, row_bytes, settings)
    num_parts = -(-num_rows // rows_per_part)
    parts_per_writer = -(-num_parts // _MOST_TASKS)
    rows_per_writer = parts_per_writer * rows_per_part
    num_writers = -(-num_rows // rows_per_writer)
    chats = any(shard.columns.chats for shard in corpus.shards)
    keys = message_keys(corpus) if chats else None
    extracts = _deal_units(plan, counts, row_bytes)
    scatter: Any = _by_extract.options(num_returns=len(extracts))
    scattered = [_as_list(scatter.remote(rows, extracts)) for rows in ranking.chosen]
    extract: Any = _extract.options(num_returns=num_writers)
    extracted = []
    for units, rows in zip(extracts, zip(*scattered, strict=True), strict=True):
        job = _Extract(plan.units[units], units.start, plan.scores_url, settings, schema, keys)
        extracted.append(_as_list(extract.remote(job, rows_per_writer, num_writers, *rows)))
    suffix = "parquet" if settings.format == "parquet" else "jsonl"
    names = [f"part-{part:05d}.{suffix}" for part in range(num_parts)]
    jobs = []
    for writer, pieces in enumerate(zip(*extracted, strict=True)):
        some = names[writer * parts_per_writer : (writer + 1) * parts_per_writer]
        urls = [storage.join(url, name) for name in some]
        jobs.append(_write_parts.remote(urls, rows_per_part, settings.format, *pieces))
    written = itertools.chain.from_iterable(ray.get(jobs))
    return [
        {"path": name, "rows": rows, "sha256": digest}
        for name, (rows, digest) in zip(names, written, strict=True)
    ]


def _row_bytes(corpus: Corpus) -> dict[str, float]:
    """Mean bytes of a row by shard, as it is held here: uncompressed, as its footer says."""
    return {
        shard.url: 100 + shard.all_bytes / shard.num_rows
        for shard in corpus.shards
        if shard.num_rows
    }


def _count_by_unit(plan: Plan, ranking: Ranking) -> npt.NDArray[np.int64]:
    """Selected rows of each unit."""
    counts = np.zeros(len(plan.units), np.int64)
    for units, rows in ray.get([_count_units.remote(rows) for rows in ranking.chosen]):
        counts[units] += rows
    return counts


def _rows_per_part(
    plan: Plan,
    counts: npt.NDArray[np.int64],
    row_bytes: dict[str, float],
    settings: SelectSettings,
) -> int:
    """As many as the config says, or fewer where rows are long: a writer holds a whole part.

    So many that the longest fit: ranks may put them together.
    """
    lengths = np.array([row_bytes[unit.shard_url] for unit in plan.units])
    order = np.argsort(-lengths, kind="stable")
    lengths, rows = lengths[order], counts[order]
    room = _MOST_BYTES_PER_PART - (np.cumsum(rows * lengths) - rows * lengths)
    fit = int(np.minimum(rows, np.maximum(room, 0) / lengths).sum())
    return max(1, min(settings.rows_per_part, fit))


def _deal_units(
    plan: Plan, counts: npt.NDArray[np.int64], row_bytes: dict[str, float]
) -> list[slice]:
    """Neighbouring units that are extracted together: about 64 MiB of selected rows, or 64 units.

    No more units either: of a store, each part and shard is a request or a few.
    """
    sizes = counts * np.array([row_bytes[unit.shard_url] for unit in plan.units])
    by_bytes = _dealt(sizes, _BYTES_PER_EXTRACT)
    by_units = _dealt(counts > 0, _UNITS_PER_EXTRACT)
    edges = np.union1d(by_bytes, by_units).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _dealt(sizes: npt.NDArray[Any], wanted: int) -> npt.NDArray[np.int64]:
    """Where neighbours of `wanted` in all begin and end; at most half of `_MOST_TASKS` of them."""
    most = max(wanted, sizes.sum() / (_MOST_TASKS / 2))
    number = ((np.cumsum(sizes) - sizes) // most).astype(np.int64)
    return np.flatnonzero(np.diff(number, prepend=-1, append=number[-1] + 1))


def _as_list(refs: Any) -> list[Any]:
    """Ray gives one reference where there is one return value, a list where there are more."""
    return refs if isinstance(refs, list) else [refs]


@ray.remote
def _count_units(rows: Chosen) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Units that have rows in a range of ranks, and how many."""
    units, counts = np.unique(rows["unit"], return_counts=True)
    return units, counts


@ray.remote
def _by_extract(rows: Chosen, extracts: list[slice]) -> Any:
    """Rows of a range of ranks, by the extract that reads them."""
    rows = rows[np.argsort(rows["unit"], kind="stable")]
    pieces = np.split(rows, np.searchsorted(rows["unit"], [units.stop for units in extracts[:-1]]))
    return pieces[0] if len(pieces) == 1 else tuple(pieces)


@dataclass(frozen=True)
class _Extract:
    """What an extract needs to know of its units."""

    units: tuple[Unit, ...]
    first_unit: int
    """Index in the plan."""
    scores_url: str
    settings: SelectSettings
    schema: pa.Schema
    message_keys: tuple[str, ...] | None


@ray.remote
def _extract(job: _Extract, rows_per_writer: int, num_writers: int, *pieces: Chosen) -> Any:
    """The selected rows of some units, as a table for each writer; None where it gets no row."""
    rows = np.concatenate(pieces)
    rows = rows[np.lexsort((rows["row"], rows["unit"]))]
    tables: list[list[pa.Table]] = [[] for _ in range(num_writers)]
    by_unit = np.split(rows, np.flatnonzero(np.diff(rows["unit"])) + 1)
    selected = [
        (job.units[some["unit"][0] - job.first_unit], some) for some in by_unit if len(some)
    ]
    shards = [
        tuple(map(list, zip(*some, strict=True)))
        for _, some in itertools.groupby(selected, key=lambda each: each[0].read_url)
    ]
    for table in reader_of(job.units)(partial(_rows_of_shard, job), shards):
        writer_of_row = table["rank"].to_numpy() // rows_per_writer
        for writer in np.unique(writer_of_row).tolist():
            tables[writer].append(table.take(pa.array(np.flatnonzero(writer_of_row == writer))))
    found = [pa.concat_tables(some) if some else None for some in tables]
    return found[0] if num_writers == 1 else tuple(found)


def _rows_of_shard(job: _Extract, selected: tuple[list[Unit], list[Chosen]]) -> pa.Table:
    """Selected rows of units of one shard: as columns, or for JSON as rank and line."""
    units, rows = selected
    shard, numbers = units[0], np.concatenate(rows)["row"]
    added = _added(job, units, rows)
    layout = set(shard.columns.names.values())
    fields = [field for field in job.schema if field.name not in added.schema.names]
    try:
        read = take_rows(shard.file, numbers, layout | {field.name for field in fields})
    except InputError as err:  # in a column that scoring does not read, or of a store that is out
        if isinstance(err, ChangedError):
            raise
        fix = "repair the shard, or take it out of the input, and run cherry select."
        fix = "run cherry select again." if is_outage(err) else fix
        raise InputError(f"{err} What is scored is kept: {fix}") from err
    form = job.settings.format
    others = read
    if is_example(form):  # the layout's columns become the example itself
        others = read.drop_columns([name for name in read.schema.names if name in layout])
    columns = [*(as_column(others, field, shard) for field in fields), *added.columns]
    table = pa.table(columns, schema=pa.schema([*fields, *added.schema]))
    if form == "parquet":
        return table.unify_dictionaries()
    where = [f"shard {shard.shard_url}, row {number}" for number in numbers.tolist()]
    lines = to_lines(read, table, shard.columns, form, job.message_keys, where)
    return pa.table({"rank": added["rank"], "line": pa.array(lines, pa.large_string())})


def _added(job: _Extract, units: list[Unit], rows: list[Chosen]) -> pa.Table:
    """What the selection says of the rows: their scores from the parts, rank and budget."""
    parts = read_columns(
        Task(0, tuple(units), job.scores_url), ["sample_id", "ifd_loss_ratio", "ifd_ppl_ratio"]
    )
    starts = itertools.accumulate((unit.num_rows for unit in units), initial=0)
    at = [
        some["row"] - unit.start + start
        for unit, some, start in zip(units, rows, starts, strict=False)
    ]
    chosen = np.concatenate(rows)
    added = parts.take(pa.array(np.concatenate(at))).append_column("rank", pa.array(chosen["rank"]))
    schema = added_columns(job.settings)
    if SMALLEST_FRACTION.name in schema.names:
        fractions = np.array([float(f) for f in job.settings.fractions])
        added = added.append_column(SMALLEST_FRACTION, pa.array(fractions[chosen["level"]]))
    return added.cast(schema)


def as_column(text: pa.Table, field: pa.Field, unit: Unit) -> pa.ChunkedArray:
    """A column of a shard in the output's type; nulls where the shard has none."""
    if field.name not in text.schema.names:
        return pa.chunked_array([pa.nulls(len(text), field.type)])
    column = text[field.name]
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as err:  # a value, such as 2**53 + 1: the types go together (columns.py)
        raise InputError(
            f"shard {unit.shard_url}: column '{field.name}' has type {column.type}, and not all of "
            f"it fits {field.type}, which the shards have in common: {err}. Convert it, or run "
            "the shards as two corpora."
        ) from None


@ray.remote
def _write_parts(
    urls: list[str], rows_per_part: int, form: str, *pieces: pa.Table | None
) -> list[tuple[int, str]]:
    """Write neighbouring parts; rows and content hash of each."""
    table = pa.concat_tables([piece for piece in pieces if piece is not None])
    try:
        table = table.unify_dictionaries().sort_by("rank")
    except pa.ArrowInvalid as err:  # over 2 GiB of a text
        raise InputError(
            f"{urls[0]}: its {len(table):,} rows are {table.nbytes / 2**30:.1f} GiB, more than can "
            f"be sorted together: {err}. Set select.rows_per_part well under {rows_per_part}, and "
            "run cherry select; what is scored is kept."
        ) from None
    written = []
    for number, url in enumerate(urls):
        part = table.slice(number * rows_per_part, rows_per_part)
        data = _as_parquet(part) if form == "parquet" else _as_lines(part)
        # A part of a selection that was killed may be there: without a manifest nobody reads it,
        # and it may come from another pyarrow, so it is replaced.
        storage.replace(url, data)
        written.append((len(part), hashlib.sha256(data).hexdigest()))
    return written


def _as_parquet(part: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(part.combine_chunks(), sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    return sink.getvalue()


def _as_lines(part: pa.Table) -> bytes:
    return "".join(f"{line}\n" for line in part["line"].to_pylist()).encode()
