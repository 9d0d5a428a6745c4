"""Selection: the globally best rows, exactly, from parts; no model and no sort of the corpus.

::

    survey    one pass over the parts: rows by status, and eligible rows by group and bin of the key
    asked     how many rows each group gets, for each budget
    rank      down to the bin of the cut: copies dropped, sorted, cut
    write     the rows' own columns, in the order of ranks; the manifest last

Rows come out sorted by rank, so that any prefix of the output is itself a smaller cherry subset. A
pure function of parts, inputs and settings: neither the number of workers nor times or absolute
paths reach the output.
"""

import json
import math
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pipeline import listing, manifests, storage
from pipeline.accounting import Audit
from pipeline.budgets import UNLIMITED, Rows, SelectSettings, asked_rows, dealt_rows
from pipeline.columns import output_schema
from pipeline.errors import InputError
from pipeline.examples import example_keys, message_keys
from pipeline.inputs import Corpus
from pipeline.manifests import Finished
from pipeline.ranking import Ranking, rank
from pipeline.subset import WRITER_VERSION, write_subset
from pipeline.survey import Survey, survey_parts
from pipeline.texts import count
from pipeline.units import Plan, fingerprint


def select(
    plan: Plan,
    corpus: Corpus,
    output: str,
    settings: SelectSettings,
    audited: Audit,
    skipped_shards: int = 0,
) -> tuple[Finished, Survey | None]:
    """Select from finished parts and write the cherry subset, its manifest last.

    A selection whose manifest and parts exist is not made again, and has no survey. Its fingerprint
    holds the hashes of the scores' parts, so that the same units with other bytes (rescored errors,
    or deleted parts that another kind of device scored again) make another subset.

    Raises:
        ConfigError: A quota names a group that the corpus has not.
        InputError: No shard could be read.
        StorageError: Parts changed while they were selected from.
    """
    if not plan.units:
        shards = count(len(corpus.shards) + len(corpus.skipped), "shard")
        raise InputError(
            f"input: none of its {shards} could be read, so there is nothing to select from. What "
            "is wrong with them is said above; repair them, and run again."
        )
    schema = output_schema(corpus, settings)
    select_fp = fingerprint(
        {
            "score_fp": plan.fingerprint,
            "units": [unit.unit_id for unit in plan.units],
            "parts": audited.digest,
            "settings": asdict(settings),
            "writer_version": WRITER_VERSION,
            # Shards without a unit (empty ones, or beyond max_rows) have their say in these.
            "columns": [(field.name, str(field.type)) for field in schema],
            "keys": example_keys(corpus, settings.format),
            "message_keys": message_keys(corpus) if settings.format == "messages_jsonl" else (),
            **({"skipped_shards": skipped_shards} if skipped_shards else {}),
        }
    )
    root = storage.join(storage.absolute(output), "cherry")
    url = storage.join(root, select_fp)
    survey = None
    selected = manifests.find(url)
    if selected is None or not _complete(selected):
        survey, early = survey_parts(plan, settings)
        of = {"all": survey.rows, "scored": survey.scored, "eligible": survey.eligible}
        asked = asked_rows(settings, survey.groups, of[settings.of], survey.eligible)
        ranking = rank(plan, settings, survey, early, asked)
        outcomes = _outcomes(settings, ranking, asked, of[settings.of])
        parts = write_subset(plan, corpus, ranking, settings, schema, url)
        manifest = {
            "score_fingerprint": plan.fingerprint,
            "select_fingerprint": select_fp,
            "score_parts": {"count": len(audited.entries), "sha256": audited.digest},
            "settings": asdict(settings),
            "rows": plan.num_rows,
            "skipped_shards": skipped_shards,
            "rows_by_status": dict(sorted(survey.rows_by_status.items())),
            "eligible_rows": int(survey.eligible.sum()),
            "rejected_rows": dict(sorted(survey.rejected.items())),
            "duplicate_rows": int(ranking.duplicates.sum()),
            **outcomes[-1],
            "budgets": [
                {"fraction": fraction, **outcome}
                for fraction, outcome in zip(settings.fractions, outcomes, strict=False)
            ],
            "groups": _groups(survey, ranking, asked) if settings.group_by else [],
            "parts": parts,
        }
        audited.refuse_changed(plan)
        selected = manifests.finish(url, manifest)
    _point_latest(output, {"manifest": f"cherry/{select_fp}/_MANIFEST.json"})
    return selected, survey


def _complete(selected: Finished) -> bool:
    """Whether its parts are there; somebody may have cleaned up."""
    return {part["path"] for part in selected.manifest["parts"]} <= listing.list_names(
        selected.url
    ).keys()


def _outcomes(
    settings: SelectSettings, ranking: Ranking, asked: Rows, of: Rows
) -> list[dict[str, Any]]:
    """What each budget came to; without quotas it is the first `selected_rows` rows."""
    wanted = [None if UNLIMITED in level else int(level.sum()) for level in asked]
    if settings.quotas == "proportional":
        wanted = [*dealt_rows(settings, of)]
    furthest = min if settings.order == "descending" else max
    outcomes = []
    for level, rows in enumerate(wanted):
        cuts = [cut for cut in ranking.cuts[level].tolist() if not math.isnan(cut)]
        outcomes.append(
            {
                "asked_rows": rows,
                "selected_rows": int(ranking.selected[level].sum()),
                # Under quotas each group has its own: of the one that went furthest.
                "cut": furthest(cuts) if cuts else None,
                "rows_at_cut": int(ranking.rows_at_cut[level].sum()),
                "selected_at_cut": int(ranking.selected_at_cut[level].sum()),
            }
        )
    return outcomes


def _groups(survey: Survey, ranking: Ranking, asked: Rows) -> list[dict[str, Any]]:
    columns = {
        "rows": survey.rows,
        "scored_rows": survey.scored,
        "eligible_rows": survey.eligible,
        "asked_rows": asked[-1],
        "selected_rows": ranking.selected[-1],
        "duplicate_rows": ranking.duplicates,
        "rows_at_cut": ranking.rows_at_cut[-1],
        "selected_at_cut": ranking.selected_at_cut[-1],
    }
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(survey.groups):
        counts: dict[str, Any] = {name: int(array[index]) for name, array in columns.items()}
        if counts["asked_rows"] == UNLIMITED:
            counts["asked_rows"] = None
        cut = float(ranking.cuts[-1][index])
        by_budget = ranking.selected[:, index].tolist()
        groups.append(
            {"group": group, **counts, "cut": None if math.isnan(cut) else cut}
            | ({"selected_by_budget": by_budget} if len(by_budget) > 1 else {})
        )
    return groups


def _point_latest(output: str, latest: dict[str, str]) -> None:
    url = storage.join(storage.absolute(output), "LATEST.json")
    data = json.dumps(latest, indent=1).encode()
    with suppress(InputError):  # none yet
        if storage.read_bytes(url) == data:
            return
    storage.replace_if_unchanged(url, data)
