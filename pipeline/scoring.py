"""Scoring: the Ray Data stages that turn work units into parts.

::

    unit ──> tokenise (CPU tasks) ──> score (actor pool, resident model) ──> commit (CPU tasks)
             read rows, render,        losses of both passes,                encode, publish once,
             find spans                status per row                        say what was done

A unit is one Ray row; what travels between the stages is its table as Arrow IPC bytes, in the
schemas of schemas.py. A unit whose shard turns out to be unreadable travels as a failure.
"""

import functools
import io
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy

from pipeline import models, storage
from pipeline.cluster import Workers
from pipeline.config import TemplateName
from pipeline.engine import Engine, keep_freed_memory
from pipeline.errors import InputError
from pipeline.metric import score_table
from pipeline.models import ModelRef
from pipeline.rendering import RENDERING_VERSION, Renderer
from pipeline.samples import read_samples, sample_id
from pipeline.schemas import BAD_LINE, TOKENS
from pipeline.units import Plan, Unit, fingerprint

SCORING_VERSION = 1

# Logical CPUs of a task. Ray fuses neighbouring stages that ask for the same: tokenising would then
# run inside the scoring actor. No actor's share of its node is ever one of these numbers.
_TOKENISE_CPUS = 0.47
_COMMIT_CPUS = 0.23


@dataclass(frozen=True)
class ScoringSettings:
    """Resolved settings of scoring: no `auto` and no null is left where a score depends on it."""

    model: ModelRef
    template: TemplateName
    pair_tokens: bool
    max_length: int
    dtype: Literal["bfloat16", "float16", "float32"]
    max_batch_tokens: int | Literal["auto"]
    """`auto` is resolved on the actor's device; packs agree within rounding, so it is no part of
    the fingerprint."""

    def fingerprint(self, template_text: str, tokenizer_fp: str) -> str:
        """`score_fp`: everything that can change a score."""
        return fingerprint(
            {
                "model": self.model.fingerprint,
                "tokenizer": tokenizer_fp,
                "template": template_text,
                "pair_tokens": self.pair_tokens,
                "max_length": self.max_length,
                "dtype": self.dtype,
                "rendering_version": RENDERING_VERSION,
                "scoring_version": SCORING_VERSION,
            }
        )


@dataclass(frozen=True)
class UnitDone:
    """What the commit stage says of a unit."""

    unit_id: str
    shard_url: str
    rows: int
    rows_by_status: dict[str, int]
    tokens: int
    """Sequence lengths of both passes."""
    started: float
    """Unix time, in seconds, when its scoring began."""
    committed: float
    """Unix time, in seconds, when its part was there."""
    over_one: int
    """Rows with IFD of 1 or more."""
    failure: str | None
    """Why the unit has no part: its shard could not be read."""


def score_units(
    plan: Plan, pending: list[Unit], settings: ScoringSettings, workers: Workers
) -> Iterator[UnitDone]:
    """Score units and commit their parts; yields each as it is done, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.print_on_execution_start = False
    rows = [{"unit": unit.to_json()} for unit in pending]
    # Any: Ray types a stage's function without its fn_kwargs.
    tokenise: Any = tokenise_unit
    commit: Any = commit_unit
    stages = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            tokenise,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=_TOKENISE_CPUS,
            fn_kwargs={"settings": settings},
        )
        .map_batches(
            UnitScorer,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=workers.actors),
            num_gpus=workers.num_gpus,
            num_cpus=workers.num_cpus,
            fn_constructor_kwargs={
                "settings": settings,
                "device": "cuda" if workers.num_gpus else "cpu",
                "threads": workers.threads,
            },
        )
        .map_batches(
            commit,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=_COMMIT_CPUS,
            fn_kwargs={"scores_url": plan.scores_url},
        )
    )
    for row in stages.iter_rows():
        yield UnitDone(**{**row, "rows_by_status": dict(row["rows_by_status"])})


def tokenise_unit(batch: pa.Table, settings: ScoringSettings) -> pa.Table:
    """Read a unit's rows, render and tokenise them: one row of unit JSON in, TOKENS bytes out."""
    text = batch["unit"][0].as_py()
    unit = Unit.from_json(text)
    try:
        rows = read_rows(unit)
    except (InputError, pa.ArrowException, OSError) as err:
        return _hand_on(text, b"", failure=f"shard {unit.shard_url}: {err}")
    samples = list(read_samples(rows, unit.columns))
    rendered = _renderer(settings)(samples)
    ids = [
        None if r.status == "malformed" else sample_id(s.messages)
        for r, s in zip(rendered, samples, strict=True)
    ]
    columns = [
        range(unit.start, unit.stop),
        ids,
        [r.status for r in rendered],
        [r.reason for r in rendered],
        [r.input_ids for r in rendered],
        [r.num_prompt_tokens for r in rendered],
        [r.truncated for r in rendered],
        [[tuple(asdict(t).values()) for t in r.turns] for r in rendered],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, TOKENS, strict=True)]
    return _hand_on(text, to_ipc(pa.Table.from_arrays(arrays, schema=TOKENS)))


def read_rows(unit: Unit, columns: list[str] | None = None) -> pa.Table:
    """The rows of a unit, streaming through the row groups that hold them.

    Args:
        unit: Which rows.
        columns: Columns to read, where the shard has them; None is the layout's own.
    """
    with storage.open_parquet(unit.read_url) as parquet:
        wanted = columns or [*unit.columns.names.values(), BAD_LINE]
        names = [n for n in parquet.schema_arrow.names if n in wanted]
        pieces: list[pa.Table] = []
        offset = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            if offset < unit.stop and offset + num_rows > unit.start:
                for batch in parquet.iter_batches(row_groups=[group], columns=names):
                    first, last = max(unit.start - offset, 0), unit.stop - offset
                    if last > 0 and first < len(batch):
                        pieces.append(pa.table(batch.slice(first, last - first)))
                    offset += len(batch)
            else:
                offset += num_rows
        table = pa.concat_tables(pieces)
    if len(table) != unit.num_rows:
        raise InputError(
            f"{unit.read_url}: got {len(table)} rows, expected {unit.num_rows}: it changed "
            "while it was read. Run again."
        )
    return table


class UnitScorer:
    """A resident model: scores units as they come. One per actor."""

    def __init__(self, settings: ScoringSettings, device: str, threads: int) -> None:
        """Load the model on `device` (cuda or cpu); the node fetches it once."""
        # Ray starts workers with one OpenMP thread, and calls an actor on another thread than the
        # one that makes it; OpenMP keeps number and pool per thread. Two pools would be more
        # threads than cores, which then sleep instead of spinning: 23,000 tokens/s of a model of
        # 260,000 parameters instead of 37,000. So threads come with the first call.
        self._threads = threads
        keep_freed_memory()
        dtype: torch.dtype = getattr(torch, settings.dtype)
        model = models.load(settings.model, dtype, torch.device(device))
        self.engine = Engine(model, settings.max_batch_tokens, settings.max_length)
        self.prefix_ids = _renderer(settings).prefix_ids

    def __call__(self, batch: pa.Table) -> pa.Table:
        """TOKENS bytes in, PART bytes out."""
        text, failure = batch["unit"][0].as_py(), batch["failure"][0].as_py()
        if failure:
            return _hand_on(text, b"", failure=failure)
        torch.set_num_threads(self._threads)
        started = time.time()
        tokens = from_ipc(batch["payload"][0].as_buffer())
        part, num_tokens = score_table(tokens, self.engine, self.prefix_ids)
        part = part.replace_schema_metadata(self._metadata(text))
        return _hand_on(text, to_ipc(part), started=started, tokens=num_tokens)

    def _metadata(self, unit: str) -> dict[str, str]:
        return {
            "cherry.unit": unit,
            "cherry.device": self.engine.device.type,
            "cherry.threads": str(torch.get_num_threads()),
            "cherry.max_batch_tokens": str(self.engine.max_batch_tokens),
            "cherry.mode": self.engine.mode,
            "cherry.torch": torch.__version__,
        }


def commit_unit(batch: pa.Table, scores_url: str) -> pa.Table:
    """Publish a unit's part, whole and only if absent, and say what was done."""
    row = {name: batch[name][0].as_py() for name in ("unit", "started", "tokens", "failure")}
    unit = Unit.from_json(row["unit"])
    counts: Counter[str] = Counter()
    over_one = 0
    if not row["failure"]:
        part = from_ipc(batch["payload"][0].as_buffer())
        counts.update(part["status"].to_pylist())
        over_one = sum(1 for ratio in part["ifd_loss_ratio"].to_pylist() if ratio and ratio >= 1)
        storage.publish(storage.join(scores_url, f"{unit.unit_id}.parquet"), to_parquet(part))
    done = UnitDone(
        unit_id=unit.unit_id,
        shard_url=unit.shard_url,
        rows=unit.num_rows,
        rows_by_status=dict(counts),
        tokens=row["tokens"],
        started=row["started"],
        committed=time.time(),
        over_one=over_one,
        failure=row["failure"],
    )
    as_row = {**asdict(done), "rows_by_status": list(done.rows_by_status.items())}
    schema = pa.schema([("rows_by_status", pa.map_(pa.string(), pa.int64())), *_DONE_FIELDS])
    return pa.Table.from_pylist([as_row], schema=schema)


_DONE_FIELDS = [
    pa.field("unit_id", pa.string()),
    pa.field("shard_url", pa.string()),
    pa.field("rows", pa.int64()),
    pa.field("tokens", pa.int64()),
    pa.field("started", pa.float64()),
    pa.field("committed", pa.float64()),
    pa.field("over_one", pa.int64()),
    pa.field("failure", pa.string()),
]


def to_parquet(table: pa.Table) -> bytes:
    """A table as the bytes of one Parquet object; the same table gives the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


@functools.cache
def _renderer(settings: ScoringSettings) -> Renderer:
    """One per worker process: loading a tokenizer takes longer than tokenising a unit."""
    tokenizer = models.load_tokenizer(settings.model)
    return Renderer(tokenizer, settings.template, settings.max_length, settings.pair_tokens)


def _hand_on(
    unit: str,
    payload: bytes,
    *,
    started: float = 0.0,
    tokens: int = 0,
    failure: str | None = None,
) -> pa.Table:
    return pa.table(
        {
            "unit": pa.array([unit], pa.string()),
            "payload": pa.array([payload], pa.large_binary()),
            "started": pa.array([started], pa.float64()),
            "tokens": pa.array([tokens], pa.int64()),
            "failure": pa.array([failure], pa.string()),
        }
    )


def to_ipc(table: pa.Table) -> bytes:
    """A table as Arrow IPC stream bytes, as it travels between stages."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def from_ipc(buffer: pa.Buffer) -> pa.Table:
    """The inverse of `to_ipc`."""
    return pa.ipc.open_stream(buffer).read_all()
