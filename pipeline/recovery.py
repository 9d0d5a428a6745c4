"""Recovery: what a dead process took with it is tried again, and a row that kills is found.

::

    pass 1      all units, once          lost: its process died or hung, or it raised
    pass 2      the lost ones, again     a spot machine that vanished does not do so twice; what
                                         was read together with a deadly row is read alone
    isolation   a unit lost twice, in    first whole; then in pieces of about the square root of
                a process of its own     its rows; a piece that is lost, row by row

A row alone that is lost in two processes, dead or raising, is `error` with a reason; every other
row is scored. A deadly row costs six processes, however many rows its unit has; one that hangs,
three times the unit's timeout, and a tenth of it for the piece and for each try alone.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from pipeline import scoring as stages
from pipeline.errors import CherryError, LostUnitError, ScoringError
from pipeline.parts import UnitDone, failed, find_parts, publish_part
from pipeline.schemas import from_ipc, to_ipc
from pipeline.scoring import LOAD_TIMEOUT_S, UnitScorer
from pipeline.settings import Scoring
from pipeline.texts import count, describe_cause
from pipeline.tokenising import prepare
from pipeline.units import Unit

log = logging.getLogger("cherry")

_PASSES = 2
_ATTEMPTS_ALONE = 2
_STARTS = 2
_SHARE_OF_A_PIECE = 0.1
"""Of the unit's timeout, at least, for any piece of it."""


def score_units(units: list[Unit], scoring: Scoring) -> Iterator[UnitDone]:
    """Score units and commit their parts, whatever some rows do; in any order, each once.

    Raises:
        ScoringError: Scoring processes die or never start, and no row is to blame.
    """
    left = {unit.unit_id: unit for unit in units}
    tried: Counter[str] = Counter()
    while offered := [unit for unit in left.values() if tried[unit.unit_id] < _PASSES]:
        broken: RayError | None = None
        try:
            for done in stages.score_pass(offered, scoring, alone=bool(tried)):
                if done.failure_kind != LostUnitError.__name__:
                    del left[done.unit_id]
                    yield done
            tried.update(unit.unit_id for unit in offered)
        except RayError as err:  # nobody knows which units were tried
            broken = err
        if left and not scoring.rescore:  # a rescored unit has its old part all the time
            for done in find_parts(list(left.values()), scoring.scores_url):
                del left[done.unit_id]
                yield done
        # As long as each pass finishes some, there is an end to it.
        if broken and all(unit.unit_id in left for unit in offered):
            raise ScoringError(
                f"scoring: no unit of {len(offered)} could be finished; their processes die. The "
                f"last cause: {describe_cause(broken)}. Look at the logs of the scoring actors; "
                "most often the model does not fit the memory. What is scored is kept."
            ) from broken
        if left:
            log.warning("lost with a process, and tried again: %s", count(len(left), "unit"))
    if left:
        log.warning(
            "lost twice, and looked through for rows that do it: %s", count(len(left), "unit")
        )
        yield from _isolate(list(left.values()), scoring)


def _isolate(units: list[Unit], scoring: Scoring) -> Iterator[UnitDone]:
    ward = _Ward()
    pool = ThreadPoolExecutor(min(len(units), scoring.workers.actors))
    try:
        jobs = [pool.submit(_isolate_unit, unit, scoring, ward) for unit in units]
        for job in as_completed(jobs):
            yield job.result()
    finally:
        ward.close()  # or the threads would go on, and start a Ray of their own after this one
        pool.shutdown(cancel_futures=True)


def _isolate_unit(unit: Unit, scoring: Scoring, ward: "_Ward") -> UnitDone:
    """Score a unit in a process of its own; if that is lost too, in pieces."""
    try:
        with _Cell(scoring, unit, ward) as cell:
            try:
                # Whole: the same packs as in a pass, so the same bytes. Three machines may have
                # been taken away, and no row be to blame.
                pieces = [cell.score(unit)]
                part = pieces[0].part
            except _LostError:
                pieces = list(_score_pieces(cell, unit))
                metadata = {
                    **next((p.part.schema.metadata for p in pieces if p.num_tokens), {}),
                    "cherry.unit": unit.to_json(),
                    "cherry.isolated": "true",
                }
                part = pa.concat_tables([p.part.replace_schema_metadata(None) for p in pieces])
                part = part.unify_dictionaries().combine_chunks().replace_schema_metadata(metadata)
        return publish_part(
            unit,
            part,
            scoring.scores_url,
            scoring.rescore,
            num_tokens=sum(p.num_tokens for p in pieces),
            rows_reused=sum(p.rows_reused for p in pieces),
            started=min(p.started for p in pieces),
        )
    except CherryError as err:
        return failed(unit, str(err), type(err).__name__)


def _score_pieces(cell: "_Cell", unit: Unit) -> Iterator["_Scored"]:
    """A unit in pieces, and the rows of pieces that are lost one by one."""
    step = math.isqrt(unit.num_rows - 1) + 1
    for start in range(unit.start, unit.stop, step):
        piece = replace(unit, start=start, stop=min(start + step, unit.stop))
        try:
            yield cell.score(piece)
        except _LostError:
            for index in range(piece.start, piece.stop):
                yield _score_alone(cell, replace(unit, start=index, stop=index + 1))


def _score_alone(cell: "_Cell", row: Unit) -> "_Scored":
    """A row alone; one that dies is tried again, since its machine may have been taken away."""
    reason = ""
    for _ in range(_ATTEMPTS_ALONE):
        try:
            return cell.score(row)
        except _LostError as err:
            reason = str(err)
    log.warning("shard %s, row %d: error: %s", row.shard_url, row.start, reason)
    error = {"row_index": row.start, "status": "error", "reason": reason}
    error |= {"num_response_tokens": 0, "num_direct_tokens": 0}
    part = pa.Table.from_pylist([error], schema=cell.part_schema)
    return _Scored(part, 0, 0, time.time())


@dataclass(frozen=True)
class _Scored:
    """A scored piece of a unit."""

    part: pa.Table
    num_tokens: int
    rows_reused: int
    started: float


class _LostError(Exception):
    """A piece that got no score; says why."""


class _Ward:
    """All cells of a run: closed, it ends their processes, and there will be no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actors: set[Any] = set()
        self._closed = False

    def admit(self, make: Callable[[], Any]) -> Any:
        """Make an actor."""
        with self._lock:
            if self._closed:
                raise ScoringError("scoring: the run has ended")
            actor = make()
            self._actors.add(actor)
            return actor

    def discharge(self, actor: Any) -> None:
        """End an actor."""
        with self._lock:
            if actor in self._actors:
                self._actors.remove(actor)
                ray.kill(actor)

    def close(self) -> None:
        """End all actors; whoever waits for one gets an error."""
        with self._lock:
            self._closed = True
            for actor in self._actors:
                ray.kill(actor)
            self._actors.clear()


class _Cell:
    """A scoring process that may die: made when it is needed, and again after it died."""

    def __init__(self, scoring: Scoring, unit: Unit, ward: _Ward) -> None:
        self._scoring = scoring
        self._unit = unit
        self._ward = ward
        self._actor: Any = None

    def __enter__(self) -> "_Cell":
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()

    @property
    def part_schema(self) -> pa.Schema:
        """Of what it gives."""
        return self._scoring.settings.part_schema

    def score(self, piece: Unit) -> _Scored:
        """Score a piece of the unit; raises _LostError if that cannot be done in time."""
        actor = self._actor or self._make()
        share = max(piece.num_rows / self._unit.num_rows, _SHARE_OF_A_PIECE)
        timeout_s = self._scoring.timeout_s * share
        try:
            table, *counts = ray.get(actor.score.remote(piece.to_json()), timeout=timeout_s)
            return _Scored(from_ipc(pa.py_buffer(table)), *counts)
        except GetTimeoutError:
            self._give_up()
            raise _LostError(f"TimeoutError: not scored within {timeout_s:g} s") from None
        except RayTaskError as err:
            if isinstance(err.cause, CherryError):
                raise err.cause from None
            # The process may be broken for good, as by an assertion of a GPU's kernel: whether it
            # was the row, another process tells.
            self._give_up()
            if isinstance(err.cause, RayError):  # known scores that were lost with their node
                raise ScoringError(f"scoring: {describe_cause(err)}. Run again.") from err
            raise _LostError(f"{type(err.cause).__name__}") from None
        except RayError:
            self._give_up()
            raise _LostError("ProcessDied: the row takes its process with it") from None

    def _make(self) -> Any:
        workers = self._scoring.workers
        options = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus}
        make: Any = _CellActor  # Ray types a decorated class as the class
        make = make.options(**options, max_restarts=0, max_task_retries=0)
        cause: RayError | None = None
        for _ in range(_STARTS):
            actor = self._ward.admit(lambda: make.remote(self._scoring))
            try:
                ray.get(actor.ready.remote(), timeout=LOAD_TIMEOUT_S)
                self._actor = actor
                return actor
            except RayTaskError as err:
                raise (err.cause if isinstance(err.cause, CherryError) else err) from None
            except (RayError, GetTimeoutError) as err:  # its node may have been taken away
                self._ward.discharge(actor)
                cause = err
        raise ScoringError(
            f"scoring: no process could be started for unit {self._unit.unit_id} of "
            f"{self._unit.shard_url}: {describe_cause(cause)}. What is scored is kept; run again."
        ) from cause

    def _give_up(self) -> None:
        if self._actor is not None:
            self._ward.discharge(self._actor)
        self._actor = None


@ray.remote
class _CellActor:
    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self._scorer = UnitScorer(scoring)

    def ready(self) -> None:
        """Load the model, which has its own timeout."""
        self._scorer.load()

    def score(self, piece_json: str) -> tuple[bytes, int, int, float]:
        tokens, reused = prepare(Unit.from_json(piece_json), self._scoring)
        part, num_tokens, started = self._scorer.score(piece_json, tokens, reused)
        return to_ipc(part), num_tokens, len(reused), started
