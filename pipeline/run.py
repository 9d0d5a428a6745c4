"""The flow, one call a step.

::

    list inputs -> work units -> [ tokenise -> score -> commit ] -> audit -> select -> write
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline import accounting, cluster, errors, garbage, recovery, reuse, selection
from pipeline import estimate as estimates
from pipeline.accounting import Audit
from pipeline.budgets import SelectSettings
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.estimate import Estimate
from pipeline.garbage import Garbage
from pipeline.job import Job, check, plan
from pipeline.parts import UnitDone
from pipeline.schemas import FAILED_STATUSES
from pipeline.selection import Selection
from pipeline.settings import Scoring
from pipeline.survey import Survey
from pipeline.units import Plan, Unit

log = logging.getLogger("cherry")

_WARN_OVER_ONE = 0.5
"""Share of scored rows with IFD >= 1 from which something is off, most often the template."""


@dataclass
class Summary:
    """What a run did: the object that `--json` prints."""

    rows: int
    rows_by_status: dict[str, int]
    units_total: int
    units_scored: int
    units_reused: int
    rows_reused: int
    tokens_scored: int
    tokens_per_s: float | None
    seconds: float
    selected_rows: int | None
    cut: float | None
    score_fingerprint: str
    scores_path: str
    cherry_path: str | None
    manifest: str | None
    skipped_shards: list[str] = field(default_factory=list)

    @property
    def failed_fraction(self) -> float:
        """Share of rows that count against `max_error_fraction`."""
        return sum(self.rows_by_status.get(s, 0) for s in FAILED_STATUSES) / max(1, self.rows)


@dataclass(frozen=True)
class Result:
    """A summary, and what the terminal report shows besides."""

    summary: Summary
    plan: Plan
    selection: Selection | None = None
    survey: Survey | None = None


Progress = Callable[[UnitDone, int], None]
"""Called with each finished unit and the number of units to do."""


def run(config: Config, progress: Progress | None = None, *, retry_errors: bool = False) -> Result:
    """Score what is new, select, and write the cherry subset."""
    return _run(config, progress, retry_errors=retry_errors, selecting=True)


def score(
    config: Config, progress: Progress | None = None, *, retry_errors: bool = False
) -> Result:
    """Score what is new; `retry_errors` also rescores rows that ended as `error`."""
    return _run(config, progress, retry_errors=retry_errors, selecting=False)


def _run(
    config: Config, progress: Progress | None, *, retry_errors: bool, selecting: bool
) -> Result:
    begun = time.monotonic()
    checked = check(config, selecting=selecting)
    with cluster.connected():
        job = plan(checked)
        done = _rescore(job, progress) if retry_errors else []
        done += _score(job, progress)
        finished = job.plan.without({unit.unit_id for unit in done if unit.failure})
        audited = accounting.audit(finished)
        summary = _summarise(job, finished, done, audited, begun)
        if not selecting:
            return Result(summary, finished)
        return _select(job, finished, audited, summary, begun)


def select(config: Config) -> Result:
    """Select from parts that are there, without any model.

    Raises:
        InputError: Units of the input have no part yet.
    """
    begun = time.monotonic()
    checked = check(config, selecting=True)
    with cluster.connected():
        job = plan(checked)
        if missing := job.plan.pending(job.plan.parts()):
            raise InputError(
                f"{job.plan.scores_url}: {len(missing)} of {len(job.plan.units)} units are not "
                "scored yet. Run: cherry score CONFIG."
            )
        audited = accounting.audit(job.plan)
        summary = _summarise(job, job.plan, [], audited, begun)
        return _select(job, job.plan, audited, summary, begun)


def estimate(config: Config, num_scored: int) -> Estimate:
    """Say what a run would score and how long that takes; `num_scored` rows are scored to know."""
    checked = check(config, selecting=False)
    with cluster.connected():
        found = estimates.estimate(plan(checked), num_scored)
    _warn_over_one(found.over_one_fraction or 0.0)
    return found


def gc(config: Config, all_scores: bool, delete: bool, force: bool) -> Garbage:
    """Find what no current input names, and delete it if asked."""
    checked = check(config, selecting=False)
    with cluster.connected():
        found = garbage.find(plan(checked), all_scores=all_scores)
    if delete:
        garbage.delete(found, force=force)
    return found


def _score(job: Job, progress: Progress | None) -> list[UnitDone]:
    """Score the units that have no part, but for rows that have a score."""
    parts = job.plan.parts()
    pending = job.plan.pending(parts)
    stale = job.plan.stale(parts) if job.config.score.reuse == "rows" else []
    known = reuse.gather(stale) if pending and stale else None
    return _score_units(job, pending, progress, known=known)


def _rescore(job: Job, progress: Progress | None) -> list[UnitDone]:
    """Score rows with status `error` again, and replace their parts."""
    there = job.plan.without({u.unit_id for u in job.plan.pending(job.plan.parts())})
    with_errors = accounting.audit(there).with_errors()
    units = [unit for unit in there.units if unit.unit_id in with_errors]
    return _score_units(job, units, progress, rescore=True)


def _score_units(
    job: Job,
    pending: list[Unit],
    progress: Progress | None,
    *,
    known: reuse.KnownRows | None = None,
    rescore: bool = False,
) -> list[UnitDone]:
    if not pending:
        return []
    workers = cluster.plan_workers(job.config.cluster)
    log.info("scoring %d of %d units, %s", len(pending), len(job.plan.units), workers.describe())
    scoring = Scoring(
        settings=job.settings,
        scores_url=job.plan.scores_url,
        workers=workers,
        timeout_s=job.config.score.unit_timeout_s,
        known=known,
        rescore=rescore,
    )
    done = []
    for unit in recovery.score_units(pending, scoring):
        if unit.failure:
            _raise_failure(unit, job.config.input.on_bad_shard)
        done.append(unit)
        if progress:
            progress(unit, len(pending))
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


def _summarise(
    job: Job, finished: Plan, done: list[UnitDone], audited: Audit, begun: float
) -> Summary:
    failed = {str(unit.failure) for unit in done if unit.failure}
    scored = [unit for unit in done if not unit.failure]
    scored_ids = {unit.unit_id for unit in scored}
    reused = [unit for unit in finished.units if unit.unit_id not in scored_ids]
    with_model = [unit for unit in scored if unit.tokens]
    seconds_scoring = max((u.committed for u in with_model), default=0.0) - min(
        (u.started for u in with_model), default=0.0
    )
    tokens = sum(unit.tokens for unit in scored)
    num_ok = sum(unit.rows_by_status.get("ok", 0) for unit in scored)
    _warn_over_one(sum(unit.over_one for unit in scored) / max(1, num_ok))
    counts = audited.rows_by_status
    return Summary(
        rows=counts.total(),
        rows_by_status=dict(sorted(counts.items())),
        units_total=len(job.plan.units),
        units_scored=len(scored_ids),
        units_reused=len(reused),
        rows_reused=sum(u.num_rows for u in reused) + sum(u.rows_reused for u in scored),
        tokens_scored=tokens,
        tokens_per_s=round(tokens / seconds_scoring, 1) if tokens and seconds_scoring > 0 else None,
        seconds=round(time.monotonic() - begun, 3),
        selected_rows=None,
        cut=None,
        score_fingerprint=job.score_fp,
        scores_path=finished.scores_url,
        cherry_path=None,
        manifest=None,
        skipped_shards=[*job.corpus.skipped, *sorted(failed)],
    )


def _select(job: Job, finished: Plan, audited: Audit, summary: Summary, begun: float) -> Result:
    settings = SelectSettings.from_config(job.config.select, job.config.preset.ratio)
    selected, survey = selection.select(
        finished, job.corpus, job.config.output, settings, job.score_fp, audited
    )
    summary.selected_rows = selected.manifest["selected_rows"]
    summary.cut = selected.manifest["cut"]
    summary.cherry_path = selected.url
    summary.manifest = selected.manifest_url
    summary.seconds = round(time.monotonic() - begun, 3)
    return Result(summary, finished, selected, survey)


def _warn_over_one(share: float) -> None:
    if share > _WARN_OVER_ONE:
        log.warning(
            "%.0f %% of the scored rows have an IFD of 1 or more: the instruction does not help "
            "the model. Most often the template does not fit it: a chat template on a base model "
            "(try score.preset: cherry), or responses in a language it does not know.",
            100 * share,
        )
