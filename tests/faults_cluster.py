"""Processes that the fault tests kill: a Ray cluster of several nodes, and drivers."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from conftest import REPOSITORY, free_ports
from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

_POLL_S = 0.1
_DEADLINE_S = 120

# What may stay when a job has gone: idle workers, agents, and Ray Data's detached actors.
_AT_REST = re.compile(
    r"ray::(IDLE|DashboardAgent|RuntimeEnvAgent|_StatsActor|_?AutoscalingCoordinator"
    r"|ActorLocationTracker|_UsageCollectionActor)"
)
SCORER = re.compile(r"ray::.*UnitScorer")


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = _DEADLINE_S) -> Any:
    """Poll until a condition holds, and hand its value on."""
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {deadline_s:.0f} s in vain: {what}"
        time.sleep(_POLL_S)
    return value


class Machines:
    """A Ray cluster: a head without CPUs, where drivers attach, and worker nodes that may die."""

    def __init__(self, num_workers: int, folder: str, dashboard: bool, gpus: int) -> None:
        self._cluster = Cluster()
        # A dead raylet refuses its health checks; three in half a second each, instead of 25 s.
        health = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
        self._cluster.add_node(
            num_cpus=0,
            include_dashboard=dashboard,
            dashboard_port=0,  # any that is free
            # Jobs are handed to the head's agent: not on Ray's fixed port, which another cluster
            # of this machine may have.
            dashboard_agent_listen_port=free_ports(1)[0],
            object_store_memory=150_000_000,
            temp_dir=folder,
            _system_config=health,
        )
        # As `ray start` does: of several clusters on a machine, a job else gets any.
        write_ray_address(self.address, folder)
        self.num_workers = num_workers
        self._gpus = gpus
        self.restore()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self._cluster.webui_url}"

    def restore(self) -> None:
        """Add worker nodes until there are as many as at first, in place of dead ones."""
        for node in list(self._cluster.worker_nodes):
            if node.all_processes["raylet"][0].process.poll() is not None:
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < self.num_workers:
            self._cluster.add_node(num_cpus=2, num_gpus=self._gpus, object_store_memory=200_000_000)

    def kill_node(self, pick: float) -> str:
        """SIGKILL everything that runs on one worker node, as when its machine is switched off."""
        node = _pick(sorted(self._cluster.worker_nodes, key=lambda n: n.node_id), pick)
        for process in _processes(node):
            _kill(process)
        node.all_processes["raylet"][0].process.wait(timeout=_DEADLINE_S)
        return str(node.node_id[:8])

    def kill_scorer(self, pick: float) -> str:
        """SIGKILL the process of one scoring actor; empty if there is none."""
        scorers = self.workers(SCORER)
        if not scorers:
            return ""
        process = _pick(sorted(scorers, key=lambda p: p.pid), pick)
        _kill(process)
        return str(process.pid)

    def scores(self) -> bool:
        """Whether a scoring actor lives."""
        return bool(self.workers(SCORER))

    def await_rest(self) -> None:
        """Wait until nothing of any job runs: no task, no actor."""
        deadline = time.monotonic() + _DEADLINE_S
        while busy := self._busy():
            assert time.monotonic() < deadline, f"still there {_DEADLINE_S} s after a job: {busy}"
            time.sleep(_POLL_S)

    def workers(self, title: re.Pattern[str]) -> list[psutil.Process]:
        """The Ray worker processes of all nodes whose title matches."""
        return [p for p, name in self._titles() if title.match(name)]

    def _busy(self) -> list[str]:
        return [name for _, name in self._titles() if not _AT_REST.match(name)]

    def _titles(self) -> Iterator[tuple[psutil.Process, str]]:
        for node in self._cluster.list_all_nodes():
            for process in _processes(node):
                title = _title(process)
                if title.startswith("ray::"):
                    yield process, title

    def stop(self) -> None:
        self._cluster.shutdown()


@contextmanager
def machines(num_workers: int, *, dashboard: bool = False, gpus: int = 0) -> Iterator[Machines]:
    """A cluster whose workers find the pipeline and the trace's hook, wherever pytest was begun."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PATH")}
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), before["PYTHONPATH"]]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # A job's `python` is that of the environment in which its cluster was started.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before['PATH']}"
    # Short: Ray's sockets lie in it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(
        prefix="cherry-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        cluster = Machines(num_workers, folder, dashboard, gpus)
        try:
            yield cluster
        finally:
            cluster.stop()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _processes(node: Any) -> list[psutil.Process]:
    """The node's raylet and all that runs under it; empty if it is dead."""
    with suppress(psutil.NoSuchProcess):
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]
    return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:  # it has just gone
        return ""


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _pick(choices: list[Any], pick: float) -> Any:
    return choices[int(pick * len(choices))]


class Driver:
    """`cherry run` in a process group of its own, traced."""

    def __init__(
        self, config: Path, output: str, folder: Path, trace: Path, address: str, endpoint: str
    ) -> None:
        folder.mkdir(parents=True)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        # What `ray job submit` sets; Ray merges it into the job's runtime environment.
        runtime_env = {
            "worker_process_setup_hook": "faults_hook.install",
            "env_vars": {"CHERRY_FAULT_TRACE": str(trace), "AWS_ENDPOINT_URL": endpoint},
        }
        environment = {
            **os.environ,
            "RAY_ADDRESS": address,
            "AWS_ENDPOINT_URL": endpoint,
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": runtime_env}),
        }
        command = ["-m", "pipeline", "run", str(config), "--json", "--set", f"output={output}"]
        with open(self._stdout, "wb") as out, open(self._stderr, "wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, *command], cwd=REPOSITORY, env=environment,
                stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def ends_within(self, seconds: float) -> bool:
        """Wait for its end, so long."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL its process group; nothing if it has ended."""
        if not self.ended:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_words(self) -> str:
        """The end of its standard error."""
        return self._stderr.read_text(errors="replace")[-3000:]

    def summary(self) -> dict[str, Any]:
        """What it printed; an assertion with its last words if it did not end well."""
        code = self._process.returncode
        assert code == 0, f"the driver ended with {code}: {self.last_words()}"
        return dict(json.loads(self._stdout.read_text().splitlines()[-1]))
