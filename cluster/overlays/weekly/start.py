"""Start a copy of a suspended RayJob, and wait for its end. Needs only Python.

The copy has the name of the Job that this pod is of, and belongs to it. So a second pod of the Job,
after the first one's node went, finds the run and waits on; and the run goes with the Job. Exit 0:
the run succeeded. 1: it failed, or cannot be started. Anything else: try again.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CREDENTIALS = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_S = 30.0
_LASTING = {400, 401, 403, 404, 422}
"""Answers that asking again will not change."""


def main() -> int:
    """Start the run of this pod's Job, or find it, and follow it."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    namespace = os.environ["NAMESPACE"]
    api = RayJobs(
        f"https://{host}:{port}/apis/ray.io/v1/namespaces/{namespace}/rayjobs", CREDENTIALS
    )
    name, uid = os.environ["JOB_NAME"], os.environ["JOB_UID"]
    try:
        return run(api, os.environ["TEMPLATE"], name, uid, POLL_S)
    except urllib.error.HTTPError as err:
        _say(f"rayjob {name}: {err.code} {err.read().decode(errors='replace')}")
        return 1


class RayJobs:
    """The RayJobs of a namespace."""

    def __init__(self, url: str, credentials: Path) -> None:
        """Take the collection's URL, and the directory of a mounted service account."""
        self._url = url
        self._token = credentials / "token"
        authority = credentials / "ca.crt"
        self._tls = ssl.create_default_context(cafile=authority) if authority.exists() else None

    def get(self, name: str) -> dict[str, Any]:
        """Read one."""
        return self._ask(f"{self._url}/{name}", None)

    def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Create one."""
        return self._ask(self._url, json.dumps(manifest).encode())

    def _ask(self, url: str, body: bytes | None) -> dict[str, Any]:
        # Read every time: the kubelet replaces the token within the hour.
        token = self._token.read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def run(api: RayJobs, template: str, name: str, uid: str, poll_s: float) -> int:
    """Start the run unless it is there, and wait for its end.

    Raises:
        HTTPError: The API server refuses for good, or the run is gone.
    """
    spec = _insist(lambda: api.get(template), poll_s)["spec"]
    _insist(lambda: _create_once(api, _copy(spec, name, uid)), poll_s)
    if not _is_ours(_insist(lambda: api.get(name), poll_s), uid):
        _say(f"rayjob {name}: there is one that another Job made; delete it or take another name")
        return 1
    seen = None
    while True:
        status = _insist(lambda: api.get(name), poll_s).get("status", {})
        state = status.get("jobDeploymentStatus"), status.get("jobStatus")
        if state != seen:
            _say(f"rayjob {name}: {state[0] or 'new'} {state[1] or ''} {status.get('message', '')}")
            seen = state
        if state[0] == "Complete":
            return int(state[1] != "SUCCEEDED")
        if state[0] in ("Failed", "ValidationFailed"):
            return 1
        time.sleep(poll_s)


def _copy(spec: dict[str, Any], name: str, uid: str) -> dict[str, Any]:
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "cherry"},
            "ownerReferences": [owner],
        },
        "spec": {**spec, "suspend": False},
    }


def _create_once(api: RayJobs, manifest: dict[str, Any]) -> None:
    try:
        api.create(manifest)
    except urllib.error.HTTPError as err:
        if err.code != 409:  # it is there: this pod's forerunner made it, or an answer was lost
            raise


def _is_ours(rayjob: dict[str, Any], uid: str) -> bool:
    return uid in [owner["uid"] for owner in rayjob["metadata"].get("ownerReferences", [])]


def _insist(ask: Any, pause_s: float) -> Any:
    """Ask until there is an answer; the Job's own deadline ends it."""
    while True:
        try:
            return ask()
        except urllib.error.HTTPError as err:
            if err.code in _LASTING:
                raise
            _say(f"api server: {err}; asking again")
        except OSError as err:
            _say(f"api server: {err}; asking again")
        time.sleep(pause_s)


def _say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
