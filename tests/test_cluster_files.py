"""What cluster/ holds, against the schemas of Kubernetes, KubeRay and Ray, and for its meaning."""

import copy
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import threading
import urllib.error
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml
from conftest import REPOSITORY
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline import __version__, cli, config

CLUSTER = REPOSITORY / "cluster"
OVERLAYS = ["cpu-smoke", "gpu", "raycluster", "raycronjob", "weekly"]
RAY_UP = ["ray-up-aws.yaml", "ray-up-gcp.yaml"]
IMAGE = "registry.example.com/cherry"
KUBERNETES = "1.32"
_DEFINITIONS = {
    "RayCluster": "ray.io_rayclusters.yaml",
    "RayJob": "ray.io_rayjobs.yaml",
    "RayCronJob": "ray.io_raycronjobs.yaml",
}


# What our kustomizations use of kustomize, for machines without kubectl; where there is one, a test
# below compares.


@cache
def _built(folder: Path) -> tuple[Any, ...]:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {
        "apiVersion", "kind", "resources", "labels", "configMapGenerator", "generatorOptions",
        "images", "patches", "replacements",
    }  # fmt: skip
    assert set(kustomization) <= known
    resources: list[Any] = []
    for name in kustomization["resources"]:
        path = (folder / name).resolve()
        resources += copy.deepcopy(_built(path)) if path.is_dir() else _read(path)
    for generator in kustomization.get("configMapGenerator", []):
        assert kustomization["generatorOptions"] == {"disableNameSuffixHash": True}
        data = {name: (folder / name).read_text() for name in generator["files"]}
        metadata = {"name": generator["name"]}
        made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
        resources.append(made)
    for patch in kustomization.get("patches", []):
        (target,) = _of_kind(resources, patch["target"]["kind"])
        for operation in yaml.safe_load(patch["patch"]):
            _patch(target, **operation)
    for labels in kustomization.get("labels", []):
        for resource in resources:
            resource["metadata"].setdefault("labels", {}).update(labels["pairs"])
    for image in kustomization.get("images", []):
        for container in _containers(resources):
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    for replacement in kustomization.get("replacements", []):
        source = replacement["source"]
        value = _at(_of_kind(resources, source["kind"])[0], source["fieldPath"])
        for each in replacement["targets"]:
            (target,) = _of_kind(resources, each["select"]["kind"])
            for path in each["fieldPaths"]:
                *parents, leaf = path.split(".")
                _at(target, ".".join(parents))[leaf] = copy.deepcopy(value)
    return tuple(resources)


def _read(path: Path) -> list[Any]:
    # Through JSON: aliases of YAML become copies.
    return json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))


def _build(overlay: str) -> list[Any]:
    local = "config.kubernetes.io/local-config"
    return [
        copy.deepcopy(resource)
        for resource in _built(CLUSTER / "overlays" / overlay)
        if resource["metadata"].get("annotations", {}).get(local) != "true"
    ]


def _of_kind(resources: Any, kind: str) -> list[Any]:
    return [resource for resource in resources if resource["kind"] == kind]


def _step(node: Any, key: str) -> Any:
    return node[int(key)] if isinstance(node, list) else node[key]


def _at(node: Any, path: str) -> Any:
    for key in filter(None, path.split(".")):
        node = _step(node, key)
    return node


def _patch(target: Any, op: str, path: str, value: Any = None) -> None:
    *parents, leaf = path.strip("/").split("/")
    parent = _at(target, ".".join(parents))
    if op == "test":
        assert _step(parent, leaf) == value
    elif op == "remove":
        del parent[int(leaf) if isinstance(parent, list) else leaf]
    else:
        assert op == "add" or _step(parent, leaf) is not None
        parent[int(leaf) if isinstance(parent, list) else leaf] = value


def _containers(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from _containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from _containers(value)


def _pods(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every pod template below a node, with the path to it."""
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield name, node
            return
        for key, value in node.items():
            yield from _pods(value, f"{name}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _pods(value, f"{name}.{number}")


def _ray_pods(overlay: str) -> list[tuple[str, Any]]:
    pods = [found for resource in _build(overlay) for found in _pods(resource)]
    return [(n, pod) for n, pod in pods if "headGroupSpec" in n or "workerGroupSpecs" in n]


def _clusters(overlay: str) -> list[Any]:
    found: list[Any] = []
    for resource in _build(overlay):
        spec = resource.get("spec", {})
        if resource["kind"] in _DEFINITIONS:
            spec = spec.get("jobTemplate", spec)
            found.append(spec.get("rayClusterSpec", spec))
    return found


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_what_these_tests_look_at(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(CLUSTER / "overlays" / overlay)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)

    def by_name(resources: Any) -> dict[tuple[str, str], Any]:
        return {(each["kind"], each["metadata"]["name"]): each for each in resources}

    theirs = by_name(json.loads(json.dumps(list(yaml.safe_load_all(done.stdout)))))
    assert theirs == by_name(_build(overlay))


# Schemas.


@cache
def _schema(definition: Path) -> Any:
    versions = yaml.safe_load(definition.read_text())["spec"]["versions"]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """Kubernetes prunes unknown fields silently; here they are an error."""
    if isinstance(schema, dict):
        strict = {key: _strict(value) for key, value in schema.items()}
        if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
            strict.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            strict.pop("type", None)
        return strict
    return [_strict(value) for value in schema] if isinstance(schema, list) else schema


def _validate_core(manifest: Any) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def _validate_ray(manifest: Any, shared: Path) -> None:
    _schema(shared / "kuberay-crds" / _DEFINITIONS[manifest["kind"]]).validate(manifest)


def _validate_pods(manifest: Any) -> None:
    """Pods inside, as Kubernetes itself would take them; KubeRay's definitions know less."""
    for name, template in _pods(manifest):
        metadata = {"name": "pod", **template.get("metadata", {})}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        try:
            _validate_core(pod)
        except kubernetes_validate.ValidationError as err:
            err.add_note(name)
            raise


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_are_valid(overlay: str) -> None:
    for manifest in _build(overlay):
        _validate_pods(manifest)
        if manifest["kind"] not in _DEFINITIONS:
            _validate_core(manifest)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_kinds_are_valid(overlay: str, shared: Path) -> None:
    found = [manifest for manifest in _build(overlay) if manifest["kind"] in _DEFINITIONS]
    assert len(found) == 1
    _validate_ray(found[0], shared)


# (overlay, kind, field to misspell, field to give a wrong type, field to leave out)
_FAULTS = [
    (
        "gpu",
        "RayJob",
        "spec.backoffLimit",
        "spec.backoffLimit",
        "spec.rayClusterSpec.headGroupSpec",
    ),
    ("raycluster", "RayCluster", "spec.rayVersion", "spec.rayVersion", "spec.headGroupSpec"),
    ("raycronjob", "RayCronJob", "spec.timeZone", "spec.schedule", "spec.jobTemplate"),
    ("weekly", "CronJob", "spec.concurrencyPolicy", "spec.jobTemplate", "spec.schedule"),
    ("weekly", "Role", "rules.0.resources", "rules.0.apiGroups", "rules.0.verbs"),
    ("weekly", "RoleBinding", "subjects.0.name", "subjects", "roleRef"),
    ("gpu", "ServiceAccount", "metadata.labels", "metadata.labels", None),
    ("gpu", "ConfigMap", "data", "data", None),
]


def _break(manifest: Any, path: str, how: str) -> Any:
    broken = copy.deepcopy(manifest)
    parent_path, _, leaf = path.rpartition(".")
    parent = _at(broken, parent_path)
    value = parent.pop(leaf)
    if how == "misspelt":
        parent[leaf + "s"] = value
    if how == "wrong type":
        parent[leaf] = 7 if isinstance(value, str | dict | list) else "seven"
    return broken


@pytest.mark.parametrize("how", ["misspelt", "wrong type", "missing"])
@pytest.mark.parametrize("fault", _FAULTS, ids=lambda fault: fault[1])
def test_a_fault_in_a_manifest_is_caught(
    fault: Any, how: str, request: pytest.FixtureRequest
) -> None:
    overlay, kind, *paths = fault
    path = paths[["misspelt", "wrong type", "missing"].index(how)]
    if path is None:
        return  # nothing is required of this kind
    broken = _break(_of_kind(_build(overlay), kind)[0], path, how)
    if kind in _DEFINITIONS:
        shared = request.getfixturevalue("shared")
        with pytest.raises(jsonschema.ValidationError):
            _validate_ray(broken, shared)
    else:
        with pytest.raises(kubernetes_validate.ValidationError):
            _validate_core(broken)


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("containers.0.image", "misspelt"),
        ("volumes.0.emptyDir.medium", "wrong type"),
        ("containers.0.volumeMounts.0.mountPath", "missing"),
        ("containers.0.name", "missing"),
    ],
)
def test_a_fault_in_a_pod_of_ray_is_caught(path: str, how: str) -> None:
    (job,) = _of_kind(_build("gpu"), "RayJob")
    broken = _break(job, f"spec.rayClusterSpec.headGroupSpec.template.spec.{path}", how)
    with pytest.raises(kubernetes_validate.ValidationError):
        _validate_pods(broken)


def _ray_up(name: str) -> Any:
    return _read(CLUSTER / name)[0]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_files_are_valid(name: str) -> None:
    validate_config(prepare_config(_ray_up(name)))


@pytest.mark.parametrize("how", ["misspelt", "wrong type", "missing"])
@pytest.mark.parametrize("name", RAY_UP)
def test_a_fault_in_a_ray_up_file_is_caught(name: str, how: str) -> None:
    paths = {"misspelt": "idle_timeout_minutes", "wrong type": "auth", "missing": "head_node_type"}
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(_break(_ray_up(name), paths[how], how)))


# Meaning.


def _bytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_object_store_fits_into_shm_and_memory_is_guaranteed(overlay: str) -> None:
    pods = _ray_pods(overlay)
    assert pods
    for _, pod in pods:
        (container,) = pod["spec"]["containers"]
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert "cpu" in resources["requests"]
        (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        memory, shm = _bytes(resources["limits"]["memory"]), _bytes(volume["emptyDir"]["sizeLimit"])
        # Ray fills 30 % of the container's memory. Much more would be taken from the processes.
        assert DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * memory <= shm <= 0.4 * memory


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_runs_as_root_or_gains_privileges(overlay: str) -> None:
    pods = [found for resource in _build(overlay) for found in _pods(resource)]
    assert pods
    for _, pod in pods:
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            _assert_unprivileged(container["securityContext"])
    for cluster in _clusters(overlay):
        _assert_unprivileged(cluster["autoscalerOptions"]["securityContext"])


def _assert_unprivileged(context: Any) -> None:
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert not context.get("privileged")
    assert context.get("runAsUser") != 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_references(overlay: str) -> None:
    resources = _build(overlay)
    assert not _of_kind(resources, "Secret")
    for container in _containers(resources):
        for variable in container.get("env", []):
            secret = re.search("KEY|SECRET|TOKEN|PASSW|CREDENTIAL", variable["name"])
            assert not (secret and "value" in variable)
    text = json.dumps(resources) + "".join((CLUSTER / name).read_text() for name in RAY_UP)
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|hf_[A-Za-z0-9]{20}|://[^/\s\"]*:[^/\s\"]*@", text
    )
    for cluster in _clusters(overlay):
        assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_run_on_spot_and_the_head_does_not(overlay: str) -> None:
    spot = {
        "cloud.google.com/gke-spot",
        "eks.amazonaws.com/capacityType",
        "karpenter.sh/capacity-type",
    }
    for name, pod in _ray_pods(overlay):
        affinity = pod["spec"]["affinity"]["nodeAffinity"]
        tolerated = {each["key"] for each in pod["spec"].get("tolerations", [])}
        if "headGroupSpec" in name:
            assert not tolerated
            required = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
            (term,) = required["nodeSelectorTerms"]
            refused = {e["key"] for e in term["matchExpressions"] if e["operator"] == "NotIn"}
            assert refused == spot
        else:
            assert spot <= tolerated
            preferred = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
            assert {p["preference"]["matchExpressions"][0]["key"] for p in preferred} == spot


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clusters_are_internal_and_their_heads_do_no_work(overlay: str) -> None:
    for cluster in _clusters(overlay):
        head = cluster["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP"
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert not head.get("enableIngress")
        pods = [head, *cluster["workerGroupSpecs"]]
        accounts = [pod["template"]["spec"]["serviceAccountName"] for pod in pods]
        assert accounts == ["cherry-head"] + ["cherry-worker"] * (len(pods) - 1)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_versions_are_those_of_this_repository(overlay: str) -> None:
    pins = dict(re.findall(r"^(\w\S*)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M))
    tag = f"{__version__}-cpu" if overlay == "cpu-smoke" else __version__
    for cluster in _clusters(overlay):
        assert cluster["rayVersion"] == pins["ray"]
        assert all(container["image"] == f"{IMAGE}:{tag}" for container in _containers(cluster))
    base = re.search(r"^FROM (python:\S+) ", (CLUSTER / "Dockerfile").read_text(), re.M)
    assert base is not None
    images = {container["image"] for container in _containers(_build(overlay))}
    assert images <= {f"{IMAGE}:{tag}", base[1]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_config_loads_and_asks_for_no_more_than_the_cluster_may_have(
    overlay: str, tmp_path: Path
) -> None:
    (found,) = [c for c in _of_kind(_build(overlay), "ConfigMap") if "config.yaml" in c["data"]]
    path = tmp_path / "config.yaml"
    path.write_text(found["data"]["config.yaml"])
    settings = config.load(str(path))
    for cluster in _clusters(overlay):
        limits = [
            (
                group["maxReplicas"],
                group["template"]["spec"]["containers"][0]["resources"]["limits"],
            )
            for group in cluster["workerGroupSpecs"]
        ]
        gpus = sum(most * int(each.get("nvidia.com/gpu", 0)) for most, each in limits)
        assert settings.cluster.gpus_per_actor != "auto"
        assert settings.cluster.actors != "auto"
        assert settings.cluster.actors * settings.cluster.gpus_per_actor <= gpus
        mounted = cluster["headGroupSpec"]["template"]["spec"]["volumes"]
        assert {"name": found["metadata"]["name"]} in [v.get("configMap") for v in mounted]


def test_entrypoint_is_a_command_of_cherry() -> None:
    (job,) = _of_kind(_build("gpu"), "RayJob")
    program, command, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "cherry"
    group: Any = typer.main.get_command(cli.app)
    group.commands[command].make_context(command, arguments)  # an unknown option raises


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_starts_workers_on_spot_and_a_head_without_work(name: str) -> None:
    cluster = _ray_up(name)
    assert cluster["docker"]["image"] == f"{IMAGE}:{__version__}"
    nodes = dict(cluster["available_node_types"])
    head = nodes.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in line for line in cluster["head_start_ray_commands"])
    spot = [
        {"InstanceMarketOptions": {"MarketType": "spot"}},
        {"scheduling": {"provisioningModel": "SPOT"}},
    ]

    def on_spot(node: Any) -> bool:
        return any(
            node["node_config"].get(key, {}).get(field) == value
            for each in spot
            for key, fields in each.items()
            for field, value in fields.items()
        )

    assert not on_spot(head)
    assert all(on_spot(node) for node in nodes.values())
    assert nodes["gpu"]["min_workers"] == 0
    roles = {"IamInstanceProfile", "serviceAccounts"}
    assert all(roles & set(node["node_config"]) for node in [head, *nodes.values()])


def test_a_week_holds_a_run_with_all_its_attempts() -> None:
    resources = _build("weekly")
    (template,), (schedule,) = _of_kind(resources, "RayJob"), _of_kind(resources, "CronJob")
    job = template["spec"]
    assert job["suspend"] is True
    assert job["shutdownAfterJobFinishes"] is True
    attempts = 1 + job["backoffLimit"]
    waiting = schedule["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert attempts * job["activeDeadlineSeconds"] < waiting < 7 * 24 * 3600
    assert schedule["spec"]["concurrencyPolicy"] == "Forbid"
    assert schedule["spec"]["startingDeadlineSeconds"] > 0


def test_the_schedule_may_read_and_create_rayjobs_and_nothing_else() -> None:
    resources = _build("weekly")
    (role,), (binding,) = _of_kind(resources, "Role"), _of_kind(resources, "RoleBinding")
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (schedule,) = _of_kind(resources, "CronJob")
    account = schedule["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]


# start.py, against an API server of a few lines.


def _start_module() -> Any:
    path = CLUSTER / "overlays/weekly/start.py"
    spec = importlib.util.spec_from_file_location("cherry_weekly_start", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


start = _start_module()
_UID = "11111111-2222-3333-4444-555555555555"


class _Api:
    """RayJobs of one namespace; a created one goes through `states`, one a request."""

    def __init__(self, states: list[dict[str, str]], faults: list[int]) -> None:
        (template,) = _of_kind(_build("weekly"), "RayJob")
        self.rayjobs = {"cherry": template}
        self.created: list[Any] = []
        self.states = states
        self.faults = faults

    def answer(self, method: str, name: str, body: Any) -> tuple[int, Any]:
        if self.faults:
            return self.faults.pop(0), {}
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.rayjobs:
                return 409, {}
            self.rayjobs[name] = body
            self.created.append(body)
            return 201, body
        if name not in self.rayjobs:
            return 404, {}
        if name != "cherry" and self.states:
            self.rayjobs[name]["status"] = self.states.pop(0)
        return 200, self.rayjobs[name]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[_Api, Any]]]:
    (tmp_path / "token").write_text("a token\n")
    servers = []

    def begin(states: list[dict[str, str]], faults: list[int]) -> tuple[_Api, Any]:
        api = _Api(states, faults)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send("GET")

            def do_POST(self) -> None:
                self._send("POST")

            def _send(self, method: str) -> None:
                assert self.headers["Authorization"] == "Bearer a token"
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                name = self.path.removeprefix("/rayjobs").strip("/")
                code, found = api.answer(method, name, json.loads(raw) if raw else None)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/rayjobs"
        return api, start.RayJobs(url, tmp_path)

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def _state(deployment: str, job: str) -> dict[str, str]:
    return {"jobDeploymentStatus": deployment, "jobStatus": job}


_RUNNING, _DONE = _state("Running", "RUNNING"), _state("Complete", "SUCCEEDED")


def test_start_copies_the_template_and_waits_for_the_end(serve: Any, shared: Path) -> None:
    api, client = serve([{}, _RUNNING, _RUNNING, _state("Retrying", "FAILED"), _DONE], [])
    assert start.run(client, "cherry", "cherry-weekly-1", _UID, 0) == 0
    assert api.states == []
    (created,) = api.created
    assert created["spec"] == {**api.rayjobs["cherry"]["spec"], "suspend": False}
    (owner,) = created["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "cherry-weekly-1", _UID)
    created.pop("status")
    _validate_ray(created, shared)


def test_start_after_its_node_went_finds_its_run(serve: Any) -> None:
    api, client = serve([_RUNNING, _DONE, _RUNNING, _DONE], [])
    assert start.run(client, "cherry", "cherry-weekly-1", _UID, 0) == 0
    assert start.run(client, "cherry", "cherry-weekly-1", _UID, 0) == 0
    assert len(api.created) == 1


@pytest.mark.parametrize(
    "end",
    [_state("Failed", "FAILED"), _state("ValidationFailed", ""), _state("Complete", "STOPPED")],
    ids=lambda end: end["jobDeploymentStatus"],
)
def test_start_fails_where_the_run_fails(serve: Any, end: dict[str, str]) -> None:
    _, client = serve([_RUNNING, end], [])
    assert start.run(client, "cherry", "cherry-weekly-1", _UID, 0) == 1


def test_start_refuses_a_run_of_another_job(serve: Any) -> None:
    api, client = serve([_RUNNING], [])
    api.rayjobs["now"] = {"metadata": {"name": "now"}, "spec": {}}
    assert start.run(client, "cherry", "now", _UID, 0) == 1
    assert not api.created


def test_start_asks_again_where_the_api_server_fails(serve: Any) -> None:
    _, client = serve([_RUNNING, _DONE], [503, 429, 500])
    assert start.run(client, "cherry", "cherry-weekly-1", _UID, 0) == 0


def test_start_gives_up_where_it_may_not(serve: Any) -> None:
    _, client = serve([], [403])
    with pytest.raises(urllib.error.HTTPError, match="403"):
        start.run(client, "cherry", "cherry-weekly-1", _UID, 0)
