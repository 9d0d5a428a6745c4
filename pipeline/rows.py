"""Rows of a shard by their number, from the row groups that hold one and no others.

Without torch or transformers: a worker that only reads starts in a second.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.errors import InputError
from pipeline.schemas import BAD_LINE
from pipeline.units import Unit

_ROWS_PER_BATCH = 2_000


def read_rows(unit: Unit, columns: Collection[str] | None = None) -> pa.Table:
    """The rows of a unit; `columns` as in `take_rows`, None is the layout's own."""
    wanted = columns or [*unit.columns.names.values(), BAD_LINE]
    return take_rows(unit.read_url, np.arange(unit.start, unit.stop), wanted)


def take_rows(url: str, rows: npt.NDArray[np.int64], columns: Collection[str]) -> pa.Table:
    """Some rows of a shard, streaming: what is held is those rows and one batch.

    Args:
        url: Where the Parquet bytes are.
        rows: Numbers in the shard, ascending, each once.
        columns: Columns to read, where the shard has them; at least one that it has.

    Raises:
        InputError: The shard cannot be read, or has fewer rows than its footer said.
    """
    with storage.open_parquet(url) as parquet:
        names = [name for name in parquet.schema_arrow.names if name in columns]
        groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        if len(rows) and rows[-1] >= starts[-1]:
            raise InputError(
                f"{url}: got {starts[-1]} rows, expected more than {rows[-1]}: it changed while "
                "it was read. Run again."
            )
        empty = parquet.schema_arrow.empty_table().select(names)
        pieces = [_without_views(empty)]
        for group in np.unique(np.searchsorted(starts, rows, side="right") - 1):
            first, last = np.searchsorted(rows, starts[group : group + 2])
            pieces += _take(parquet, int(group), names, rows[first:last] - starts[group])
        return pa.concat_tables(pieces)


def _take(
    parquet: Any, group: int, names: list[str], rows: npt.NDArray[np.int64]
) -> list[pa.Table]:
    """Some rows of one row group, by their number in it."""
    pieces = []
    offset = 0
    # A task has one core: more threads would only take turns.
    batches = parquet.iter_batches(
        _ROWS_PER_BATCH, row_groups=[group], columns=names, use_threads=False
    )
    for batch in batches:
        first, last = np.searchsorted(rows, [offset, offset + len(batch)])
        wanted = rows[first:last] - offset
        # `a.b` also brings the field b of a column a.
        table = _without_views(pa.table(batch).select(names))
        if len(wanted) == len(table):
            pieces.append(table)
        elif len(wanted):  # copied: a slice would keep the whole batch
            pieces.append(table.take(pa.array(wanted)))
        offset += len(batch)
        if last == len(rows):
            break
    return pieces


def _without_views(table: pa.Table) -> pa.Table:
    """Views as what they are views of: pyarrow has no `take` for them."""
    for index, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):
            table = table.set_column(index, field.name, table[index].cast(pa.large_string()))
        elif pa.types.is_binary_view(field.type):
            table = table.set_column(index, field.name, table[index].cast(pa.large_binary()))
    return table
