"""Scoring: the Ray Data stages that turn work units into parts.

::

    units ──> tokenise (CPU tasks) ──> score (actor pool, resident model) ──> commit (CPU tasks)
              read rows, take known    losses of both passes,                encode, publish once,
              scores, render and       status per row                        say what was done
              tokenise the rest

Neighbours in a shard are read in one sweep; behind that a unit is one Ray row and one task. What
travels between the stages is its tables as Arrow IPC bytes, in the schemas of schemas.py. What is
wrong with a shard, the model or storage travels as a failure. Whatever else goes wrong costs a unit
its turn: recovery.py tries it again.
"""

import functools
import gc
import logging
import os
import queue
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from pipeline import models
from pipeline.cluster import COMMIT_CPUS, TOKENISE_CPUS
from pipeline.compiled import what_runs_compiled
from pipeline.devices import keep_few_kernels, keep_freed_memory
from pipeline.embedding import embed_table
from pipeline.engine import Engine
from pipeline.errors import CherryError, LostUnitError, ScoringError
from pipeline.metric import score_table
from pipeline.parts import UnitDone, commit_unit
from pipeline.rows import plan_reads
from pipeline.schemas import from_ipc, hand_on
from pipeline.settings import Scoring
from pipeline.tokenising import deadline, renderer, tokenise_units
from pipeline.units import Unit

LOAD_TIMEOUT_S = 3600.0
"""Of fetching and loading a model: 140 GB take minutes at 1 GB/s."""

_NUM_STAGES = 3
_READS_PER_ACTOR = 8
_MOST_LOST = 64
"""Tasks, besides one for every fourth unit, that a pass may lose with their processes: about what
is in flight on nodes that a spot market takes back at once."""


def score_pass(units: list[Unit], scoring: Scoring, *, alone: bool = False) -> Iterator[UnitDone]:
    """Send units through the stages once; yields each as it is done, in any order.

    A unit whose process dies or hangs does not come back, and neither do units that wait for the
    same process; one that raises comes back as LostUnitError. Nothing is tried twice here: by
    default Ray would give a unit that kills every process it meets the next one for ever.

    Args:
        units: In the order of shards and rows.
        scoring: The settings.
        alone: Read each unit in a task of its own, so that none is lost with another.

    Raises:
        RayError: So many units are lost that the run is broken, and not some rows: the last cause.
        ScoringError: No unit was finished for as long as every stage together may take.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.print_on_execution_start = False
    context.max_errored_blocks = _MOST_LOST + len(units) // 4
    context.target_max_block_size = 1  # byte: each unit that a task yields is a block of its own
    workers = scoring.workers.at_most(len(units))
    reads = plan_reads(units, len(units) if alone else _READS_PER_ACTOR * workers.actors)
    rows = [{"units": [unit.to_json() for unit in read]} for read in reads]
    # Any: Ray types a stage's function without its fn_kwargs.
    tokenise: Any = tokenise_units
    commit: Any = commit_unit
    options: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    with warnings.catch_warnings():
        # Ray 2.64 will want names for max_retries and its like, and has none yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        stages = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(
                tokenise,
                num_cpus=TOKENISE_CPUS,
                compute=TaskPoolStrategy(size=workers.tokenisers),
                fn_kwargs={"scoring": scoring},
                max_retries=0,
                # It does not wait until somebody takes what it yields: it would keep its core,
                # which those that are to take it may need.
                _generator_backpressure_num_objects=-1,
                **options,
            )
            .map_batches(
                UnitScorer,
                compute=ActorPoolStrategy(
                    min_size=workers.actors,
                    max_size=None if workers.grow else workers.actors,  # None: what fits
                    max_tasks_in_flight_per_actor=workers.units_in_flight,
                ),
                num_gpus=workers.num_gpus,
                num_cpus=workers.num_cpus,
                fn_constructor_kwargs={"scoring": scoring},
                max_restarts=-1,
                max_task_retries=0,
                **options,
            )
            .map_batches(
                commit,
                num_cpus=COMMIT_CPUS,
                fn_kwargs={"scores_url": scoring.scores_url, "rescored": scoring.rescore},
                max_retries=0,
                **options,
            )
        )
    try:
        for row in _within(stages.iter_rows(), LOAD_TIMEOUT_S + _NUM_STAGES * scoring.timeout_s):
            yield UnitDone(**{**row, "rows_by_status": dict(row["rows_by_status"])})
    finally:
        # The pass and its actors refer to each other in circles: until Python finds those, the
        # actors keep their GPUs and cores, and the next pass waited four minutes for them.
        del stages
        gc.collect()


def _within(rows: Iterable[Any], seconds: float) -> Iterator[Any]:
    """The rows of a pass; an error if none comes for so long, where Ray would wait for ever."""
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    end = object()
    left = threading.Event()

    def pull() -> None:
        try:
            for row in rows:
                if left.is_set():
                    return
                arrived.put(row)
            arrived.put(end)
        except BaseException as err:  # noqa: BLE001  # raised where the rows are awaited
            arrived.put(err)

    puller = threading.Thread(target=pull, daemon=True, name="cherry-pass")
    puller.start()
    try:
        while True:
            try:
                row = arrived.get(timeout=seconds)
            except queue.Empty:
                raise ScoringError(
                    f"scoring: no unit was finished for {seconds:,.0f} s. Either no node is left "
                    "that can read, tokenise or score, or score.unit_timeout_s is too long to "
                    "tell. Look at ray status; what is scored is kept, run again."
                ) from None
            if row is end or isinstance(row, BaseException):
                puller.join()  # or it would still hold the pass, and with it the actors
            if row is end:
                return
            if isinstance(row, BaseException):
                raise row
            yield row
    finally:
        left.set()


class UnitScorer:
    """A resident model: scores units as they come. One per actor."""

    def __init__(self, scoring: Scoring) -> None:
        """Take the settings; the model comes with the first row that needs it.

        Where nothing is left to score, no model is loaded; and one that dies while it loads costs
        a unit its turn, which is counted, where an actor that dies being made would be made again
        for ever.
        """
        self._scoring = scoring
        self._warnings: list[str] = []
        keep_freed_memory()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The second stage: TOKENS and PART bytes in, PART bytes out."""
        if batch["failure"][0].is_valid:
            return batch
        text = batch["unit"][0].as_py()
        tokens, reused = (from_ipc(batch[name][0].as_buffer()) for name in ("tokens", "part"))
        try:
            part, num_tokens, started = self.score(text, tokens, reused)
        except CherryError as err:
            return hand_on(text, failure=err)
        except torch.AcceleratorError:
            # The device refuses everything from now on: the next unit gets a process that works.
            traceback.print_exc()
            os._exit(1)
        except Exception as err:  # noqa: BLE001  # whatever it is, recovery finds the row
            return hand_on(text, failure=LostUnitError(type(err).__name__))
        return hand_on(
            text,
            part=part,
            num_tokens=num_tokens,
            rows_reused=len(reused),
            started=started,
            warnings=self._warnings,
        )

    def score(self, unit: str, tokens: pa.Table, reused: pa.Table) -> tuple[pa.Table, int, float]:
        """Score rows and put them among those that have a score.

        Returns:
            part: In the PART schema, in the order of rows.
            num_tokens: Of both passes, over the rows scored.
            started: Unix time when scoring began, the model loaded.
        """
        metadata = {"cherry.unit": unit, "cherry.device": self._scoring.device}
        if not len(tokens):
            return reused.replace_schema_metadata(metadata), 0, time.time()
        # Ray starts workers with one OpenMP thread, and calls an actor on another thread than the
        # one that makes it; OpenMP keeps number and pool per thread. Two pools would be more
        # threads than cores, which then sleep instead of spinning: 23,000 tokens/s of a model of
        # 260,000 parameters instead of 37,000. So threads come with the call.
        torch.set_num_threads(self._scoring.workers.threads)
        engine, prefix_ids = self._resident
        started = time.time()
        with deadline(self._scoring.timeout_s):
            measure = score_table if self._scoring.settings.measure == "ifd" else embed_table
            part, num_tokens = measure(tokens, engine, prefix_ids)
        if len(reused):
            part = pa.concat_tables([part, reused]).unify_dictionaries()
            part = part.sort_by("row_index").combine_chunks()
        metadata |= {
            "cherry.threads": str(torch.get_num_threads()),
            "cherry.max_batch_tokens": str(engine.max_batch_tokens),
            "cherry.mode": engine.mode,
            "cherry.share": ",".join(sorted(engine.share)),
            "cherry.compiled": what_runs_compiled(engine.model, engine.compiled),
            "cherry.torch": torch.__version__,
        }
        return part.replace_schema_metadata(metadata), num_tokens, started

    def load(self) -> None:
        """Make the model resident now, and not with the first row."""
        _ = self._resident

    @functools.cached_property
    def _resident(self) -> tuple[Engine, tuple[int, ...]]:
        """The engine, and what the tokenizer puts before a text."""
        settings = self._scoring.settings
        dtype: torch.dtype = getattr(torch, settings.dtype)
        with deadline(LOAD_TIMEOUT_S), _overheard() as self._warnings:
            model = models.load(
                settings.model,
                dtype,
                torch.device(self._scoring.device),
                num_devices=max(1, int(self._scoring.workers.num_gpus)),
            )
            keep_few_kernels(model)
            engine = Engine(
                model,
                settings.max_batch_tokens,
                settings.max_length,
                settings.share,
                settings.compiled,
                device_share=min(1, self._scoring.workers.num_gpus or 1),
            )
        # Collections need not look again at what stays: they took a good part of a unit's time.
        gc.collect()
        gc.freeze()
        return engine, renderer(settings).prefix_ids


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """What this process warns of meanwhile: its log is far from who started the run."""
    said: list[str] = []
    log = logging.getLogger("cherry")
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)
