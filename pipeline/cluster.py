"""The Ray cluster of a run: connect to it, and say what its workers get."""

import logging
import math
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
from ray._private import auto_init_hook, ray_constants
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from pipeline.config import ClusterConfig
from pipeline.config_training import TrainConfig
from pipeline.errors import ConfigError
from pipeline.texts import count

log = logging.getLogger("cherry")

_LONGEST_STEP_S = 10.0
"""In which Ray Data asks what is there and starts what it can, before it looks whether to go on."""


@dataclass(frozen=True)
class Workers:
    """What the scoring actors get of the cluster."""

    actors: int
    num_gpus: float
    num_cpus: float
    threads: int
    """Torch threads of an actor without a GPU."""
    grow: bool = False
    """Whether there are more actors when more GPUs join."""
    tokenisers: int | None = None
    """Tasks that read and tokenise at once, at most."""
    units_in_flight: int = 2
    """Of an actor: one in work, the others behind it."""

    @property
    def devices(self) -> float:
        """GPUs they hold, or actors where there are none: what costs money."""
        return self.actors * (self.num_gpus or 1)

    def at_most(self, units: int) -> "Workers":
        """No more actors than units: each would load a model, on a GPU that costs money."""
        return replace(self, actors=min(self.actors, units))

    def describe(self) -> str:
        """`2 resident models, 1 GPU each`, for the terminal."""
        models = count(self.actors, "resident model")
        if self.num_gpus:
            return f"{models}, {self.num_gpus:g} GPU each"
        return f"{models} on CPU, {self.threads} threads each"


_SPARE_WORKERS = 3

# Logical CPUs of a task. Ray fuses neighbouring stages that ask for the same: tokenising would then
# run inside the scoring actor. No actor's share of its node is ever one of these numbers. A core
# holds one of each: a part that waits to be committed is lost with its node, and every further
# process that tokenises would import transformers for four seconds.
TOKENISE_CPUS = 0.94
COMMIT_CPUS = 0.05


@contextmanager
def connected() -> Iterator[None]:
    """Ray, for the time of a run: the cluster this job was submitted to, else a local one.

    A cluster that was there before stays; a local one ends with the run.
    """
    with _quiet():
        started = not ray.is_initialized()
        if started:
            _start()
        try:
            yield
        finally:
            if started:
                _end_passes()
                ray.shutdown()


def _start() -> None:
    # A local node keeps one worker a core and ends idle ones after a second; on two cores those of
    # the three stages would end and begin, four seconds of imports each, all the time. It also
    # begins as many ahead for tasks that wait: a few more, then, and not many.
    limit = (os.cpu_count() or 1) + _SPARE_WORKERS
    os.environ.setdefault("RAY_num_workers_soft_limit", str(limit))
    # A thread that outlives the run would start a Ray of its own.
    auto_init_hook.enable_auto_connect = False
    # RAY_ADDRESS, which `ray job submit` sets, is read by Ray itself.
    with _local_on_loopback(), _own_handler(signal.SIGTERM), _without_note_of_level():
        ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray's loggers get levels of their own when it is imported, and some speak for themselves."""
    levels = {
        "ray": logging.WARNING,
        "ray._private.authentication": logging.ERROR,
        # It writes to standard error by itself, rows and all; what went wrong comes as exceptions.
        "ray.data": logging.CRITICAL + 1,
    }
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _end_passes() -> None:
    """End the threads of Ray Data that an interrupted run leaves.

    One that asks Ray for something while it ends can bring the process down.
    """
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=False)
            thread.join(_LONGEST_STEP_S)


@contextmanager
def _without_note_of_level() -> Iterator[None]:
    """What a local Ray says as it starts comes after it, less that it knows its log level."""
    if "RAY_ADDRESS" in os.environ:  # what is said while a cluster does not answer comes at once
        yield
        return
    with tempfile.TemporaryFile() as said:
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            for line in said:
                if b"RAY_BACKEND_LOG_LEVEL" not in line:
                    os.write(2, line)


@contextmanager
def _own_handler(number: signal.Signals) -> Iterator[None]:
    """What a signal does stays as it is, whatever is set meanwhile: Ray's handler ends at once."""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _local_on_loopback() -> Iterator[None]:
    """A local Ray that starts meanwhile listens on this machine alone.

    Else it listens on all interfaces, and hangs for ever once the machine has lost the address that
    it began with. The switch is Ray's own, for macOS and Windows; `ray.init(_node_ip_address=…)`
    takes no loopback address.
    """
    everywhere = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = everywhere


def scores_on_gpus(config: ClusterConfig) -> bool:
    """Whether scoring runs on GPUs: as the config says, else where the cluster has any."""
    if config.gpus_per_actor != "auto":
        return config.gpus_per_actor > 0
    return bool(ray.cluster_resources().get("GPU"))


def _gpus(config: ClusterConfig) -> float:
    """GPUs that are there; with `autoscaling`, all that the actors need."""
    there = float(ray.cluster_resources().get("GPU", 0))
    if config.autoscaling and config.actors != "auto" and config.gpus_per_actor != "auto":
        return max(there, config.actors * config.gpus_per_actor)
    return there


def _places(config: ClusterConfig, num_gpus: float) -> int:
    """Actors that fit: the GPUs of one lie on one node."""
    nodes = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
    if num_gpus < 1:  # an actor's share is of one GPU
        there = sum(int(gpus) * int(1 / num_gpus) for gpus in nodes)
    else:
        there = sum(int(gpus / num_gpus) for gpus in nodes)
    return max(there, int(config.actors)) if config.autoscaling else there


def plan_workers(config: ClusterConfig) -> Workers:
    """Resolve the cluster section against the running cluster.

    Threads of a CPU actor are the node's cores whatever the number of actors: the last bits of a
    score may follow the thread count, and must not follow `actors`. Reading and tokenising keep a
    core where there are two.

    Raises:
        ConfigError: More is asked for than the cluster has.
    """
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    if not nodes:
        raise ConfigError(
            "cluster: no node with CPUs is there yet, and reading and tokenising need some. Start "
            "a worker node, or wait until one has joined."
        )
    tokenisers = None if config.cpus_for_tokenising == "auto" else config.cpus_for_tokenising
    cpus = sum(node["CPU"] for node in nodes)
    if tokenisers and tokenisers > cpus and not config.autoscaling:
        raise ConfigError(
            f"cluster.cpus_for_tokenising {tokenisers}: the cluster has {cpus:g} CPUs. Ask for "
            "fewer, or add nodes."
        )
    num_gpus = config.gpus_per_actor
    if num_gpus == "auto":
        num_gpus = 1 if scores_on_gpus(config) else 0
    cores = int(min(node["CPU"] for node in nodes))
    threads = cores if config.threads_per_actor == "auto" else config.threads_per_actor
    if num_gpus:
        grow = config.actors == "auto"
        most = _places(config, num_gpus)
        actors = most if config.actors == "auto" else config.actors
        if not 0 < actors <= most:
            raise ConfigError(
                f"cluster.actors {config.actors} with cluster.gpus_per_actor {num_gpus:g}: the "
                f"cluster has {_gpus(config):g} GPUs, room for {most} actors. Add GPU nodes, set "
                "cluster.autoscaling: true if they join when asked for, ask for fewer actors, or "
                "set cluster.gpus_per_actor: 0 to score on CPUs."
            )
        if actors * num_gpus > ray.cluster_resources().get("GPU", 0):
            log.info("waiting for GPU nodes to join: %g GPUs are asked for", actors * num_gpus)
        return Workers(actors, num_gpus, 0, threads, grow, tokenisers, config.max_units_in_flight)
    actors = len(nodes) if config.actors == "auto" else config.actors
    # Actors share what their node can spare, so that those asked for always fit beside the tasks,
    # and one more does not: the actor of a node that died would take the core of the tasks, on
    # which it waits.
    per_node = math.ceil(actors / len(nodes))
    if len(nodes) > 1 and per_node > max(1, cores - 1):
        raise ConfigError(
            f"cluster.actors {actors}: {per_node} on each of {len(nodes)} nodes, expected at most "
            f"{max(1, cores - 1)} on {cores} cores: reading and tokenising need one. Ask for fewer "
            "actors."
        )
    share = (cores - TOKENISE_CPUS - COMMIT_CPUS) / per_node
    share = math.floor(share * 1e4) / 1e4  # Ray's finest
    return Workers(actors, 0, share, threads, False, tokenisers, config.max_units_in_flight)


@dataclass(frozen=True)
class Trainers:
    """What the processes of a training get of the cluster."""

    workers: int
    use_gpu: bool
    resources: dict[str, float]
    threads: int
    """Torch threads of a worker without a GPU."""

    def describe(self) -> str:
        """`4 workers, a GPU each`, for the terminal."""
        workers = count(self.workers, "worker")
        return f"{workers}, a GPU each" if self.use_gpu else f"{workers} on CPU"


def plan_trainers(config: ClusterConfig, train: TrainConfig) -> Trainers:
    """Resolve `train.workers` against the running cluster.

    Raises:
        ConfigError: More is asked for than the cluster has.
    """
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    use_gpu = scores_on_gpus(config)
    most = int(_gpus(config)) if use_gpu else len(nodes)
    workers = most if train.workers == "auto" else train.workers
    cores = int(min((node["CPU"] for node in nodes), default=0))
    per_node = -(-workers // max(1, len(nodes)))
    if workers < 1 or (use_gpu and workers > most) or (not use_gpu and per_node > cores):
        raise ConfigError(
            f"train.workers {train.workers}: the cluster has {count(len(nodes), 'node')} with CPUs "
            f"and {count(int(_gpus(config)), 'GPU')}. Add nodes, or ask for fewer."
        )
    if workers % train.gpus_per_replica:
        raise ConfigError(
            f"train.gpus_per_replica {train.gpus_per_replica}: got {workers} workers, expected a "
            "multiple of it. Set train.workers."
        )
    if use_gpu:
        return Trainers(workers, True, {"GPU": 1, "CPU": 1}, 1)
    threads = cores // per_node
    return Trainers(workers, False, {"CPU": threads}, threads)
