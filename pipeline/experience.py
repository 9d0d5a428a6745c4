"""Brief experience: a small subset that shows the base model what the corpus is like.

::

    gather    prompts that have an embedding, by number          Ray tasks over the parts
    fit       K-means on all of them, or on a bounded sample     one task, one thread
    assign    the cluster and the perplexity of every prompt     Ray tasks over the parts
    sample    of each cluster, evenly from the middle of its perplexities
    write     the rows' own columns, then sample_id, cluster, prompt_ppl; the manifest last

A pure function of parts, inputs and settings, as a selection is.

Source: arXiv:2308.12032, section 3.1; `data_by_cluster.py` of Cherry_LLM takes each cluster's rows
in the order of the corpus, drops those outside the band of percentiles, and keeps every n-th.
"""

import hashlib
import io
import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from pipeline import storage
from pipeline.accounting import Audit
from pipeline.columns import merged_schema
from pipeline.config_training import ExperienceConfig
from pipeline.errors import InputError, StorageError
from pipeline.inputs import Corpus
from pipeline.rows import take_rows
from pipeline.schemas import EXPERIENCE
from pipeline.subset import as_column
from pipeline.units import Plan, Unit, fingerprint

log = logging.getLogger("cherry")

EXPERIENCE_VERSION = 1
MOST_EXACT_ROWS = 100_000
"""Up to so many prompts K-means sees all of them, in whole passes; Alpaca has 52,002."""
_MOST_SAMPLED_ROWS = 500_000
_MOST_SAMPLED_BYTES = 2 << 30
_UNITS_PER_TASK = 16

Floats = npt.NDArray[np.float32]
Clusters = npt.NDArray[np.int32]
Perplexities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Experience:
    """A finished experience subset."""

    url: str
    manifest_url: str
    manifest: dict[str, Any]


def select_experience(
    plan: Plan, corpus: Corpus, output: str, config: ExperienceConfig, audited: Audit
) -> Experience:
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
    settings = config.model_dump(mode="json", exclude={"train"})
    experience_fp = fingerprint(
        {
            "embedding_fp": plan.fingerprint,
            "units": [unit.unit_id for unit in plan.units],
            "parts": audited.digest,
            "settings": settings,
            "version": EXPERIENCE_VERSION,
        }
    )
    url = storage.join(storage.absolute(output), "experience", experience_fp)
    manifest_url = storage.join(url, "_MANIFEST.json")
    if storage.exists(manifest_url):
        return Experience(url, manifest_url, json.loads(storage.read_bytes(manifest_url)))
    schema = merged_schema(corpus, EXPERIENCE)
    num_embedded = audited.rows_by_status["ok"]
    if num_embedded < config.clusters:
        raise InputError(
            f"experience.clusters: got {config.clusters}, expected at most {num_embedded}, the "
            f"prompts of the input that can be embedded (of {plan.num_rows} rows). Set fewer "
            "clusters."
        )
    tasks = [
        (plan.units[i : i + _UNITS_PER_TASK], plan.scores_url)
        for i in range(0, len(plan.units), _UNITS_PER_TASK)
    ]
    drawn = _drawn(num_embedded, _width(plan, audited))
    centers = ray.put(_fit(tasks, drawn, num_embedded, audited, config))
    found = ray.get([_assign.remote(*task, centers) for task in tasks])
    unit_index = np.concatenate([each.unit + n * _UNITS_PER_TASK for n, each in enumerate(found)])
    rows = np.concatenate([each.row for each in found])
    clusters = np.concatenate([each.cluster for each in found])
    ppl = np.concatenate([each.ppl for each in found])
    chosen = sample_clusters(clusters, ppl, config)
    table = _rows(plan, schema, unit_index[chosen], rows[chosen], clusters[chosen], ppl[chosen])
    sizes = np.bincount(clusters, minlength=config.clusters)
    if empty := int((sizes == 0).sum()):
        log.warning(
            "%d of %d clusters are empty: so many prompts are alike. The subset has %d rows.",
            empty,
            config.clusters,
            len(table),
        )
    data = _as_parquet(table)
    manifest = {
        "embedding_fingerprint": plan.fingerprint,
        "experience_fingerprint": experience_fp,
        "embedding_parts": {"count": len(audited.entries), "sha256": audited.digest},
        "settings": settings,
        "rows": plan.num_rows,
        "rows_by_status": dict(sorted(audited.rows_by_status.items())),
        "fitted_rows": len(drawn),
        "selected_rows": len(table),
        "empty_clusters": empty,
        "clusters": [
            {"rows": int(size), "selected_rows": taken}
            for size, taken in zip(sizes, _counts(clusters[chosen], config.clusters), strict=True)
        ],
        "parts": [
            {
                "path": "part-00000.parquet",
                "rows": len(table),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        ],
    }
    storage.replace(storage.join(url, "part-00000.parquet"), data)
    if changed := audited.changed(plan):
        raise StorageError(
            f"{plan.scores_url}: {len(changed)} parts changed while they were read, the first is "
            f"{changed[0]}.parquet. Run again when no other run works on this output."
        )
    storage.publish(manifest_url, json.dumps(manifest, indent=1).encode())
    return Experience(url, manifest_url, json.loads(storage.read_bytes(manifest_url)))


def sample_clusters(
    clusters: Clusters, ppl: Perplexities, config: ExperienceConfig
) -> npt.NDArray[np.int64]:
    """Rows evenly from the middle band of each cluster, cluster by cluster, as the reference does.

    A cluster with fewer than `per_cluster` rows gives all of them; one with fewer in its band,
    those in its band.

    Example, per_cluster 2 and band 25 to 75: a cluster whose rows 3, 5, 6, 8, 9 have perplexities
    1, 2, 3, 4, 5 keeps 5, 6 and 8 of them, every first of which makes 5 and 6.
    """
    chosen = []
    by_cluster = np.argsort(clusters, kind="stable")
    ends = np.cumsum(np.bincount(clusters, minlength=config.clusters))
    for rows in np.split(by_cluster, ends[:-1]):
        if len(rows) < config.per_cluster:
            chosen.append(rows)
            continue
        low, high = np.percentile(ppl[rows], config.band)
        middle = rows[(ppl[rows] >= low) & (ppl[rows] <= high)]
        step = max(1, len(middle) // config.per_cluster)
        chosen.append(middle[::step][: config.per_cluster])
    return np.concatenate(chosen)


def _counts(clusters: Clusters, num_clusters: int) -> list[int]:
    counts: list[int] = np.bincount(clusters, minlength=num_clusters).tolist()
    return counts


def _drawn(num_rows: int, width: int) -> npt.NDArray[np.int64]:
    """Numbers of the prompts that K-means is fitted to: all, or so many at equal distances."""
    if num_rows <= MOST_EXACT_ROWS:
        return np.arange(num_rows)
    most = min(num_rows, _MOST_SAMPLED_ROWS, _MOST_SAMPLED_BYTES // (4 * width))
    return np.arange(most) * num_rows // most


def _width(plan: Plan, audited: Audit) -> int:
    """Dimensions of an embedding, from the first part that has one."""
    unit = next(u for u in plan.units if audited.entries[u.unit_id].rows_by_status.get("ok"))
    return int(_read(unit, plan.scores_url)[0].shape[1])


def _fit(
    tasks: list[tuple[tuple[Unit, ...], str]],
    drawn: npt.NDArray[np.int64],
    num_rows: int,
    audited: Audit,
    config: ExperienceConfig,
) -> Floats:
    """Cluster centers, shape (clusters, hidden size)."""
    pieces = []
    start = 0
    for units, url in tasks:
        count = sum(audited.entries[u.unit_id].rows_by_status.get("ok", 0) for u in units)
        inside = drawn[(drawn >= start) & (drawn < start + count)]
        pieces.append(_take.remote(units, url, inside - start))
        start += count
    exact = num_rows <= MOST_EXACT_ROWS
    centers: Floats = ray.get(_fit_centers.remote(config, exact, *pieces))
    return centers


@ray.remote
def _take(units: tuple[Unit, ...], url: str, numbers: npt.NDArray[np.int64]) -> Floats:
    """Some of the embeddings of some units, by their number among these."""
    pieces = []
    start = 0
    for unit in units:
        embeddings, _, _ = _read(unit, url)
        inside = numbers[(numbers >= start) & (numbers < start + len(embeddings))]
        if len(inside):
            pieces.append(embeddings[inside - start])
        start += len(embeddings)
    return np.concatenate(pieces) if pieces else np.empty((0, 0), np.float32)


@ray.remote
def _fit_centers(config: ExperienceConfig, exact: bool, *pieces: Floats) -> Floats:
    embeddings = np.concatenate([piece for piece in pieces if len(piece)])
    kind = KMeans if exact else MiniBatchKMeans
    model = kind(config.clusters, random_state=config.seed, n_init="auto")
    # Threads add their sums in the order in which they end: centers would change from run to run.
    with threadpool_limits(1):
        centers: Floats = model.fit(embeddings).cluster_centers_.astype(np.float32)
    return centers


@dataclass(frozen=True)
class _Assigned:
    """Prompts of some units, in their order."""

    unit: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    cluster: Clusters
    ppl: Perplexities


@ray.remote
def _assign(units: tuple[Unit, ...], url: str, centers: Floats) -> _Assigned:
    squares = (centers.astype(np.float64) ** 2).sum(1)
    columns: list[list[npt.NDArray[Any]]] = [[], [], [], []]
    for index, unit in enumerate(units):
        embeddings, rows, ppl = _read(unit, url)
        if not len(rows):
            continue
        # |e - c|^2 less |e|^2, which is the same for all centers.
        distances = squares - 2 * embeddings.astype(np.float64) @ centers.T.astype(np.float64)
        found = (np.full(len(rows), index), rows, distances.argmin(1).astype(np.int32), ppl)
        for column, values in zip(columns, found, strict=True):
            column.append(values)
    kinds = (np.int64, np.int64, np.int32, np.float64)
    return _Assigned(
        *(np.concatenate(c) if c else np.empty(0, k) for c, k in zip(columns, kinds, strict=True))
    )


def _read(unit: Unit, url: str) -> tuple[Floats, npt.NDArray[np.int64], Perplexities]:
    """Embeddings of a unit's prompts, their rows in the shard, and their perplexities."""
    with storage.open_parquet(unit.part_url(url)) as parquet:
        part = parquet.read(["row_index", "num_prompt_tokens", "nll_prompt", "embedding"])
    part = part.filter(pa.compute.is_valid(part["embedding"])).combine_chunks()
    if not len(part):
        return np.empty((0, 0), np.float32), np.empty(0, np.int64), np.empty(0)
    values = pa.compute.list_flatten(part["embedding"]).to_numpy()
    ppl = np.exp(part["nll_prompt"].to_numpy() / (part["num_prompt_tokens"].to_numpy() - 1))
    return values.reshape(len(part), -1), part["row_index"].to_numpy(), ppl


def _rows(
    plan: Plan,
    schema: pa.Schema,
    units: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    clusters: Clusters,
    ppl: Perplexities,
) -> pa.Table:
    """The chosen rows with their own columns, in the order in which they were chosen."""
    own = [field for field in schema if field.name not in EXPERIENCE.names]
    pieces, places = [], []
    for index in np.unique(units):
        unit = plan.units[index]
        at = np.flatnonzero(units == index)
        at = at[np.argsort(rows[at])]
        read = take_rows(unit.read_url, rows[at], {field.name for field in own})
        with storage.open_parquet(plan.part_url(unit)) as parquet:
            ids = parquet.read(["sample_id"])["sample_id"].take(pa.array(rows[at] - unit.start))
        added = [ids, pa.array(clusters[at], pa.int32()), pa.array(ppl[at])]
        columns = [*(as_column(read, field, unit) for field in own), *added]
        pieces.append(pa.table(columns, schema=schema))
        places.append(at)
    order = np.argsort(np.concatenate(places))
    return pa.concat_tables(pieces).unify_dictionaries().take(pa.array(order))


def _as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table.combine_chunks(), sink, compression="zstd")
    return sink.getvalue()
