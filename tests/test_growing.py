"""Scoring actors follow the GPUs of a cluster: logical ones, and a scorer that only sleeps."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, write_parquet
from faults_cluster import machines, wait_until

from pipeline import cluster
from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError


@pytest.mark.slow
def test_actors_come_and_go_with_their_nodes(
    config_for: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [{"instruction": f"one {n}", "input": "", "output": "two three"} for n in range(600)]
    write_parquet(tmp_path / "corpus.parquet", rows)
    config = config_for(tmp_path / "corpus.parquet", score={"unit_rows": 10}, cluster={})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    scorers = tmp_path / "scorers"
    scorers.mkdir()

    def nodes() -> set[str]:
        assert process.poll() is None, process.communicate()
        return {file.name.partition("-")[0] for file in scorers.iterdir()}

    with machines(1, gpus=1) as machine:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests/sleeping.py"), str(path), machine.address,
             "0.004", str(scorers)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_until(nodes, "a unit")
        machine.num_workers = 2
        machine.restore()
        wait_until(lambda: len(nodes()) == 2, "a unit on the node that joined")
        machine.kill_node(0.0)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["rows_by_status"] == {"ok": len(rows)}


@pytest.mark.ray
def test_what_an_autoscaler_may_add_can_be_asked_for(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From zero GPU nodes: the plan is of what the cluster may grow to."""
    from ray._private.state import state

    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"GPU": 4})
    auto = cluster.plan_workers(ClusterConfig())
    assert (auto.actors, auto.num_gpus, auto.grow) == (1, 1, True)
    named = cluster.plan_workers(ClusterConfig(actors=8, gpus_per_actor=0.5))
    assert (named.actors, named.grow) == (8, False)
    with pytest.raises(ConfigError, match="the cluster has 0 GPUs and may have 4"):
        cluster.plan_workers(ClusterConfig(actors=9, gpus_per_actor=0.5))


@pytest.mark.ray
def test_cores_for_tokenising_are_those_of_the_cluster(ray_local: None) -> None:
    workers = cluster.plan_workers(ClusterConfig(cpus_for_tokenising=1, max_units_in_flight=1))
    assert (workers.tokenisers, workers.units_in_flight) == (1, 1)
    with pytest.raises(ConfigError, match="cpus_for_tokenising 4: the cluster has or may have 3"):
        cluster.plan_workers(ClusterConfig(cpus_for_tokenising=4))
