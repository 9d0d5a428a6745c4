"""What a run did, in numbers: the object that `--json` prints."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.accounting import first_failures
from pipeline.pending import Measured
from pipeline.schemas import FAILED_STATUSES

log = logging.getLogger("cherry")

_UNSCORED = {
    "prompt_overlong": "Raise score.max_length, as far as the model has positions.",
    "too_short": "Set score.preset=cherry, whose marker lets shorter answers be scored.",
    "empty_response": "Look at the layout that their columns were read as.",
}
"""What to do where most rows have this status; for failures there is score.max_error_fraction."""

_WARN_OVER_ONE = 0.5
"""Share of scored rows with IFD >= 1 from which something is off, most often the template."""


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    rows: int
    rows_by_status: dict[str, int]
    units_total: int
    units_scored: int
    units_reused: int
    rows_reused: int
    tokens_scored: int
    tokens_per_s: float | None
    score_fingerprint: str
    scores_path: str
    seconds: float = 0.0
    """In all."""
    selected_rows: int | None = None
    cut: float | None = None
    cherry_path: str | None = None
    manifest: str | None = None
    skipped_shards: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """The first rows that failed, and why; each row's reason is in its part."""
    model: str | None = None
    """That scored: with brief experience, the trained one."""
    trained_path: str | None = None
    """The model that was trained on the cherry subset."""


def failed_rows(rows_by_status: Mapping[str, int]) -> int:
    """Rows that count against `max_error_fraction`."""
    return sum(rows_by_status.get(status, 0) for status in FAILED_STATUSES)


def failed_fraction(rows_by_status: Mapping[str, int]) -> float:
    """Their share."""
    return failed_rows(rows_by_status) / max(1, sum(rows_by_status.values()))


def summarise(measured: Measured) -> Summary:
    """Put together what was planned, what was done now, and what the parts hold."""
    job, plan, audited = measured.job, measured.plan, measured.audited
    scored = [unit for unit in measured.done if not unit.failure]
    scored_ids = {unit.unit_id for unit in scored}
    reused = [unit for unit in plan.units if unit.unit_id not in scored_ids]
    with_model = [unit for unit in scored if unit.tokens]
    seconds_scoring = max((u.committed for u in with_model), default=0.0) - min(
        (u.started for u in with_model), default=0.0
    )
    tokens = sum(unit.tokens for unit in scored)
    num_ok = sum(unit.rows_by_status.get("ok", 0) for unit in scored)
    warn_over_one(sum(unit.over_one for unit in scored) / max(1, num_ok))
    counts = audited.rows_by_status
    _warn_unscored(counts)
    return Summary(
        rows=counts.total(),
        rows_by_status=dict(sorted(counts.items())),
        units_total=len(job.plan.units),
        units_scored=len(scored_ids),
        units_reused=len(reused),
        rows_reused=sum(u.num_rows for u in reused) + sum(u.rows_reused for u in scored),
        tokens_scored=tokens,
        tokens_per_s=round(tokens / seconds_scoring, 1) if tokens and seconds_scoring > 0 else None,
        score_fingerprint=plan.fingerprint,
        scores_path=plan.scores_url,
        skipped_shards=measured.skipped,
        failures=first_failures(plan, audited),
        model=job.settings.model.path,
    )


def _warn_unscored(counts: Counter[str]) -> None:
    """Say so where most rows have no score for a reason that the settings are behind."""
    for status, advice in _UNSCORED.items():
        if 2 * counts[status] > counts.total():
            log.warning(
                "%s of %s rows are %s: they have no score and cannot be selected. %s",
                f"{counts[status]:,}", f"{counts.total():,}", status, advice,
            )  # fmt: skip


def warn_over_one(share: float) -> None:
    """Say so where the instruction helps on few rows."""
    if share > _WARN_OVER_ONE:
        log.warning(
            "%.0f %% of the scored rows have an IFD of 1 or more: the instruction does not help "
            "the model. Most often the template does not fit it: a chat template on a base model "
            "(try score.preset: cherry), or responses in a language it does not know.",
            100 * share,
        )
