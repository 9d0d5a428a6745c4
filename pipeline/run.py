"""The flow, one call a step.

::

    [ embed -> cluster -> train briefly ] -> list inputs -> work units
    -> [ tokenise -> score -> commit ] -> audit -> select -> write -> [ train on the subset ]

The steps in the outer brackets are of configs with `experience` and `train`.
"""

import logging
import time
from dataclasses import dataclass

from pipeline import accounting, cluster, comparison, garbage, pending, phases, selection
from pipeline import estimate as estimates
from pipeline.accounting import Audit
from pipeline.budgets import SelectSettings
from pipeline.comparison import Comparison
from pipeline.config import Config
from pipeline.config_training import TrainConfig
from pipeline.errors import ConfigError, InputError, NotTrainedError
from pipeline.estimate import Estimate
from pipeline.experience import Experience
from pipeline.garbage import Garbage
from pipeline.job import Job, check, plan
from pipeline.pending import Progress, Silence
from pipeline.selection import Selection
from pipeline.summary import Summary, summarise, warn_over_one
from pipeline.survey import Survey
from pipeline.training import Trained
from pipeline.units import Plan

log = logging.getLogger("cherry")


@dataclass(frozen=True)
class Result:
    """A summary, and what the terminal report shows besides."""

    summary: Summary
    plan: Plan
    selection: Selection | None = None
    survey: Survey | None = None
    trained: Trained | None = None


def run(config: Config, progress: Progress | None = None, *, retry_errors: bool = False) -> Result:
    """The whole method: score what is new, select, and write the cherry subset.

    With `experience`, the model is trained briefly before; with `train`, the base model is trained
    on the subset after. What is done already is not done again.
    """
    return _run(config, progress or Silence(), retry_errors=retry_errors, selecting=True)


def score(
    config: Config, progress: Progress | None = None, *, retry_errors: bool = False
) -> Result:
    """Score what is new; `retry_errors` also rescores rows that ended as `error`."""
    return _run(config, progress or Silence(), retry_errors=retry_errors, selecting=False)


def _run(config: Config, progress: Progress, *, retry_errors: bool, selecting: bool) -> Result:
    begun = time.monotonic()
    base = check(config, selecting=selecting)
    with cluster.connected():
        job = plan(phases.experienced(base, progress))
        done = pending.rescore(job, progress) if retry_errors else []
        done += pending.score(job, progress)
        finished = job.plan.without({unit.unit_id for unit in done if unit.failure})
        audited = accounting.audit(finished)
        summary = summarise(job, finished, done, audited, begun)
        if not selecting:
            return Result(summary, finished)
        result = _select(job, finished, audited, summary, begun)
        if config.train is None or result.selection is None:
            return result
        trained = phases.retrain(plan(base), result.selection, config.train, progress)
        summary.trained_path = trained.url
        summary.seconds = round(time.monotonic() - begun, 3)
        return Result(summary, finished, result.selection, result.survey, trained)


def experience(config: Config, progress: Progress | None = None) -> Experience:
    """Embed every prompt, and write the rows of brief experience.

    Raises:
        ConfigError: The config has no `experience`.
    """
    if config.experience is None:
        raise ConfigError("key 'experience': it is missing. `experience: {}` takes the defaults.")
    checked = check(config, selecting=False)
    with cluster.connected():
        return phases.experience(checked, config.experience, progress or Silence())


def train(config: Config, progress: Progress | None = None) -> Trained:
    """Train the base model on the cherry subset, which must be there.

    Raises:
        ConfigError: The config has no `train`.
        InputError: The subset is not selected yet.
    """
    if config.train is None:
        raise ConfigError("key 'train': it is missing. `train: {}` takes the defaults.")
    with cluster.connected():
        selected = select(config).selection
        assert selected is not None
        job = plan(check(config, selecting=False))
        return phases.retrain(job, selected, config.train, progress or Silence())


def compare(config: Config, progress: Progress | None = None) -> Comparison:
    """Train the base model on the cherry subset and on controls, and say how they compare.

    What the subset needs is scored and selected first, as far as it is not.

    Raises:
        ConfigError: The config has no `compare`.
    """
    if config.compare is None:
        raise ConfigError("key 'compare': it is missing. `compare: {}` takes the defaults.")
    with cluster.connected():
        selected = run(config.model_copy(update={"train": None}), progress).selection
        assert selected is not None
        job = plan(check(config, selecting=False))
        train = config.train or TrainConfig()
        return comparison.compare(job, selected, config.compare, train, progress or Silence())


def select(config: Config) -> Result:
    """Select from parts that are there, without any model.

    Raises:
        InputError: Units of the input have no part yet.
    """
    begun = time.monotonic()
    checked = check(config, selecting=True)
    with cluster.connected():
        job = plan(phases.experienced_before(checked))
        if missing := job.plan.pending(job.plan.parts()):
            raise InputError(
                f"{job.plan.scores_url}: {len(missing)} of {len(job.plan.units)} units are not "
                "scored yet. Run: cherry score CONFIG."
            )
        audited = accounting.audit(job.plan)
        summary = summarise(job, job.plan, [], audited, begun)
        return _select(job, job.plan, audited, summary, begun)


def estimate(config: Config, num_scored: int) -> Estimate:
    """Say what a run would score and how long that takes; `num_scored` rows are scored to know."""
    checked = check(config, selecting=False)
    with cluster.connected():
        try:
            checked = phases.experienced_before(checked)
        except NotTrainedError:
            log.info("the estimate is of scoring: brief experience is yet to come, and not in it")
        found = estimates.estimate(plan(checked), num_scored)
    warn_over_one(found.over_one_fraction or 0.0)
    return found


def gc(config: Config, all_scores: bool, delete: bool, force: bool) -> Garbage:
    """Find what no current input names, and delete it if asked."""
    checked = check(config, selecting=False)
    with cluster.connected():
        jobs = [plan(phases.experienced_before(checked))]
        if config.experience is not None:
            jobs.append(plan(checked, measure="prompt"))
        found = garbage.find(jobs, all_scores=all_scores)
    if delete:
        garbage.delete(found, force=force)
    return found


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
