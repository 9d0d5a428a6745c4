"""Brief experience against a plain version, written from the paper's description."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import ROWS, read_parts, write_parquet
from sklearn.cluster import KMeans

from pipeline import clustering, pending, phases, run
from pipeline.clustering import sample_clusters
from pipeline.config_training import ExperienceConfig
from pipeline.errors import ConfigError, InputError, NotTrainedError
from pipeline.job import check
from pipeline.listing import list_objects
from pipeline.templates import TEXT_TEMPLATES

ConfigFor = Callable[..., Any]
SETTINGS = {"clusters": 5, "per_cluster": 2}


def plain_sample(
    clusters: npt.NDArray[Any], ppl: npt.NDArray[Any], count: int, band: tuple[float, float]
) -> list[int]:
    """Of each cluster: its rows in order, those in the band of percentiles, every n-th of these."""
    chosen: list[int] = []
    for cluster in sorted(set(clusters.tolist())):
        rows = [i for i in range(len(clusters)) if clusters[i] == cluster]
        if len(rows) >= count:
            low, high = (np.percentile([ppl[i] for i in rows], p) for p in band)
            rows = [i for i in rows if low <= ppl[i] <= high]
            if len(rows) >= count:
                rows = rows[:: len(rows) // count][:count]
        chosen += rows
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_sampling_is_as_described(seed: int) -> None:
    draw = np.random.default_rng(seed)
    clusters = draw.zipf(1.5, 400).clip(max=20).astype(np.int32) - 1
    ppl = np.round(draw.lognormal(2, 1, 400), 1)  # with ties
    config = ExperienceConfig(clusters=20, per_cluster=4, band=(20, 60))
    found = sample_clusters(clusters, ppl, config).tolist()
    assert found == plain_sample(clusters, ppl, 4, (20, 60))


def test_sampling_by_hand() -> None:
    clusters = np.array([1, 0, 1, 0, 1, 0, 1, 1, 1], np.int32)
    ppl = np.array([3.0, 7, 2, 7, 9, 7, 4, 5, 1])
    config = ExperienceConfig(clusters=3, per_cluster=2)
    # Cluster 0 has no spread: all of it is its middle. Of cluster 1 rows 0, 2, 6, 7 have 2 to 5,
    # within 2.25 to 4.75 are 0 and 6. Cluster 2 is empty.
    assert sample_clusters(clusters, ppl, config).tolist() == [1, 3, 0, 6]


@pytest.mark.ray
def test_the_subset_equals_a_plain_version(
    ray_local: None, config_for: ConfigFor, corpus: Path, model_dir: Path
) -> None:
    found, _ = run.experience(config_for(corpus, experience=SETTINGS, score={"unit_rows": 7}))

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    template = TEXT_TEMPLATES["alpaca"]
    embeddings, ppl = [], []
    for row in ROWS:
        form = template.with_input if row["input"] else template.without_input
        ids = tokenizer(form.format(**row), return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(ids, labels=ids, output_hidden_states=True)
        ppl.append(float(output.loss.exp()))
        embeddings.append(output.hidden_states[-1][0].mean(0).numpy())
    clusters = KMeans(5, random_state=0, n_init="auto").fit(np.stack(embeddings)).labels_
    expected = plain_sample(clusters, np.array(ppl), 2, (25, 75))

    parts = read_parts(next(Path(found.url).parent.parent.glob("embeddings/*")))
    np.testing.assert_allclose(np.stack(parts["embedding"].to_pylist()), embeddings, atol=1e-5)
    nll = parts["nll_prompt"].to_numpy() / (parts["num_prompt_tokens"].to_numpy() - 1)
    np.testing.assert_allclose(np.exp(nll), ppl, rtol=1e-4)
    subset = pq.read_table(found.url + "/part-00000.parquet")
    assert subset.schema.names == [
        "instruction", "input", "output", "sample_id", "cluster", "prompt_ppl",
    ]  # fmt: skip
    chosen = subset.select(["instruction", "input", "output"]).to_pylist()
    assert chosen == [ROWS[i] for i in expected]
    assert subset["cluster"].to_pylist() == clusters[expected].tolist()
    np.testing.assert_allclose(subset["prompt_ppl"], np.array(ppl)[expected], rtol=1e-4)
    assert found.manifest["selected_rows"] == len(expected)
    assert sum(c["rows"] for c in found.manifest["clusters"]) == len(ROWS)


@pytest.mark.ray
def test_units_and_workers_do_not_change_the_subset_and_a_rerun_does_nothing(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    one, other = (
        config_for(corpus, experience=SETTINGS, output=str(tmp_path / name), score={"unit_rows": n})
        for name, n in (("one", 40), ("other", 6))
    )
    tables = [pq.read_table(run.experience(c)[0].url + "/part-00000.parquet") for c in (one, other)]
    assert tables[0].drop_columns("prompt_ppl") == tables[1].drop_columns("prompt_ppl")
    before = list_objects(str(tmp_path / "one"))
    run.experience(one)
    assert list_objects(str(tmp_path / "one")) == before


@pytest.mark.ray
def test_a_large_corpus_is_fitted_to_a_sample(
    ray_local: None, config_for: ConfigFor, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "MOST_EXACT_ROWS", 30)
    monkeypatch.setattr(clustering, "MOST_SAMPLED_ROWS", 25)
    found, _ = run.experience(config_for(corpus, experience=SETTINGS))
    assert found.manifest["fitted_rows"] == 25
    assert sum(c["rows"] for c in found.manifest["clusters"]) == len(ROWS)
    assert 0 < found.manifest["selected_rows"] <= 10


@pytest.mark.parametrize(
    ("num_rows", "num_fitted", "exact"),
    [(100_000, 100_000, True), (100_001, 100_001, False), (900_000, 500_000, False)],
)
def test_the_slow_exact_way_ends_where_it_says(num_rows: int, num_fitted: int, exact: bool) -> None:
    """Between the two bounds K-means is fitted to all rows, and in mini-batches."""
    drawn, slowly = clustering._drawn(num_rows, 64)
    assert (len(drawn), slowly) == (num_fitted, exact)
    assert 0 <= drawn.min() <= drawn.max() < num_rows


@pytest.mark.ray
def test_fewer_rows_than_clusters_are_refused(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"clusters': got 41, expected at most 40, the rows of"):
        run.experience(config_for(corpus, experience={"clusters": 41}))
    assert not (tmp_path / "out" / "embeddings").exists()  # known from the footers
    assert not (tmp_path / "out" / "experience").exists()


@pytest.mark.ray
def test_prompts_that_are_alike_leave_clusters_empty(
    ray_local: None, config_for: ConfigFor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": f"one {i % 2}", "input": "", "output": f"two {i}"} for i in range(12)]
    rows += [{"instruction": "three", "input": "", "output": ""}]  # nothing to learn from
    write_parquet(tmp_path / "alike" / "a.parquet", rows)
    found, _ = run.experience(
        config_for(tmp_path / "alike", experience={"clusters": 4, "per_cluster": 3})
    )
    assert found.manifest["empty_clusters"] == 2
    assert found.manifest["selected_rows"] == 6
    assert found.manifest["rows_by_status"] == {"empty_response": 1, "ok": 12}
    assert "2 of 4 clusters are empty" in caplog.text
    assert json.loads(Path(found.manifest_url).read_text()) == found.manifest


@pytest.mark.ray
def test_a_store_that_is_out_is_no_model_that_was_never_trained(
    config_for: ConfigFor, corpus: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = check(config_for(corpus, experience={"clusters": 2}), selecting=False)
    with pytest.raises(NotTrainedError):
        phases.find_experienced_model(checked)

    def fail(_: object) -> None:
        raise InputError("the store does not answer")

    monkeypatch.setattr(pending, "_left_out", lambda _: [])
    monkeypatch.setattr(pending.accounting, "audit", fail)
    with pytest.raises(InputError, match="does not answer") as raised:
        phases.find_experienced_model(checked)
    assert not isinstance(raised.value, NotTrainedError)


def test_without_the_section_there_is_no_experience(config_for: ConfigFor, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="key 'experience': it is missing"):
        run.experience(config_for(corpus))
