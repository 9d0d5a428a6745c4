"""The flow, one call a step.

::

    [ embed -> cluster -> train briefly ] -> list inputs -> work units
    -> [ tokenise -> score -> commit ] -> audit -> select -> write -> [ train on the subset ]

The steps in the outer brackets are of configs with `experience` and `train`.
"""

import logging
import time
from dataclasses import dataclass, replace

from pipeline import accounting, cluster, comparison, garbage, pending, phases, selection
from pipeline import estimate as estimates
from pipeline.accounting import Audit
from pipeline.budgets import SelectSettings
from pipeline.comparison import Comparison
from pipeline.config import Config
from pipeline.config_training import TrainConfig
from pipeline.errors import ConfigError, NotTrainedError
from pipeline.estimate import Estimate
from pipeline.garbage import Garbage
from pipeline.job import Checked, Job, check, plan
from pipeline.manifests import Finished
from pipeline.parts import UnitDone
from pipeline.phases import Embedded
from pipeline.summary import Summary, summarise, warn_over_one
from pipeline.survey import Survey
from pipeline.units import Plan
from pipeline.watching import Progress, Silence

log = logging.getLogger("cherry")


@dataclass(frozen=True)
class Result:
    """A summary, and what the terminal report shows besides."""

    summary: Summary
    plan: Plan
    selection: Finished | None = None
    survey: Survey | None = None
    trained: Finished | None = None


def run(config: Config, progress: Progress | None = None, *, retry_errors: bool = False) -> Result:
    """The whole method: score what is new, select, and write the cherry subset.

    With `experience`, the model is trained briefly before; with `train`, the base model is trained
    on the subset after. What is done already is not done again.
    """
    progress = progress or Silence()
    begun = time.monotonic()
    base = check(config, selecting=True)
    with cluster.connected():
        if config.train:
            cluster.plan_trainers(config.cluster, config.train)  # before hours of scoring
        scored = _score(base, progress, retry_errors, begun)
        selected, survey = _select(scored)
        trained = None
        if config.train:
            trained = phases.retrain(plan(base), selected, config.train, progress)
    return _result(scored, begun, selected, survey, trained)


def score(
    config: Config, progress: Progress | None = None, *, retry_errors: bool = False
) -> Result:
    """Score what is new; `retry_errors` also rescores rows that ended as `error`."""
    begun = time.monotonic()
    base = check(config, selecting=False)
    with cluster.connected():
        scored = _score(base, progress or Silence(), retry_errors, begun)
    return Result(scored.summary, scored.plan)


def experience(
    config: Config, progress: Progress | None = None, *, retry_errors: bool = False
) -> tuple[Finished, Embedded]:
    """Embed every prompt, and write the rows of brief experience.

    Raises:
        ConfigError: The config has no `experience`.
    """
    if config.experience is None:
        raise ConfigError("key 'experience': it is missing. `experience: {}` takes the defaults.")
    checked = check(config, selecting=False)
    with cluster.connected():
        embedded = phases.embed(checked, progress or Silence(), retry_errors=retry_errors)
        return phases.choose_experience(embedded, config.experience), embedded


def train(config: Config, progress: Progress | None = None) -> tuple[Finished, Summary]:
    """Train the base model on the cherry subset, which must be there.

    Returns:
        The model, and what its subset was selected from.

    Raises:
        ConfigError: The config has no `train`.
        InputError: The subset is not selected yet.
    """
    if config.train is None:
        raise ConfigError("key 'train': it is missing. `train: {}` takes the defaults.")
    base = check(config, selecting=True)
    with cluster.connected():
        scored = _scored_before(base, time.monotonic())
        selected, _ = _select(scored)
        trained = phases.retrain(plan(base), selected, config.train, progress or Silence())
        return trained, scored.summary


def compare(config: Config, progress: Progress | None = None) -> tuple[Comparison, Summary]:
    """Train the base model on the cherry subset and on controls, and say how they compare.

    What the subset needs is scored and selected first, as far as it is not.

    Returns:
        The comparison, and what its subset was selected from.

    Raises:
        ConfigError: The config has no `compare`.
    """
    if config.compare is None:
        raise ConfigError("key 'compare': it is missing. `compare: {}` takes the defaults.")
    progress = progress or Silence()
    train = config.train or TrainConfig()
    base = check(config, selecting=True)
    held_out = comparison.open_sets(config.compare, config.output)
    with cluster.connected():
        cluster.plan_trainers(config.cluster, train)
        scored = _score(base, progress, retry_errors=False, begun=time.monotonic())
        selected, _ = _select(scored)
        compared = comparison.compare(
            plan(base), scored.plan, selected, held_out, config.compare, train, progress
        )
        return compared, scored.summary


def select(config: Config) -> Result:
    """Select from parts that are there, without any model.

    Raises:
        InputError: Units of the input have no part yet.
    """
    begun = time.monotonic()
    checked = check(config, selecting=True)
    with cluster.connected():
        scored = _scored_before(checked, begun)
        return _result(scored, begun, *_select(scored))


def estimate(config: Config, num_scored: int) -> Estimate:
    """Say what a run would score and how long that takes; `num_scored` rows are scored to know."""
    checked = check(config, selecting=False)
    with cluster.connected():
        try:
            checked = phases.find_experienced_model(checked)
        except NotTrainedError:
            log.info("the estimate is of scoring: brief experience is yet to come, and not in it")
        found = estimates.estimate(plan(checked), num_scored)
    warn_over_one(found.over_one_fraction or 0.0)
    return found


def gc(config: Config, all_scores: bool, delete: bool, force: bool) -> Garbage:
    """Find what no current input names, and delete it if asked."""
    checked = check(config, selecting=False)
    with cluster.connected():
        jobs = [plan(checked, measure="prompt")] if config.experience else []
        try:
            jobs.append(plan(phases.find_experienced_model(checked)))
        except NotTrainedError:
            log.info("brief experience is yet to come: only embeddings are looked at")
        found = garbage.find(jobs, all_scores=all_scores)
    if delete:
        garbage.delete(found, force=force)
    return found


@dataclass(frozen=True)
class _Scored:
    """An input whose rows all have scores."""

    job: Job
    plan: Plan
    """Less units of shards that turned out to be unreadable."""
    audited: Audit
    summary: Summary
    skipped_shards: int


def _score(base: Checked, progress: Progress, retry_errors: bool, begun: float) -> _Scored:
    job = plan(phases.with_experienced_model(base, progress, retry_errors=retry_errors))
    done = pending.rescore(job, progress) if retry_errors else []
    done += pending.score(job, progress)
    return _audited(job, done, begun)


def _scored_before(base: Checked, begun: float) -> _Scored:
    job = plan(phases.find_experienced_model(base))
    return _audited(job, pending.left_out(job), begun)


def _audited(job: Job, done: list[UnitDone], begun: float) -> _Scored:
    failed = [unit for unit in done if unit.failure]
    finished = job.plan.without({unit.unit_id for unit in failed})
    audited = accounting.audit(finished)
    summary = summarise(job, finished, done, audited, begun)
    skipped_shards = len(job.corpus.skipped) + len({unit.shard_url for unit in failed})
    return _Scored(job, finished, audited, summary, skipped_shards)


def _select(scored: _Scored) -> tuple[Finished, Survey | None]:
    config = scored.job.config
    settings = SelectSettings.from_config(config.select, config.preset.ratio)
    return selection.select(
        scored.plan,
        scored.job.corpus,
        config.output,
        settings,
        scored.job.score_fp,
        scored.audited,
        scored.skipped_shards,
    )


def _result(
    scored: _Scored,
    begun: float,
    selected: Finished,
    survey: Survey | None,
    trained: Finished | None = None,
) -> Result:
    summary = replace(
        scored.summary,
        selected_rows=selected.manifest["selected_rows"],
        cut=selected.manifest["cut"],
        cherry_path=selected.url,
        manifest=selected.manifest_url,
        trained_path=trained.url if trained else None,
        seconds=round(time.monotonic() - begun, 3),
    )
    return Result(summary, scored.plan, selected, survey, trained)
