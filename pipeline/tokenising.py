"""Tokenising: read a unit's rows, look up known scores, render and tokenise the rest."""

import faulthandler
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import listing, models, reuse, storage
from pipeline.errors import (
    ChangedError,
    CherryError,
    InputError,
    LostUnitError,
    ShardError,
    StorageError,
)
from pipeline.rendering import Renderer
from pipeline.rows import read_units
from pipeline.samples import Sample, read_samples, sample_id
from pipeline.schemas import PART, TOKENS, hand_on
from pipeline.settings import Scoring, ScoringSettings
from pipeline.storage_faults import is_outage
from pipeline.units import Unit


def tokenise_units(batch: pa.Table, scoring: Scoring) -> Iterator[pa.Table]:
    """The first stage: the units of a read as JSON in; of each, TOKENS and PART bytes out."""
    units = [Unit.from_json(text) for text in batch["units"][0].as_py()]
    tables = read_units(units)
    for number, unit in enumerate(units):
        failure: CherryError | None = None
        tokens = reused = None
        try:
            with deadline(scoring.timeout_s):
                tokens, reused = prepare(unit, scoring, tables)
        except CherryError as err:
            failure = err
        except Exception as err:  # noqa: BLE001  # whatever it is, recovery finds the row
            failure = LostUnitError(type(err).__name__)
        if failure:  # may be the end of the tables
            tables = read_units(units[number + 1 :])
        yield hand_on(unit.to_json(), tokens, reused, failure=failure)


def read(unit: Unit, tables: Iterator[pa.Table] | None = None) -> list[Sample]:
    """The samples of a unit; its rows are the next of `tables`, if it is read with others.

    Raises:
        ShardError: The shard cannot be read.
        StorageError: The store does not give it, or another one in its place.
    """
    try:
        return _samples(unit, tables or read_units([unit]))
    except ChangedError as err:  # the shard is good, and must not be left out
        raise StorageError(f"shard {unit.shard_url}: {err} What is scored is kept.") from err
    except (InputError, pa.ArrowException, OSError) as err:
        if is_outage(err):  # else `on_bad_shard: skip` would leave out good shards
            raise StorageError(
                f"shard {unit.shard_url}: {err} What is scored is kept; run again."
            ) from err
        raise ShardError(f"shard {unit.shard_url}: {err}") from err


def _samples(unit: Unit, tables: Iterator[pa.Table]) -> list[Sample]:
    try:
        return list(read_samples(next(tables), unit.columns))
    except (InputError, pa.ArrowException, OSError) as err:
        if unit.version and not is_outage(err):
            listing.refuse_changed(unit.file)  # one that is being written over is no bad one
        raise


def prepare(
    unit: Unit, scoring: Scoring, tables: Iterator[pa.Table] | None = None
) -> tuple[pa.Table, pa.Table]:
    """Read a unit's rows and find out which of them must be scored.

    Args:
        unit: The unit.
        scoring: The settings.
        tables: As `read`.

    Returns:
        tokens: Rows to score, in the TOKENS schema.
        reused: Rows that have a score already, in the PART schema.

    Raises:
        ShardError, StorageError: As `read`.
    """
    samples = read(unit, tables)
    todo = np.ones(len(samples), bool)
    reused = scoring.settings.part_schema.empty_table()
    if scoring.rescore:
        part = _own_part(unit, scoring)
        todo = pc.equal(part["status"], "error").to_numpy()
        reused = part.filter(pa.array(~todo))
    elif scoring.known:
        ids = [None if s.malformed else sample_id(s.messages) for s in samples]
        positions, known = reuse.find(scoring.known, ids)
        todo[positions] = False
        reused = _as_part(positions + unit.start, known)
    positions = np.flatnonzero(todo)
    chosen = [samples[i] for i in positions]
    return tokenise(positions + unit.start, chosen, scoring.settings), reused


def renderer(settings: ScoringSettings, *, direct: bool = True) -> Renderer:
    """One per worker process: loading a tokenizer takes longer than tokenising a unit.

    `direct` as in Renderer: whether answers are scored alone, too.
    """
    return _renderer(settings, direct)


@functools.cache
def _renderer(settings: ScoringSettings, direct: bool) -> Renderer:
    tokenizer = models.load_tokenizer(settings.model)
    return Renderer(
        tokenizer, settings.template, settings.max_length, settings.pair_tokens, direct=direct
    )


def tokenise(
    row_indices: npt.NDArray[np.int64], samples: Sequence[Sample], settings: ScoringSettings
) -> pa.Table:
    """Render and tokenise samples, in the TOKENS schema."""
    rendered = renderer(settings, direct=settings.measure == "ifd")(samples)
    ids = [
        None if r.status == "malformed" else sample_id(s.messages)
        for r, s in zip(rendered, samples, strict=True)
    ]
    columns = [
        row_indices,
        ids,
        [r.status for r in rendered],
        [r.reason for r in rendered],
        [r.input_ids for r in rendered],
        [r.num_prompt_tokens for r in rendered],
        [r.truncated for r in rendered],
        [[tuple(asdict(t).values()) for t in r.turns] for r in rendered],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, TOKENS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=TOKENS)


def _own_part(unit: Unit, scoring: Scoring) -> pa.Table:
    """The rows of a unit, or of a piece of one, from its part."""
    with storage.open_parquet(unit.part_url(scoring.scores_url)) as parquet:
        part = parquet.read().replace_schema_metadata(None).cast(scoring.settings.part_schema)
    return part.slice(unit.start - part["row_index"][0].as_py(), unit.num_rows)


def _as_part(row_indices: npt.NDArray[np.int64], known: pa.Table) -> pa.Table:
    """Rows of the KNOWN schema as rows of a part."""
    columns = {
        **{name: known[name] for name in known.schema.names},
        "row_index": pa.array(row_indices, pa.int64()),
        "status": pa.array(["ok"] * len(known), pa.string()),
        "reason": pa.nulls(len(known), pa.string()),
    }
    rows = pa.table([columns[name] for name in PART.names], names=PART.names)
    return rows.sort_by("row_index").cast(PART)  # they were found bucket by bucket


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer, wherever it hangs.

    The watchdog is a thread of C that needs no interpreter lock: it also ends a regular expression
    or a kernel that holds it. Where it hung is in the worker's log.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
