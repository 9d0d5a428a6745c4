"""Clusters of prompts, and the rows of each that lie in the middle of its perplexities.

::

    fit       K-means on all embeddings, or on a bounded sample    one task, one thread
    assign    the cluster and the perplexity of every prompt       Ray tasks over the parts
    sample    of each cluster, evenly from the middle

Source: arXiv:2308.12032, section 3.1; `data_by_cluster.py` of Cherry_LLM takes each cluster's rows
in the order of the corpus, drops those outside the band of percentiles, and keeps every n-th.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from threadpoolctl import threadpool_limits

from pipeline import storage
from pipeline.accounting import Audit
from pipeline.config_training import ExperienceConfig
from pipeline.units import Plan, Unit

MOST_EXACT_ROWS = 100_000
"""Up to so many prompts K-means sees all of them, in whole passes; Alpaca has 52,002."""
MOST_SAMPLED_ROWS = 500_000
_MOST_FITTED_BYTES = 2 << 30
"""Of embeddings that K-means is fitted to: 131,072 of a model with 4,096 dimensions."""
_UNITS_PER_TASK = 16

Floats = npt.NDArray[np.float32]
Clusters = npt.NDArray[np.int32]
Perplexities = npt.NDArray[np.float64]

PROMPTS = pa.schema(
    [
        ("unit", pa.int64()),  # its number in the plan
        ("row", pa.int64()),  # in the shard
        ("cluster", pa.int32()),
        ("prompt_ppl", pa.float64()),
    ]
)
"""A prompt that has an embedding."""


def fit(plan: Plan, audited: Audit, config: ExperienceConfig) -> tuple[Floats, int]:
    """Cluster centers, shape (clusters, hidden size), and how many prompts they were fitted to."""
    counts = [audited.entries[unit.unit_id].rows_by_status.get("ok", 0) for unit in plan.units]
    starts = np.concatenate([[0], np.cumsum(counts)])
    first = plan.units[int(np.flatnonzero(counts)[0])]
    width = _read(first, plan.scores_url)[0].shape[1]
    drawn, exact = _drawn(int(starts[-1]), width)
    edges = np.searchsorted(drawn, starts)
    wanted = [
        (unit, drawn[edges[i] : edges[i + 1]] - starts[i])
        for i, unit in enumerate(plan.units)
        if edges[i + 1] > edges[i]
    ]
    pieces = [
        _take.remote(wanted[i : i + _UNITS_PER_TASK], plan.scores_url)
        for i in range(0, len(wanted), _UNITS_PER_TASK)
    ]
    # Memory: the pieces, all of them in a row, and what K-means makes of that. More than any node
    # has would be waited for in vain.
    largest = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    task: Any = _fit.options(memory=min(3 * 4 * width * len(drawn), largest))
    centers: Floats = ray.get(task.remote(config, exact, *pieces))
    return centers, len(drawn)


def assign(plan: Plan, centers: Floats) -> pa.Table:
    """Every prompt that has an embedding, in the PROMPTS schema and in the order of the plan."""
    shared = ray.put(centers)
    tasks = [
        _assign.remote(i, plan.units[i : i + _UNITS_PER_TASK], plan.scores_url, shared)
        for i in range(0, len(plan.units), _UNITS_PER_TASK)
    ]
    return pa.concat_tables(ray.get(tasks))


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


def _drawn(num_rows: int, width: int) -> tuple[npt.NDArray[np.int64], bool]:
    """Numbers of the prompts that K-means is fitted to, and whether it may take them all at once.

    All, or so many at equal distances.
    """
    fitting = _MOST_FITTED_BYTES // (4 * width)
    if num_rows <= min(MOST_EXACT_ROWS, fitting):
        return np.arange(num_rows), True
    most = min(num_rows, MOST_SAMPLED_ROWS, fitting)
    return np.arange(most) * num_rows // most, False


@ray.remote
def _take(wanted: list[tuple[Unit, npt.NDArray[np.int64]]], url: str) -> Floats:
    """Some of the embeddings of some units, by their number among the unit's."""
    return np.concatenate([_read(unit, url)[0][numbers] for unit, numbers in wanted])


@ray.remote
def _fit(config: ExperienceConfig, exact: bool, *pieces: Floats) -> Floats:
    from sklearn.cluster import KMeans, MiniBatchKMeans  # not before: most commands fit nothing

    kind = KMeans if exact else MiniBatchKMeans
    model = kind(config.clusters, random_state=config.seed, n_init="auto")
    # Threads add their sums in the order in which they end: centers would change from run to run.
    with threadpool_limits(1):
        centers: Floats = model.fit(np.concatenate(pieces)).cluster_centers_.astype(np.float32)
    return centers


@ray.remote
def _assign(first: int, units: tuple[Unit, ...], url: str, centers: Floats) -> pa.Table:
    centers_64 = centers.astype(np.float64)
    squares = (centers_64**2).sum(1)
    tables = [PROMPTS.empty_table()]
    for number, unit in enumerate(units, start=first):
        embeddings, rows, ppl = _read(unit, url)
        if len(rows):
            # |e - c|^2 less |e|^2, which is the same for all centers.
            distances = squares - 2 * embeddings.astype(np.float64) @ centers_64.T
            columns = [np.full(len(rows), number), rows, distances.argmin(1).astype(np.int32), ppl]
            tables.append(pa.table(columns, schema=PROMPTS))
    return pa.concat_tables(tables)


def _read(unit: Unit, url: str) -> tuple[Floats, npt.NDArray[np.int64], Perplexities]:
    """Embeddings of a unit's prompts, their rows in the shard, and their perplexities."""
    with storage.open_parquet(unit.part_url(url)) as parquet:
        part = parquet.read(["row_index", "num_prompt_tokens", "nll_prompt", "embedding"])
    part = part.filter(pc.is_valid(part["embedding"])).combine_chunks()
    if not len(part):
        return np.empty((0, 0), np.float32), np.empty(0, np.int64), np.empty(0)
    values = pc.list_flatten(part["embedding"]).to_numpy()
    ppl = np.exp(part["nll_prompt"].to_numpy() / (part["num_prompt_tokens"].to_numpy() - 1))
    return values.reshape(len(part), -1), part["row_index"].to_numpy(), ppl
