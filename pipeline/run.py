"""The flow, one call a step.

::

    list inputs -> work units -> [ tokenise -> score -> commit ] -> select -> write -> report
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline import (
    accounting,
    cluster,
    engine,
    inputs,
    models,
    scoring,
    selection,
    storage,
    units,
)
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError, ShardError, StorageError
from pipeline.inputs import Corpus
from pipeline.models import ModelRef
from pipeline.rendering import Renderer
from pipeline.schemas import FAILED_STATUSES
from pipeline.scoring import ScoringSettings, UnitDone
from pipeline.selection import Selection, SelectSettings, Survey
from pipeline.subset import output_schema
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


@dataclass(frozen=True)
class Checked:
    """A config, its input and the description of its model, found to be sound."""

    config: Config
    corpus: Corpus
    model: ModelRef
    renderer: Renderer
    num_parameters: int


@dataclass(frozen=True)
class Job:
    """What there is to do: resolved settings and planned units."""

    config: Config
    corpus: Corpus
    settings: ScoringSettings
    score_fp: str
    plan: Plan


Progress = Callable[[UnitDone, int], None]
"""Called with each finished unit and the number of units to do."""


def run(config: Config, progress: Progress | None = None) -> Result:
    """Score what is new, select, and write the cherry subset."""
    begun = time.monotonic()
    checked = check(config, selecting=True)
    with cluster.connected():
        job = plan(checked)
        done = _score(job, job.plan.pending(), progress)
        return _select(job, _summarise(job, done, begun), begun)


def score(config: Config, progress: Progress | None = None) -> Result:
    """Score what is new."""
    begun = time.monotonic()
    checked = check(config, selecting=False)
    with cluster.connected():
        job = plan(checked)
        done = _score(job, job.plan.pending(), progress)
        return Result(_summarise(job, done, begun), job.plan)


def select(config: Config) -> Result:
    """Select from parts that are there, without any model.

    Raises:
        InputError: Units of the input have no part yet.
    """
    begun = time.monotonic()
    checked = check(config, selecting=True)
    with cluster.connected():
        job = plan(checked)
        if missing := job.plan.pending():
            raise InputError(
                f"{job.plan.scores_url}: {len(missing)} of {len(job.plan.units)} units are not "
                "scored yet. Run: cherry score CONFIG."
            )
        return _select(job, _summarise(job, [], begun), begun)


def check(config: Config, *, selecting: bool) -> Checked:
    """Read the input's footers and the model's description; nothing is started.

    Raises:
        ConfigError, InputError, ModelError: With what to do about it.
    """
    ref = models.resolve(config.model)
    corpus = inputs.open_corpus(config.input, config.output)
    if selecting:
        output_schema(corpus)  # columns that cannot be written are named before hours of scoring
    for layout, count in Counter(s.columns.describe() for s in corpus.shards).items():
        log.info("%d shard%s read as %s", count, "s"[: count > 1], layout)
    architecture = models.load_config(ref)
    preset = config.preset
    renderer = Renderer(
        models.load_tokenizer(ref),
        preset.template,
        _max_length(config, architecture),
        preset.pair_tokens,
    )
    num_parameters = models.count_parameters(architecture)
    _save_config(config)
    return Checked(config, corpus, ref, renderer, num_parameters)


def plan(checked: Checked) -> Job:
    """Resolve what depends on the cluster's kind of device, and cut the corpus into units."""
    config, renderer = checked.config, checked.renderer
    settings = ScoringSettings(
        model=checked.model,
        template=renderer.template,
        pair_tokens=renderer.pair_tokens,
        max_length=renderer.max_length,
        dtype=_dtype(config),
        max_batch_tokens=config.score.max_batch_tokens,
    )
    score_fp = settings.fingerprint(
        renderer.template_text, models.tokenizer_fingerprint(renderer.tokenizer)
    )
    planned = units.make_plan(
        checked.corpus,
        config.output,
        score_fp,
        config.score.unit_rows,
        checked.num_parameters,
        config.input.max_rows,
    )
    return Job(config, checked.corpus, settings, score_fp, planned)


def _score(job: Job, pending: list[Unit], progress: Progress | None) -> list[UnitDone]:
    if not pending:
        return []
    workers = cluster.plan_workers(job.config.cluster)
    log.info("scoring %d of %d units, %s", len(pending), len(job.plan.units), workers.describe())
    done = []
    for unit in scoring.score_units(job.plan, pending, job.settings, workers):
        if unit.failure and job.config.input.on_bad_shard == "fail":
            raise ShardError(
                f"{unit.failure}\nReplace the shard and run again (what is scored is kept), or "
                "set input.on_bad_shard: skip."
            )
        done.append(unit)
        if progress:
            progress(unit, len(pending))
    return done


def _summarise(job: Job, done: list[UnitDone], begun: float) -> Summary:
    plan = job.plan
    failed = {unit.unit_id: unit.failure for unit in done if unit.failure}
    scored = [unit for unit in done if not unit.failure]
    finished = [unit for unit in plan.units if unit.unit_id not in failed]
    counts = accounting.tally(plan, finished)
    scored_ids = {unit.unit_id for unit in scored}
    seconds_scoring = max((u.committed for u in scored), default=0.0) - min(
        (u.started for u in scored), default=0.0
    )
    tokens = sum(unit.tokens for unit in scored)
    _warn_over_one(scored)
    return Summary(
        rows=sum(counts.values()),
        rows_by_status=dict(sorted(counts.items())),
        units_total=len(plan.units),
        units_scored=len(scored),
        units_reused=len(finished) - len(scored),
        rows_reused=sum(u.num_rows for u in finished if u.unit_id not in scored_ids),
        tokens_scored=tokens,
        tokens_per_s=round(tokens / seconds_scoring, 1) if seconds_scoring > 0 else None,
        seconds=round(time.monotonic() - begun, 3),
        selected_rows=None,
        cut=None,
        score_fingerprint=job.score_fp,
        scores_path=plan.scores_url,
        cherry_path=None,
        manifest=None,
        skipped_shards=[*job.corpus.skipped, *sorted({str(f) for f in failed.values()})],
    )


def _select(job: Job, summary: Summary, begun: float) -> Result:
    plan = _without_missing(job.plan) if summary.skipped_shards else job.plan
    settings = SelectSettings.from_config(job.config.select, job.config.preset.ratio)
    selected, survey = selection.select(plan, job.corpus, job.config.output, settings, job.score_fp)
    summary.selected_rows = selected.manifest["selected_rows"]
    summary.cut = selected.manifest["cut"]
    summary.cherry_path = selected.url
    summary.manifest = selected.manifest_url
    summary.seconds = round(time.monotonic() - begun, 3)
    return Result(summary, plan, selected, survey)


def _without_missing(plan: Plan) -> Plan:
    """The plan less units that have no part because their shard was skipped."""
    missing = {unit.unit_id for unit in plan.pending()}
    kept: tuple[Unit, ...] = tuple(u for u in plan.units if u.unit_id not in missing)
    return Plan(kept, plan.scores_url)


def _save_config(config: Config) -> None:
    """Keep the resolved config beside the results; notices an output that cannot be written."""
    text = config.model_dump_json(indent=1)
    name = f"{units.fingerprint(config.model_dump(mode='json'))}.json"
    url = storage.join(storage.absolute(config.output), "configs", name)
    try:
        storage.publish(url, text.encode())
    except StorageError as err:
        raise ConfigError(
            f"output: {err}. Check the path, the credentials in the environment and the bucket's "
            "policy."
        ) from err


def _max_length(config: Config, architecture: Any) -> int:
    wanted = config.preset.max_length
    limit = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    named = config.score.max_length
    if named and limit and named > limit:
        raise ConfigError(
            f"key 'score.max_length': got {named}, expected at most {limit}, the positions of "
            f"{config.model.path}."
        )
    return min(wanted, limit) if limit else wanted


def _dtype(config: Config) -> Any:
    """`auto`: bfloat16 where scoring runs on GPUs or on CPUs that multiply it in hardware."""
    if config.model.dtype != "auto":
        return config.model.dtype
    device = torch.device("cuda" if cluster.scores_on_gpus(config.cluster) else "cpu")
    return str(engine.auto_dtype(device)).removeprefix("torch.")


def _warn_over_one(scored: list[UnitDone]) -> None:
    num_ok = sum(unit.rows_by_status.get("ok", 0) for unit in scored)
    over = sum(unit.over_one for unit in scored)
    if num_ok and over / num_ok > _WARN_OVER_ONE:
        log.warning(
            "%.0f %% of the scored rows have an IFD of 1 or more: the instruction does not help "
            "the model. Most often the template does not fit it: a chat template on a base model "
            "(try score.preset: cherry), or responses in a language it does not know.",
            100 * over / num_ok,
        )
