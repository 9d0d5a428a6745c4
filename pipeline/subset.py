"""The cherry subset: selected rows, with all their own columns, written in the order of rank.

::

    extract      a task per unit that has a selected row reads its row groups, keeps those rows
    write_part   a task per output part takes its ranks from all extracts, sorts, publishes

Every object is one request, and the manifest comes last: a selection without one is not done.
"""

import hashlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipeline import storage
from pipeline.errors import InputError
from pipeline.inputs import Corpus, Shard
from pipeline.schemas import BAD_LINE, SELECTED
from pipeline.tokenising import read_rows
from pipeline.units import Plan, Unit

WRITER_VERSION = 1

_ROWS_PER_PART = 100_000
_ROWS_PER_GROUP = 10_000


def output_schema(corpus: Corpus) -> pa.Schema:
    """Columns of the cherry subset: the input's, then those of SELECTED.

    Shards may differ: the output has every column that any shard has, in order of first
    appearance, null where a shard lacks it; a column's types are widened (int32 and int64, int64
    and double, null and anything), and a value that the common type cannot hold ends the writing.
    JSON has no types of its own: scalars that differ over ingested pieces become text.

    Raises:
        InputError: A column has types that do not go together, or a reserved name.
    """
    merged: dict[str, pa.DataType] = {}
    owner: dict[str, Shard] = {}
    for shard in corpus.shards:
        for column in shard.schema:
            if column.name in SELECTED.names:
                raise InputError(
                    f"shard {shard.url}: column '{column.name}' has a name that the output needs "
                    f"({', '.join(SELECTED.names)}). Rename it in the input."
                )
            if column.name == BAD_LINE:
                continue
            first = owner.setdefault(column.name, shard)
            known = merged.get(column.name, pa.null())
            widened = _widen(known, column.type)
            if widened is None and first.ingested and shard.ingested:
                widened = None if pa.types.is_nested(column.type) else pa.string()
            if widened is None:
                raise InputError(
                    f"column '{column.name}': {known} in shard {first.url}, {column.type} in "
                    f"shard {shard.url}. Convert one of them, or run the shards as two corpora."
                )
            merged[column.name] = widened
    return pa.schema([*merged.items(), *SELECTED])


def _widen(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The common type of two, if there is one."""
    both = [pa.schema([("column", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(both, promote_options="permissive").field("column").type
    except pa.ArrowTypeError:
        return None


def write_subset(
    plan: Plan,
    units_R: npt.NDArray[np.uint32],
    rows_R: npt.NDArray[np.int64],
    schema: pa.Schema,
    url: str,
) -> list[dict[str, Any]]:
    """Write the rows of a selection.

    Args:
        plan: Whose units are meant.
        units_R: Index of the unit of each selected row; R is in the order of ranks.
        rows_R: Its row in the shard.
        schema: From `output_schema`.
        url: Directory of the parts.

    Returns:
        Name, rows and content hash of each part, for the manifest.
    """
    num_parts = -(-len(units_R) // _ROWS_PER_PART)
    pieces: list[list[Any]] = [[] for _ in range(num_parts)]
    by_unit = np.argsort(units_R, kind="stable")
    starts = np.flatnonzero(np.diff(units_R[by_unit].astype(np.int64), prepend=-1))
    for ranks in np.split(by_unit, starts[1:]) if len(units_R) else []:
        unit = plan.units[int(units_R[ranks[0]])]
        task = _extract.options(num_returns=num_parts)
        refs: Any = task.remote(unit, plan.part_url(unit), rows_R[ranks], ranks, schema, num_parts)
        for part, ref in enumerate([refs] if num_parts == 1 else refs):
            pieces[part].append(ref)
    names = [f"part-{part:05d}.parquet" for part in range(num_parts)]
    jobs = [
        _write_part.remote(storage.join(url, name), *refs)
        for name, refs in zip(names, pieces, strict=True)
    ]
    return [
        {"path": name, "rows": rows, "sha256": digest}
        for name, (rows, digest) in zip(names, ray.get(jobs), strict=True)
    ]


@ray.remote
def _extract(
    unit: Unit,
    part_url: str,
    rows: npt.NDArray[np.int64],
    ranks: npt.NDArray[np.int64],
    schema: pa.Schema,
    num_parts: int,
) -> Any:
    """Selected rows of one unit in the output's schema, a table for each output part."""
    local = pa.array(rows - unit.start)
    names = [n for n in schema.names if n not in SELECTED.names]
    text = read_rows(unit, columns=names).take(local)
    with storage.open_parquet(part_url) as parquet:
        scores = parquet.read(columns=["sample_id", "ifd_loss_ratio", "ifd_ppl_ratio"])
    scores = scores.take(local).append_column("rank", pa.array(ranks, pa.int64()))
    columns = []
    for field in schema:
        if field.name in SELECTED.names:
            columns.append(scores[field.name])
        elif field.name in text.schema.names:
            columns.append(_cast(text[field.name], field, unit))
        else:
            columns.append(pa.nulls(len(text), field.type))
    table = pa.table(columns, schema=schema)
    part_of_row = ranks // _ROWS_PER_PART
    tables = [table.filter(pa.array(part_of_row == part)) for part in range(num_parts)]
    return tables[0] if num_parts == 1 else tuple(tables)


def _cast(column: pa.ChunkedArray, field: pa.Field, unit: Unit) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as err:  # 2**53 + 1 as a float64, 2**63 as an int64
        raise InputError(
            f"shard {unit.shard_url}: column '{field.name}' has type {column.type}, and not all of "
            f"it fits {field.type}, which the shards have in common: {err}. Convert it, or run "
            "the shards as two corpora."
        ) from None


@ray.remote
def _write_part(url: str, *pieces: pa.Table) -> tuple[int, str]:
    table = pa.concat_tables(pieces).sort_by("rank").combine_chunks()
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    data = sink.getvalue()
    # A part of a selection that was killed may be there: without a manifest nobody reads it, and
    # it may come from another pyarrow, so it is replaced.
    storage.replace(url, data)
    return len(table), hashlib.sha256(data).hexdigest()
