"""The cherry subset: selected rows, with all their own columns, written in the order of rank.

::

    extract      a task per 64 MiB of selected text reads the row groups of its units that hold a
                 selected row, and keeps those rows
    write_part   a task per output part takes its ranks from all extracts, sorts, publishes

Every object is one request, and the manifest comes last: a selection without one is not done.
"""

import difflib
import hashlib
import io
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipeline import storage
from pipeline.budgets import SelectSettings
from pipeline.errors import ConfigError, InputError
from pipeline.examples import to_lines
from pipeline.inputs import Corpus, Shard
from pipeline.ranking import Ranking
from pipeline.rows import take_rows
from pipeline.schemas import BAD_LINE, SELECTED, SMALLEST_FRACTION
from pipeline.units import Plan, Unit

WRITER_VERSION = 2

_ROWS_PER_GROUP = 10_000
_BYTES_PER_EXTRACT = 64 << 20

Chosen = npt.NDArray[Any]
"""Of the dtype ranking.CHOSEN."""


def added_columns(settings: SelectSettings) -> pa.Schema:
    """What a selection says of each row, after the input's own columns."""
    if settings.group_by and len(settings.fractions) > 1:
        return SELECTED.append(SMALLEST_FRACTION)
    return SELECTED


def output_schema(corpus: Corpus, settings: SelectSettings) -> pa.Schema:
    """Columns of the cherry subset: the input's, then those of `added_columns`.

    Shards may differ: the output has every column that any shard has, in order of first
    appearance, null where a shard lacks it; a column's types are widened (int32 and int64, int64
    and double, null and anything), and a value that the common type cannot hold ends the writing.
    JSON has no types of its own: scalars that differ over ingested pieces become text.

    Raises:
        InputError: A column has types that do not go together, or a reserved name.
        ConfigError: `group_by` names no column, or one whose values are no names of groups.
    """
    added = added_columns(settings)
    merged: dict[str, pa.DataType] = {}
    owner: dict[str, Shard] = {}
    for shard in corpus.shards:
        for column in shard.schema:
            if column.name in added.names:
                raise InputError(
                    f"shard {shard.url}: column '{column.name}' has a name that the output needs "
                    f"({', '.join(added.names)}). Rename it in the input."
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
    if settings.group_by:
        _check_group_by(settings.group_by, merged)
    return pa.schema([*merged.items(), *added])


def _check_group_by(name: str, columns: dict[str, pa.DataType]) -> None:
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else "Name one of these, or null."
        raise ConfigError(
            f"key 'select.group_by': no shard has a column '{name}' (they have: "
            f"{', '.join(columns)}). {hint}"
        )
    kind = columns[name]
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = ("is_string", "is_large_string", "is_string_view", "is_integer", "is_boolean")
    if not any(getattr(pa.types, test)(values) for test in (*tests, "is_null")):
        raise ConfigError(
            f"key 'select.group_by': column '{name}' has type {kind}, expected text, whole numbers "
            "or true and false. Name another column, or add one to the input."
        )


def _widen(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The common type of two, if there is one."""
    both = [pa.schema([("column", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(both, promote_options="permissive").field("column").type
    except pa.ArrowTypeError:
        return None


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
    num_parts = -(-num_rows // settings.rows_per_part)
    if not num_parts:
        return []
    extracts = _deal_units(plan, corpus, ranking)
    scatter: Any = _by_extract.options(num_returns=len(extracts))
    scattered = [_as_list(scatter.remote(rows, extracts)) for rows in ranking.chosen]
    extract: Any = _extract.options(num_returns=num_parts)
    extracted = [
        _as_list(
            extract.remote(
                _Extract(plan.units[units], units.start, plan.scores_url, settings, schema),
                num_parts,
                *rows,
            )
        )
        for units, rows in zip(extracts, zip(*scattered, strict=True), strict=True)
    ]
    suffix = "parquet" if settings.format == "parquet" else "jsonl"
    names = [f"part-{part:05d}.{suffix}" for part in range(num_parts)]
    jobs = [
        _write_part.remote(storage.join(url, name), *pieces)
        for name, pieces in zip(names, zip(*extracted, strict=True), strict=True)
    ]
    return [
        {"path": name, "rows": rows, "sha256": digest}
        for name, (rows, digest) in zip(names, ray.get(jobs), strict=True)
    ]


def _deal_units(plan: Plan, corpus: Corpus, ranking: Ranking) -> list[slice]:
    """Neighbouring units that are extracted together: about 64 MiB of selected text each."""
    num_units = len(plan.units)
    counts = sum(ray.get([_count_units.remote(rows, num_units) for rows in ranking.chosen]))
    row_bytes = {s.url: s.text_bytes / max(1, s.num_rows) + 100 for s in corpus.shards}
    sizes = counts * np.array([row_bytes[unit.shard_url] for unit in plan.units])
    number = ((np.cumsum(sizes) - sizes) // _BYTES_PER_EXTRACT).astype(np.int64)
    edges = np.flatnonzero(np.diff(number, prepend=-1, append=number[-1] + 1))
    return [slice(start, stop) for start, stop in itertools.pairwise(edges.tolist())]


def _as_list(refs: Any) -> list[Any]:
    """Ray gives one reference where there is one return value, a list where there are more."""
    return refs if isinstance(refs, list) else [refs]


@ray.remote
def _count_units(rows: Chosen, num_units: int) -> npt.NDArray[np.int64]:
    return np.bincount(rows["unit"], minlength=num_units)


@ray.remote
def _by_extract(rows: Chosen, extracts: list[slice]) -> Any:
    """Rows of a range of ranks, by the extract that reads their text."""
    number = np.searchsorted([units.stop for units in extracts], rows["unit"], side="right")
    pieces = [rows[number == extract] for extract in range(len(extracts))]
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


@ray.remote
def _extract(job: _Extract, num_parts: int, *pieces: Chosen) -> Any:
    """The selected rows of some units, as a table for each output part."""
    rows = np.concatenate(pieces)
    rows = rows[np.lexsort((rows["row"], rows["unit"]))]
    tables: list[list[pa.Table]] = [[] for _ in range(num_parts)]
    by_unit = np.split(rows, np.flatnonzero(np.diff(rows["unit"])) + 1)
    selected = [
        (job.units[some["unit"][0] - job.first_unit], some) for some in by_unit if len(some)
    ]
    for _, shard in itertools.groupby(selected, key=lambda each: each[0].read_url):
        units, ranges = map(list, zip(*shard, strict=True))
        table = _rows_of_shard(job, units, ranges)
        part_of_row = table["rank"].to_numpy() // job.settings.rows_per_part
        for part in np.unique(part_of_row).tolist():
            tables[part].append(table.take(pa.array(np.flatnonzero(part_of_row == part))))
    found = [pa.concat_tables(some) if some else None for some in tables]
    return found[0] if num_parts == 1 else tuple(found)


def _rows_of_shard(job: _Extract, units: list[Unit], rows: list[Chosen]) -> pa.Table:
    """Selected rows of units of one shard, as they are written."""
    shard, all_rows = units[0], np.concatenate(rows)
    added = _added(job, units, rows)
    form = job.settings.format
    names = [name for name in job.schema.names if name not in added.schema.names]
    if form in ("alpaca_jsonl", "messages_jsonl"):
        names = list(shard.columns.names.values())
    text = take_rows(shard.read_url, all_rows["row"], names)
    if form in ("parquet", "jsonl"):
        fields = [job.schema.field(name) for name in names]
        columns = [_column(text, field, shard) for field in fields]
        text = pa.table(columns, schema=pa.schema(fields))
    if form == "parquet":
        return pa.table([*text.columns, *added.columns], schema=job.schema).unify_dictionaries()
    lines = to_lines(text, added, shard.columns, form, shard.shard_url)
    return pa.table({"rank": added["rank"], "line": pa.array(lines, pa.large_string())})


def _added(job: _Extract, units: list[Unit], rows: list[Chosen]) -> pa.Table:
    """What the selection says of the rows: their scores from the parts, rank and budget."""
    names = ["sample_id", "ifd_loss_ratio", "ifd_ppl_ratio"]
    scores = []
    for unit, some in zip(units, rows, strict=True):
        with storage.open_parquet(unit.part_url(job.scores_url)) as parquet:
            scores.append(parquet.read(columns=names).take(pa.array(some["row"] - unit.start)))
    chosen = np.concatenate(rows)
    added = pa.concat_tables(scores).append_column("rank", pa.array(chosen["rank"]))
    schema = added_columns(job.settings)
    if SMALLEST_FRACTION.name in schema.names:
        fractions = np.array([float(f) for f in job.settings.fractions])
        added = added.append_column(SMALLEST_FRACTION, pa.array(fractions[chosen["level"]]))
    return added.cast(schema)


def _column(text: pa.Table, field: pa.Field, unit: Unit) -> pa.ChunkedArray:
    """A column of a shard in the output's type; nulls where the shard has none."""
    if field.name not in text.schema.names:
        return pa.chunked_array([pa.nulls(len(text), field.type)])
    column = text[field.name]
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as err:  # 2**53 + 1 as a float64, 2**63 as an int64
        raise InputError(
            f"shard {unit.shard_url}: column '{field.name}' has type {column.type}, and not all of "
            f"it fits {field.type}, which the shards have in common: {err}. Convert it, or run "
            "the shards as two corpora."
        ) from None


@ray.remote
def _write_part(url: str, *pieces: pa.Table | None) -> tuple[int, str]:
    table = pa.concat_tables([piece for piece in pieces if piece is not None])
    table = table.unify_dictionaries().sort_by("rank")
    if "line" in table.schema.names:
        data = "".join(f"{line}\n" for line in table["line"].to_pylist()).encode()
    else:
        sink = io.BytesIO()
        pq.write_table(
            table.combine_chunks(), sink, compression="zstd", row_group_size=_ROWS_PER_GROUP
        )
        data = sink.getvalue()
    # A part of a selection that was killed may be there: without a manifest nobody reads it, and
    # it may come from another pyarrow, so it is replaced.
    storage.replace(url, data)
    return len(table), hashlib.sha256(data).hexdigest()
