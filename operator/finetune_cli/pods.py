"""A pod of the caller's own, made by the caller's own rights, to reach what lies on claims and behind Secrets of a namespace."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from kubernetes import client
from kubernetes.stream import stream
from websocket import WebSocketException

_START_SECONDS = 180
_LIFE_SECONDS = 3600
_CHUNK = 16 * 1024
"""Bytes of standard input in one message."""


class NoPod(Exception):
    """It did not start, or was not let do what it is for; the text says why."""


@dataclass
class Wanted:
    """The pod: it waits, and what it is to do is executed in it."""

    name: str
    """Its beginning."""
    image: str
    mounts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Volume by the path that it is mounted at."""
    read_only: bool = True
    env: list[dict[str, Any]] = field(default_factory=list)
    pull_secrets: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running(core: client.CoreV1Api, namespace: str, wanted: Wanted) -> Iterator[str]:
    """The pod's name, once it runs; it is deleted at the end. Raises NoPod."""
    name = f"{wanted.name}-{uuid.uuid4().hex[:8]}"
    core.create_namespaced_pod(namespace, manifest(name, wanted))
    try:
        deadline = time.monotonic() + _START_SECONDS
        while (phase := core.read_namespaced_pod(name, namespace).status.phase) != "Running":
            if phase in ("Failed", "Succeeded") or time.monotonic() > deadline:
                what = ", ".join(_told(volume) for volume in wanted.mounts.values())
                raise NoPod(f"pod {name} that has {what} did not start ({phase})")
            time.sleep(0.5)
        yield name
    finally:
        with contextlib.suppress(client.ApiException):
            core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)


def manifest(name: str, wanted: Wanted) -> dict[str, Any]:
    """The pod, as the `restricted` Pod Security Standard takes it."""
    volumes = {f"v{index}": (path, volume) for index, (path, volume) in enumerate(wanted.mounts.items())}
    return {
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "activeDeadlineSeconds": _LIFE_SECONDS,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "hand",
                    "image": wanted.image,
                    "command": ["sleep", str(_LIFE_SECONDS)],
                    "env": wanted.env,
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [
                        {"name": volume, "mountPath": path, "readOnly": wanted.read_only} for volume, (path, _) in volumes.items()
                    ],
                }
            ],
            "volumes": [{"name": volume, **source} for volume, (_, source) in volumes.items()],
            **({"imagePullSecrets": [{"name": secret} for secret in wanted.pull_secrets]} if wanted.pull_secrets else {}),
        },
    }


def claim(name: str, *, read_only: bool = True) -> dict[str, Any]:
    """A claim as a volume."""
    return {"persistentVolumeClaim": {"claimName": name, "readOnly": read_only}}


def _told(volume: Mapping[str, Any]) -> str:
    if "persistentVolumeClaim" in volume:
        return f"claim {volume['persistentVolumeClaim']['claimName']}"
    return f"Secret {volume['secret']['secretName']}" if "secret" in volume else "a ConfigMap"


def execute(core: client.CoreV1Api, namespace: str, pod: str, command: list[str], sink: BinaryIO, line: bytes = b"") -> tuple[int, str]:
    """Run a command in the pod; `line` is its standard input, which it has to end with. Returns exit code (-1 where the connection broke off) and standard error."""
    answer = stream(
        core.connect_get_namespaced_pod_exec,
        pod,
        namespace,
        command=command,
        stderr=True,
        stdin=bool(line),
        stdout=True,
        binary=True,
        _preload_content=False,
    )
    problem = b""
    try:
        for start in range(0, len(line), _CHUNK):
            answer.write_stdin(line[start : start + _CHUNK])
        while answer.is_open():
            answer.update(timeout=5)
            if answer.peek_stdout():
                sink.write(answer.read_stdout())
            if answer.peek_stderr():
                problem += answer.read_stderr()
        code = int(answer.returncode)
    except (WebSocketException, OSError) as failure:
        code, problem = -1, problem + f"\n{failure}".encode()
    except (TypeError, KeyError, IndexError, ValueError):  # the end was not told
        code = -1
    return code, problem.decode(errors="replace").strip()
