"""Brief experience: a small subset that shows the base model what the corpus is like.

Prompts that have an embedding are clustered and sampled (see clustering.py); the rows are written
with their own columns, then sample_id, cluster and prompt_ppl, cluster by cluster, and the manifest
last. A pure function of parts, inputs and settings, as a selection is.

Source: arXiv:2308.12032, section 3.1.
"""

import hashlib
import io
import itertools
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipeline import clustering, manifests, storage
from pipeline.accounting import Audit
from pipeline.columns import merged_schema
from pipeline.config_training import ExperienceConfig
from pipeline.errors import InputError
from pipeline.inputs import Corpus
from pipeline.manifests import Finished
from pipeline.rows import take_rows
from pipeline.schemas import EXPERIENCE
from pipeline.subset import as_column
from pipeline.units import Plan, Unit, fingerprint

log = logging.getLogger("cherry")

EXPERIENCE_VERSION = 1


def find_experience(
    plan: Plan, output: str, config: ExperienceConfig, audited: Audit
) -> Finished | None:
    """The experience subset of these embeddings, if it is there."""
    return manifests.find(_url(plan, output, config, audited))


def select_experience(
    plan: Plan, corpus: Corpus, output: str, config: ExperienceConfig, audited: Audit
) -> Finished:
    """Choose the rows of brief experience and write them, the manifest last.

    Args:
        plan: Whose units all have embeddings.
        corpus: Of the plan.
        output: Of the run.
        config: Clusters, rows of each, and the band.
        audited: Of the plan.

    Raises:
        InputError: Fewer rows can be embedded than there are clusters.
        StorageError: Parts changed while they were read.
    """
    if (found := find_experience(plan, output, config, audited)) is not None:
        return found
    num_embedded = audited.rows_by_status["ok"]
    if num_embedded < config.clusters:
        raise InputError(
            f"experience.clusters: got {config.clusters}, expected at most {num_embedded}, the "
            f"prompts of the input that can be embedded (of {plan.num_rows} rows). Set fewer "
            "clusters."
        )
    url = _url(plan, output, config, audited)
    centers, num_fitted = clustering.fit(plan, audited, config)
    prompts = clustering.assign(plan, centers)
    clusters = prompts["cluster"].to_numpy()
    chosen = clustering.sample_clusters(clusters, prompts["prompt_ppl"].to_numpy(), config)
    part = _write(plan, corpus, prompts.take(pa.array(chosen)), url)
    sizes, taken = (
        np.bincount(each, minlength=config.clusters).tolist()
        for each in (clusters, clusters[chosen])
    )
    if empty := sizes.count(0):
        log.warning(
            "%d of %d clusters are empty: so many prompts are alike. The subset has %d rows.",
            empty,
            config.clusters,
            len(chosen),
        )
    manifest = {
        "embedding_fingerprint": plan.fingerprint,
        "experience_fingerprint": url.rpartition("/")[2],
        "embedding_parts": {"count": len(audited.entries), "sha256": audited.digest},
        "settings": _settings(config),
        "rows": plan.num_rows,
        "rows_by_status": dict(sorted(audited.rows_by_status.items())),
        "fitted_rows": num_fitted,
        "selected_rows": len(chosen),
        "empty_clusters": empty,
        "clusters": [
            {"rows": rows, "selected_rows": some} for rows, some in zip(sizes, taken, strict=True)
        ],
        "parts": [part],
    }
    audited.refuse_changed(plan)
    return manifests.finish(url, manifest)


def _url(plan: Plan, output: str, config: ExperienceConfig, audited: Audit) -> str:
    experience_fp = fingerprint(
        {
            "embedding_fp": plan.fingerprint,
            "units": [unit.unit_id for unit in plan.units],
            "parts": audited.digest,
            "settings": _settings(config),
            "version": EXPERIENCE_VERSION,
        }
    )
    return storage.join(storage.absolute(output), "experience", experience_fp)


def _settings(config: ExperienceConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"train"})


def _write(plan: Plan, corpus: Corpus, chosen: pa.Table, url: str) -> dict[str, Any]:
    """Publish the chosen prompts' rows, in the order in which they were chosen."""
    schema = merged_schema(corpus, EXPERIENCE)
    own = [field for field in schema if field.name not in EXPERIENCE.names]
    units = [plan.units[number] for number in chosen["unit"].to_pylist()]
    rows = chosen["row"].to_numpy()
    in_shards = sorted(range(len(units)), key=lambda at: (units[at].read_url, rows[at]))
    jobs = [
        _rows_of_shard.remote([units[at] for at in some], rows[some], plan.scores_url, own)
        for some in (
            list(group)
            for _, group in itertools.groupby(in_shards, key=lambda at: units[at].read_url)
        )
    ]
    table = pa.concat_tables(ray.get(jobs)).unify_dictionaries()
    table = table.take(pa.array(np.argsort(in_shards)))
    for name in ("cluster", "prompt_ppl"):
        table = table.append_column(name, chosen[name])
    sink = io.BytesIO()
    pq.write_table(table.cast(schema).combine_chunks(), sink, compression="zstd")
    part = "part-00000.parquet"
    storage.replace(storage.join(url, part), sink.getvalue())
    digest = hashlib.sha256(sink.getvalue()).hexdigest()
    return {"path": part, "rows": len(table), "sha256": digest}


@ray.remote
def _rows_of_shard(
    units: list[Unit], rows: npt.NDArray[np.int64], url: str, own: list[pa.Field]
) -> pa.Table:
    """Rows of a shard, ascending, with their own columns and sample_id."""
    read = take_rows(units[0].file, rows, {field.name for field in own})
    ids: list[bytes] = []
    pairs = zip(units, rows.tolist(), strict=True)
    for unit, some in itertools.groupby(pairs, key=lambda pair: pair[0]):
        at = pa.array([row - unit.start for _, row in some])
        with storage.open_parquet(unit.part_url(url)) as parquet:
            ids += parquet.read(["sample_id"])["sample_id"].take(at).to_pylist()
    columns = [as_column(read, field, units[0]) for field in own]
    id_field = EXPERIENCE.field("sample_id")
    return pa.table([*columns, pa.array(ids, id_field.type)], schema=pa.schema([*own, id_field]))
