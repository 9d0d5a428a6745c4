"""The flow, one call a step.

::

    [ embed -> cluster -> train briefly ] -> list inputs -> work units
    -> [ tokenise -> score -> commit ] -> audit -> select -> write -> [ train on the subset ]

The steps in the outer brackets are of configs with `experience` and `train`.
"""

import logging
import time
from dataclasses import dataclass, replace
from typing import TypeVar

from pipeline import cluster, comparison, garbage, pending, phases, selection
from pipeline import estimate as estimates
from pipeline.budgets import SelectSettings
from pipeline.comparison import Comparison
from pipeline.config import Config
from pipeline.config_training import TrainConfig
from pipeline.errors import ConfigError, NotTrainedError
from pipeline.estimate import Estimate
from pipeline.garbage import Garbage
from pipeline.job import Checked, check, plan, without_max_rows
from pipeline.manifests import Finished
from pipeline.pending import Measured
from pipeline.settings import Measure
from pipeline.summary import Summary, summarise, warn_over_one
from pipeline.survey import Survey
from pipeline.units import Plan
from pipeline.watching import SILENCE, Progress

log = logging.getLogger("cherry")
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """A summary, and what the terminal report shows besides."""

    summary: Summary
    plan: Plan
    selection: Finished | None = None
    survey: Survey | None = None
    trained: Finished | None = None


def run(config: Config, progress: Progress = SILENCE, *, retry_errors: bool = False) -> Result:
    """The whole method: score what is new, select, and write the cherry subset.

    With `experience`, the model is trained briefly before; with `train`, the base model is trained
    on the subset after. What is done already is not done again.
    """
    begun = time.monotonic()
    base = check(config, selecting=True)
    with cluster.connected():
        if config.train:
            cluster.plan_trainers(config.cluster, config.train)  # before hours of scoring
        scored = _score(base, progress, retry_errors)
        summary = summarise(scored)
        selected, survey = _select(scored)
        trained = None
        if config.train:
            trained = phases.retrain(plan(base), selected, config.train, progress)
            summary = replace(summary, trained_path=trained.url)
    summary = _of_subset(summary, selected, begun)
    return Result(summary, scored.plan, selected, survey, trained)


def score(config: Config, progress: Progress = SILENCE, *, retry_errors: bool = False) -> Result:
    """Score what is new; `retry_errors` also rescores rows that ended as `error`."""
    begun = time.monotonic()
    base = check(config, selecting=False)
    with cluster.connected():
        scored = _score(base, progress, retry_errors)
        summary = summarise(scored)
    return Result(replace(summary, seconds=_seconds(begun)), scored.plan)


def experience(
    config: Config, progress: Progress = SILENCE, *, retry_errors: bool = False
) -> tuple[Finished, Measured]:
    """Embed every prompt, and write the rows of brief experience.

    Raises:
        ConfigError: The config has no `experience`.
    """
    section = _needed(config.experience, "experience")
    checked = check(config, selecting=False)
    with cluster.connected():
        embedded = phases.embed(checked, progress, retry_errors=retry_errors)
        return phases.choose_experience(embedded, section), embedded


def train(config: Config, progress: Progress = SILENCE) -> tuple[Finished, Summary]:
    """Train the base model on the cherry subset, which must be there.

    Returns:
        The model, and what its subset was selected from.

    Raises:
        ConfigError: The config has no `train`.
        InputError: The subset is not selected yet.
    """
    section = _needed(config.train, "train")
    base = check(config, selecting=True)
    with cluster.connected():
        scored = _scored_before(base)
        summary = summarise(scored)
        selected, _ = _select(scored)
        return phases.retrain(plan(base), selected, section, progress), summary


def compare(config: Config, progress: Progress = SILENCE) -> tuple[Comparison, Summary]:
    """Train the base model on the cherry subset and on controls, and say how they compare.

    What the subset needs is scored and selected first, as far as it is not.

    Returns:
        The comparison, and what its subset was selected from.

    Raises:
        ConfigError: The config has no `compare`.
    """
    section = _needed(config.compare, "compare")
    train = config.train or TrainConfig()
    base = check(config, selecting=True)
    held_out = comparison.open_sets(section, config.output)
    with cluster.connected():
        cluster.plan_trainers(config.cluster, train)
        scored = _score(base, progress)
        summary = summarise(scored)
        selected, _ = _select(scored)
        compared = comparison.compare(
            plan(base), scored.plan, selected, held_out, section, train, progress
        )
        return compared, summary


def select(config: Config) -> Result:
    """Select from parts that are there, without any model.

    Raises:
        InputError: Units of the input have no part yet.
    """
    begun = time.monotonic()
    checked = check(config, selecting=True)
    with cluster.connected():
        scored = _scored_before(checked)
        summary = summarise(scored)
        selected, survey = _select(scored)
    return Result(_of_subset(summary, selected, begun), scored.plan, selected, survey)


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
        asked: list[tuple[Checked, Measure]] = [(checked, "prompt")] if config.experience else []
        try:
            asked.append((phases.find_experienced_model(checked), "ifd"))
        except NotTrainedError:
            log.info("brief experience is yet to come: only embeddings are looked at")
        jobs = [plan(each, measure) for each, measure in asked]
        whole = jobs
        if config.input.max_rows:
            whole = [plan(without_max_rows(each), measure) for each, measure in asked]
        found = garbage.find(jobs, whole, all_scores=all_scores)
    if delete:
        garbage.delete(found, force=force)
    return found


def _needed(section: T | None, name: str) -> T:
    if section is None:
        raise ConfigError(f"key '{name}': it is missing. `{name}: {{}}` takes the defaults.")
    return section


def _score(base: Checked, progress: Progress, retry_errors: bool = False) -> Measured:
    checked = phases.with_experienced_model(base, progress, retry_errors=retry_errors)
    return pending.measure(plan(checked), progress, retry_errors=retry_errors)


def _scored_before(base: Checked) -> Measured:
    return pending.measured(plan(phases.find_experienced_model(base)))


def _select(scored: Measured) -> tuple[Finished, Survey | None]:
    config, corpus = scored.job.config, scored.job.corpus
    settings = SelectSettings.from_config(config.select, config.preset.ratio)
    return selection.select(
        scored.plan, corpus, config.output, settings, scored.audited, scored.num_skipped
    )


def _of_subset(summary: Summary, selected: Finished, begun: float) -> Summary:
    return replace(
        summary,
        selected_rows=selected.manifest["selected_rows"],
        cut=selected.manifest["cut"],
        cherry_path=selected.url,
        manifest=selected.manifest_url,
        seconds=_seconds(begun),
    )


def _seconds(begun: float) -> float:
    return round(time.monotonic() - begun, 3)
