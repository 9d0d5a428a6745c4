"""Rows of a shard by their number, from the row groups that hold one and no others.

Without torch or transformers: a worker that only reads starts in a second.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import listing, storage
from pipeline.errors import InputError
from pipeline.listing import ObjectInfo
from pipeline.schemas import BAD_LINE
from pipeline.units import Unit

_ROWS_PER_BATCH = 2_000
_BYTES_PER_BATCH = 1 << 26
"""Or fewer rows, where they are long: a batch is held beside the rows that are wanted of it."""

_ROWS_PER_READ = 100_000
_UNITS_PER_READ = 64
"""Of one shard, read in one sweep: half a minute of tokenising, some ten megabytes of tokens where
units are `auto`. They lie in the object store until they are scored."""


def plan_reads(units: Sequence[Unit], at_least: int) -> list[list[Unit]]:
    """Which units are read together: neighbours in a shard.

    A row group has to be read from its start: one of a million rows, unit by unit, would be read a
    thousand times.

    Args:
        units: In the order of shards and rows.
        at_least: Reads among which the units are dealt, where there are so many units.
    """
    most = min(_UNITS_PER_READ, max(1, len(units) // at_least))
    reads: list[list[Unit]] = []
    for unit in units:
        read = reads[-1] if reads else []
        if (
            0 < len(read) < most
            and read[-1].read_url == unit.read_url
            and read[-1].stop <= unit.start
            and unit.stop - read[0].start <= _ROWS_PER_READ
        ):
            read.append(unit)
        else:
            reads.append([unit])
    return reads


def read_units(units: Sequence[Unit]) -> Iterator[pa.Table]:
    """The rows of each unit of a read, one table after the other; the layout's own columns."""
    columns = [*units[0].columns.names.values(), BAD_LINE]
    yield from _sweep(units[0].file, [np.arange(u.start, u.stop) for u in units], columns)


def take_rows(file: ObjectInfo, rows: npt.NDArray[np.int64], columns: Collection[str]) -> pa.Table:
    """Some rows of a shard, streaming: what is held is those rows and one batch.

    Args:
        file: Where the Parquet bytes are; without a version, one that never changes.
        rows: Numbers in the shard, ascending, each once.
        columns: Columns to read, where the shard has them; if it has none, nor has the result rows.

    Raises:
        InputError: The shard cannot be read, or changed since it was listed.
    """
    (table,) = _sweep(file, [rows], columns)
    return table


def _sweep(
    file: ObjectInfo, wanted: Sequence[npt.NDArray[np.int64]], columns: Collection[str]
) -> Iterator[pa.Table]:
    """As `take_rows` for rows, more rows that come after them, and so on: one table each."""
    with storage.open_parquet(file.url) as parquet:
        names = [name for name in parquet.schema_arrow.names if name in columns]
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        every = np.concatenate(wanted)
        if len(every) and every[-1] >= starts[-1]:
            raise InputError(
                f"{file.url}: got {starts[-1]} rows, expected more than {every[-1]}: it changed "
                "while it was read. Run again."
            )
        needed = np.unique(np.searchsorted(starts, every, side="right") - 1)
        batches = _batches(parquet, names, [(int(g), int(starts[g])) for g in needed])
        schema = pa.schema([parquet.schema_arrow.field(name) for name in names])
        # Schema.empty_table would not make an empty tensor.
        empty = _without_views(
            pa.Table.from_arrays([pa.chunked_array([], f.type) for f in schema], schema=schema)
        )
        begin, batch = 0, empty
        for number, rows in enumerate(wanted):
            pieces = [empty]
            while names:
                first, last = np.searchsorted(rows, [begin, begin + len(batch)])
                if last - first == len(batch):
                    pieces.append(batch)
                elif last > first:  # copied: a slice would keep the whole batch
                    pieces.append(batch.take(pa.array(rows[first:last] - begin)))
                if last == len(rows):
                    break
                begin, batch = next(batches)
            table = pa.concat_tables(pieces)
            assert len(table) == len(rows) or not names
            # Their scores would count as those of what was listed. A store is asked twice a sweep:
            # of some, as the Hub, each question lists a directory.
            if file.version and (storage.is_local(file.url) or number in (0, len(wanted) - 1)):
                listing.refuse_changed(file)
            yield table


def _batches(
    parquet: Any, names: list[str], groups: list[tuple[int, int]]
) -> Iterator[tuple[int, pa.Table]]:
    """Some row groups, of which the first row's number is given, in pieces with theirs."""
    for group, begin in groups:
        rows = _rows_per_batch(parquet.metadata.row_group(group), names)
        # A task has one core: more threads would only take turns.
        for batch in parquet.iter_batches(
            rows, row_groups=[group], columns=names, use_threads=False
        ):
            # `a.b` also brings the field b of a column a.
            table = _without_views(pa.table(batch).select(names))
            yield begin, table
            begin += len(table)


def _rows_per_batch(group: Any, names: list[str]) -> int:
    """As its footer says how long rows are."""
    columns = (group.column(i) for i in range(group.num_columns))
    size = sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema.partition(".")[0] in names
    )
    return int(np.clip(_BYTES_PER_BATCH * group.num_rows // max(1, size), 1, _ROWS_PER_BATCH))


def _without_views(table: pa.Table) -> pa.Table:
    """Views as what they are views of: pyarrow has no `take` for them."""
    for index, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):
            table = table.set_column(index, field.name, table[index].cast(pa.large_string()))
        elif pa.types.is_binary_view(field.type):
            table = table.set_column(index, field.name, table[index].cast(pa.large_binary()))
    return table
