"""`finetune download`: a published result onto this machine. From claims through a pod that mounts them read-only."""

from __future__ import annotations

import contextlib
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from kubernetes import client
from kubernetes.stream import stream

from finetune_api.status import Artifact
from finetune_api.uris import parse_uri

from .cluster import Jobs

_START_SECONDS = 180
_ELSEWHERE = {
    "hf": "it is on the Hugging Face Hub: hf download {name}",
    "s3": "it is in a bucket: aws s3 cp --recursive {uri} {target}",
    "oci": "it is in a registry: oras pull --output {target} {name}/{path}:{tag}",
    "mlflow": "it is in MLflow: MLFLOW_TRACKING_URI=https://{name} mlflow artifacts download --artifact-uri models:/{path}@champion --dst-path {target}",
}


class NotHere(Exception):
    """The result is fetched by another tool, or cannot be."""


def download(jobs: Jobs, artifact: Artifact, image: str, target: Path) -> int:
    """Copy a result from its claim; returns the number of files. Raises NotHere."""
    uri = parse_uri(artifact.uri)
    if uri.scheme != "pvc":
        hint = _ELSEWHERE.get(uri.scheme, "fetch it with a tool for {uri}")
        raise NotHere(hint.format(name=uri.name, path=uri.path, tag=uri.revision or "latest", uri=artifact.uri, target=target))
    with _reader(jobs, uri.name, image) as pod, tempfile.TemporaryFile() as archive:
        command = ["tar", "-C", "/volume", "-cf", "-", "--", uri.path or "."]
        answer = stream(
            jobs.core.connect_get_namespaced_pod_exec,
            pod,
            jobs.namespace,
            command=command,
            stderr=True,
            stdout=True,
            binary=True,
            _preload_content=False,
        )
        problem = b""
        while answer.is_open():
            answer.update(timeout=5)
            if answer.peek_stdout():
                archive.write(answer.read_stdout())
            if answer.peek_stderr():
                problem += answer.read_stderr()
        if answer.returncode != 0:
            raise NotHere(f"{artifact.uri}: {problem.decode(errors='replace').strip() or 'tar failed'}")
        archive.seek(0)
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=archive) as tar:
            members = [m for m in tar.getmembers() if m.isfile()]
            for member in members:
                member.name = str(Path(member.name).relative_to(uri.path)) if uri.path else member.name
            tar.extractall(target, members, filter="data")
        return len(members)


@contextlib.contextmanager
def _reader(jobs: Jobs, claim: str, image: str) -> Iterator[str]:
    """A pod of the caller's own that has the claim at /volume."""
    name = f"finetune-download-{uuid.uuid4().hex[:8]}"
    body = {
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "activeDeadlineSeconds": 3600,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "reader",
                    "image": image,
                    "command": ["sleep", "3600"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "volume", "mountPath": "/volume", "readOnly": True}],
                }
            ],
            "volumes": [{"name": "volume", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}],
        },
    }
    jobs.core.create_namespaced_pod(jobs.namespace, body)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while (phase := jobs.core.read_namespaced_pod(name, jobs.namespace).status.phase) != "Running":
            if phase in ("Failed", "Succeeded") or time.monotonic() > deadline:
                raise NotHere(f"pod {name} that reads claim {claim} did not start ({phase})")
            time.sleep(0.5)
        yield name
    finally:
        with contextlib.suppress(client.ApiException):
            jobs.core.delete_namespaced_pod(name, jobs.namespace, grace_period_seconds=0)
