"""Units that have no part yet: sent to the models, and the run ended where it must be."""

import logging
from dataclasses import dataclass

from pipeline import accounting, cluster, errors, recovery, reuse, tokenising
from pipeline.accounting import Audit
from pipeline.job import Job
from pipeline.parts import UnitDone, failed
from pipeline.settings import Scoring
from pipeline.units import Plan, Unit
from pipeline.watching import Pace, Progress

log = logging.getLogger("cherry")


@dataclass(frozen=True)
class Measured:
    """A corpus of which every row has been measured: scored, or embedded."""

    job: Job
    plan: Plan
    """Less units of shards that turned out to be unreadable."""
    done: list[UnitDone]
    """What was measured now, and units of unreadable shards."""
    audited: Audit

    @property
    def skipped(self) -> list[str]:
        """Why shards were left out."""
        failures = {str(unit.failure) for unit in self.done if unit.failure}
        return [*self.job.corpus.skipped, *sorted(failures)]

    @property
    def num_skipped(self) -> int:
        """How many shards were left out."""
        failed = {unit.shard_url for unit in self.done if unit.failure}
        return len(self.job.corpus.skipped) + len(failed)


def measure(job: Job, progress: Progress, *, retry_errors: bool = False) -> Measured:
    """Measure what is new; `retry_errors` also measures rows again that ended as `error`."""
    done = _rescore(job, progress) if retry_errors else []
    return _audited(job, done + _score(job, progress))


def measured(job: Job) -> Measured:
    """What was measured before.

    Raises:
        NotScoredError: Units have no part yet.
    """
    return _audited(job, _left_out(job))


def _audited(job: Job, done: list[UnitDone]) -> Measured:
    finished = job.plan.without({unit.unit_id for unit in done if unit.failure})
    return Measured(job, finished, done, accounting.audit(finished))


def _score(job: Job, progress: Progress) -> list[UnitDone]:
    """Score the units that have no part, but for rows that have a score."""
    parts = job.plan.parts()
    pending = job.plan.pending(parts)
    by_row = job.config.score.reuse == "rows" and job.settings.measure == "ifd"
    stale = job.plan.stale(parts) if by_row else []
    known = reuse.gather(stale) if pending and stale else None
    return _score_units(job, pending, progress, known=known)


def _rescore(job: Job, progress: Progress) -> list[UnitDone]:
    """Score rows with status `error` again, and replace their parts."""
    there = job.plan.without({u.unit_id for u in job.plan.pending(job.plan.parts())})
    with_errors = accounting.audit(there).with_errors()
    units = [unit for unit in there.units if unit.unit_id in with_errors]
    return _score_units(job, units, progress, rescore=True)


def _left_out(job: Job) -> list[UnitDone]:
    """Units that have no part because they cannot be read, where bad shards are skipped."""
    missing = job.plan.pending(job.plan.parts())
    unreadable = []
    for unit in missing:
        try:
            if job.config.input.on_bad_shard == "skip":
                tokenising.read(unit)
        except errors.ShardError as err:
            unreadable.append(failed(unit, str(err), errors.ShardError.__name__))
            continue
        raise errors.NotScoredError(
            f"{job.plan.scores_url}: {len(missing)} of {len(job.plan.units)} units are not "
            f"scored yet, in {job.settings.dtype}. Run: cherry score CONFIG; or, where machines of "
            "another kind scored them, set model.dtype to theirs."
        )
    return unreadable


def _score_units(
    job: Job,
    pending: list[Unit],
    progress: Progress,
    *,
    known: reuse.KnownRows | None = None,
    rescore: bool = False,
) -> list[UnitDone]:
    if not pending:
        return []
    workers = cluster.plan_workers(job.config.cluster).at_most(len(pending))
    name = "scoring" if job.settings.measure == "ifd" else "embedding"
    price = job.config.cluster.price_per_gpu_hour
    pace = Pace(name, len(pending), None if price is None else price * workers.devices)
    log.info("%s %d of %d units, %s", name, len(pending), len(job.plan.units), workers.describe())
    progress.phase(name)
    scoring = Scoring(
        settings=job.settings,
        scores_url=job.plan.scores_url,
        workers=workers,
        timeout_s=job.config.score.unit_timeout_s,
        known=known,
        rescore=rescore,
    )
    done = []
    told: set[str] = set()
    for unit in recovery.score_units(pending, scoring):
        if unit.failure:
            _raise_failure(unit, job.config.input.on_bad_shard)
        for warning in unit.warnings:
            if warning not in told:  # each unit brings what its process said
                told.add(warning)
                log.warning("%s", warning)
        done.append(unit)
        pace.add(unit)
        progress.unit(pace)
    return done


def _raise_failure(unit: UnitDone, on_bad_shard: str) -> None:
    """End the run over what a unit says, unless it is a shard that may be skipped."""
    text = unit.failure
    if unit.failure_kind == errors.ShardError.__name__:
        if on_bad_shard == "skip":
            return
        text = (
            f"{text}\nReplace the shard and run again (what is scored is kept), or set "
            "input.on_bad_shard: skip."
        )
    raise getattr(errors, unit.failure_kind or "")(text)
