"""Parts: what the last stage publishes of a unit, and what it says was done.

Without torch or transformers: a worker that commits starts in a second.
"""

import io
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import listing, storage
from pipeline.errors import CherryError
from pipeline.schemas import from_ipc
from pipeline.units import Unit


@dataclass(frozen=True)
class UnitDone:
    """What the commit stage says of a unit."""

    unit_id: str
    shard_url: str
    rows: int
    rows_by_status: dict[str, int]
    rows_reused: int
    """Rows that had a score already."""
    tokens: int
    """Sequence lengths of both passes, of rows that were scored."""
    started: float
    """Unix time, in seconds, when its scoring began."""
    committed: float
    """Unix time, in seconds, when its part was there."""
    over_one: int
    """Rows with IFD of 1 or more."""
    failure: str | None
    """Why the unit has no part."""
    failure_kind: str | None
    """The class in errors.py that says so."""
    warnings: Sequence[str] = ()
    """What its scoring process warned of as it made the model resident."""


def commit_unit(batch: pa.Table, scores_url: str, rescored: bool) -> pa.Table:
    """The last stage: publish a unit's part, and say what was done."""
    unit = Unit.from_json(batch["unit"][0].as_py())
    failure, kind = (batch[name][0].as_py() for name in ("failure", "failure_kind"))
    names = ("num_tokens", "rows_reused", "started", "warnings")
    known = {name: batch[name][0].as_py() for name in names}
    try:
        if failure:
            done = failed(unit, failure, kind)
        else:
            part = from_ipc(batch["part"][0].as_buffer())
            done = publish_part(unit, part, scores_url, rescored, **known)
    except CherryError as err:
        done = failed(unit, str(err), type(err).__name__)
    as_row = {**asdict(done), "rows_by_status": list(done.rows_by_status.items())}
    return pa.Table.from_pylist([as_row], schema=_DONE)


def publish_part(
    unit: Unit,
    part: pa.Table,
    scores_url: str,
    rescored: bool,
    *,
    num_tokens: int,
    rows_reused: int,
    started: float,
    warnings: Sequence[str] = (),
) -> UnitDone:
    """Publish a unit's part, whole and only if absent; a rescored one replaces its own."""
    publish = storage.replace if rescored else storage.publish
    publish(unit.part_url(scores_url), to_parquet(part))
    return replace(_done(unit, part, num_tokens, rows_reused, started), warnings=warnings)


def find_parts(units: Iterable[Unit], scores_url: str) -> Iterator[UnitDone]:
    """The units whose part is there though nobody said so: the answer was lost with its node.

    What it took is not known any more: they count no tokens.
    """
    names = listing.list_names(scores_url)
    for unit in units:
        url = unit.part_url(scores_url)
        if url.rpartition("/")[2] in names:
            with storage.open_parquet(url) as parquet:
                part = parquet.read(columns=["status", "ifd_loss_ratio"])  # as far as it has them
            yield _done(unit, part, 0, 0, time.time())


def _done(
    unit: Unit, part: pa.Table, num_tokens: int, rows_reused: int, started: float
) -> UnitDone:
    over_one = 0
    if "ifd_loss_ratio" in part.schema.names:  # no embedding
        over_one = pc.sum(pc.greater_equal(part["ifd_loss_ratio"], 1.0)).as_py() or 0
    return UnitDone(
        unit_id=unit.unit_id,
        shard_url=unit.shard_url,
        rows=unit.num_rows,
        rows_by_status=dict(Counter(part["status"].to_pylist())),
        rows_reused=rows_reused,
        tokens=num_tokens,
        started=started,
        committed=time.time(),
        over_one=over_one,
        failure=None,
        failure_kind=None,
    )


def failed(unit: Unit, failure: str, kind: str) -> UnitDone:
    """A unit without a part."""
    now = time.time()
    return UnitDone(
        unit.unit_id, unit.shard_url, unit.num_rows, {}, 0, 0, now, now, 0, failure, kind
    )


def to_parquet(table: pa.Table) -> bytes:
    """A table as the bytes of one Parquet object; the same table gives the same bytes."""
    sink = io.BytesIO()
    # Numbers hardly repeat: a dictionary of them makes parts 15 % larger and reading 40 % slower.
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=["status", "reason"],
        write_page_checksum=True,  # a flipped bit would be another score
    )
    return sink.getvalue()


_DONE = pa.schema(
    [
        ("unit_id", pa.string()),
        ("shard_url", pa.string()),
        ("rows", pa.int64()),
        ("rows_by_status", pa.map_(pa.string(), pa.int64())),
        ("rows_reused", pa.int64()),
        ("tokens", pa.int64()),
        ("started", pa.float64()),
        ("committed", pa.float64()),
        ("over_one", pa.int64()),
        ("failure", pa.string()),
        ("failure_kind", pa.string()),
        ("warnings", pa.list_(pa.string())),
    ]
)
