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
from pipeline.config_training import TrainConfig
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
def test_what_joins_when_asked_for_can_be_asked_for(ray_local: None) -> None:
    """A plan from zero GPU nodes does not follow what happens to be up."""
    config = ClusterConfig(actors=8, gpus_per_actor=0.5, autoscaling=True)
    workers = cluster.plan_workers(config)
    assert (workers.actors, workers.num_gpus, workers.grow) == (8, 0.5, False)
    assert cluster.plan_trainers(config, TrainConfig()).workers == 4
    with pytest.raises(ConfigError, match="the cluster has 0 GPUs"):
        cluster.plan_workers(config.model_copy(update={"autoscaling": False}))
    with pytest.raises(ValueError, match="autoscaling needs numbers"):
        ClusterConfig(autoscaling=True, gpus_per_actor=1)


@pytest.mark.ray
def test_cores_for_tokenising_are_those_of_the_cluster(ray_local: None) -> None:
    workers = cluster.plan_workers(ClusterConfig(cpus_for_tokenising=1, max_units_in_flight=1))
    assert (workers.tokenisers, workers.units_in_flight) == (1, 1)
    with pytest.raises(ConfigError, match="cpus_for_tokenising 4: the cluster has 3"):
        cluster.plan_workers(ClusterConfig(cpus_for_tokenising=4))
