"""A local Ray, and the resources of actors."""

import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import psutil
import pytest
import ray

from pipeline import cluster, scoring
from pipeline.cluster import COMMIT_CPUS, TOKENISE_CPUS, Workers
from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError


def listening_addresses() -> set[str]:
    """Where this process and those it has started can be reached, while Ray is connected."""
    with cluster.connected():
        here = psutil.Process()
        return {
            connection.laddr.ip
            for process in (here, *here.children(recursive=True))
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }


@pytest.mark.ray
def test_a_local_ray_listens_on_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        addresses = pool.submit(listening_addresses).result()
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def scheduling_after_an_interruption() -> list[str]:
    """Threads of Ray Data that are left of a pass when Ray ends under it."""
    left: list[str] = []
    end = ray.shutdown

    def slow(row: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.1)
        return row

    def shutdown() -> None:
        left.extend(each.name for each in threading.enumerate() if "Executor-" in each.name)
        end()

    with suppress(KeyboardInterrupt), cluster.connected():
        ray.shutdown = shutdown
        rows = ray.data.range(1000, override_num_blocks=1000).map(slow).iter_rows()
        for _ in scoring._within(rows, 60):
            raise KeyboardInterrupt
    return left


@pytest.mark.ray
def test_no_thread_asks_ray_for_anything_as_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It crashed the process, now and then, where a run was interrupted."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(scheduling_after_an_interruption).result() == []


@pytest.mark.ray
def test_threads_of_an_actor_do_not_follow_the_number_of_actors(ray_local: None) -> None:
    one = cluster.plan_workers(ClusterConfig())
    two = cluster.plan_workers(ClusterConfig(actors=2))
    assert (one.actors, two.actors) == (1, 2)
    assert one.threads == two.threads == 3
    assert one.num_cpus == 2.01  # a core is left for reading and tokenising
    assert two.num_cpus == 1.005
    assert cluster.plan_workers(ClusterConfig(threads_per_actor=1)).threads == 1


def test_no_more_models_are_loaded_than_there_are_units() -> None:
    workers = Workers(actors=16, num_gpus=1, num_cpus=0, threads=1, grow=True)
    assert workers.at_most(2) == Workers(actors=2, num_gpus=1, num_cpus=0, threads=1, grow=True)
    assert workers.at_most(100) == workers


@pytest.mark.ray
def test_actors_never_ask_for_what_tasks_ask_for(ray_local: None) -> None:
    """Ray fuses neighbours that ask for the same, and would tokenise inside the scoring actor."""
    for actors in range(1, 20):
        share = cluster.plan_workers(ClusterConfig(actors=actors)).num_cpus
        assert share not in (TOKENISE_CPUS, COMMIT_CPUS)
        assert share * actors + TOKENISE_CPUS + COMMIT_CPUS <= 3


@pytest.mark.ray
def test_gpus_that_the_cluster_lacks_are_refused(ray_local: None) -> None:
    for gpus in (1, 4):
        with pytest.raises(ConfigError, match="the cluster has 0 GPUs"):
            cluster.plan_workers(ClusterConfig(gpus_per_actor=gpus))


def test_the_gpus_of_an_actor_lie_on_one_node(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4, "GPU": gpus}} for gpus in (3, 1, 4)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8})
    assert cluster.plan_workers(ClusterConfig(gpus_per_actor=2)).actors == 3
    assert cluster.plan_workers(ClusterConfig(gpus_per_actor=0.5)).actors == 16
    assert cluster.plan_workers(ClusterConfig(gpus_per_actor=0.4)).actors == 16  # not 20
    with pytest.raises(ConfigError, match="has 8 GPUs, room for 3 actors"):
        cluster.plan_workers(ClusterConfig(gpus_per_actor=2, actors=4))
