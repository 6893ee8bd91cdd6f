"""etcd, kube-apiserver, kube-controller-manager and, where it is built, kube-scheduler as plain processes."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from . import binaries, processes
from .certificates import Authority
from .shell import CommandFailed

SERVICE_RANGE = "10.96.0.0/16"
FIRST_SERVICE = "10.96.0.1"


def free_port() -> int:
    """A TCP port of the loopback interface that is free now, and that no outgoing connection is given later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)  # Linux takes those of connections from 32768 on
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(what: str, ready: Callable[[], bool], seconds: float, logs: Path | None = None) -> None:
    """Poll until ready. Raises CommandFailed with the end of the logs."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            tails = []
            for log in sorted(logs.glob("*.log")) if logs else []:
                tails.append(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-8:]))
            raise CommandFailed(f"{what}: not ready after {seconds:.0f} s\n" + "\n".join(tails))
        time.sleep(0.25)


WITHOUT_NODES = "*,-podgc"
"""Controllers where played pods have no node: the pod garbage collector takes a deleted one for a leftover, and deletes by name
what came after it."""


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Whether a GET of the URL returns 200."""
    try:
        with urllib.request.urlopen(url, timeout=3, context=context) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def start(
    cluster: str, state: Path, kubernetes: Path, address: str, *, extra_apiserver: list[str] | None = None, controllers: str = "*"
) -> tuple[Authority, Path]:
    """Start all four, or only those that serve the API (no `controllers`), and wait until they answer.

    Returns the authority and the administrator's kubeconfig.
    """
    logs = state / "logs"
    authority = Authority(state / "pki")
    port, etcd, etcd_peer = (6443 if address != "127.0.0.1" else free_port()), free_port(), free_port()
    server = f"https://{address}:{port}"
    etcd_url = f"http://127.0.0.1:{etcd}"
    processes.start(
        cluster,
        "etcd",
        [
            binaries.ensure("etcd") / "etcd", "--data-dir", state / "etcd", "--unsafe-no-fsync",
            "--listen-client-urls", etcd_url, "--advertise-client-urls", etcd_url,
            "--listen-peer-urls", f"http://127.0.0.1:{etcd_peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{etcd_peer}",
            "--initial-cluster", f"default=http://127.0.0.1:{etcd_peer}",
        ],
        logs,
    )  # fmt: skip
    hosts = [address, FIRST_SERVICE, "127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    certificate, key = authority.issue("apiserver", "kube-apiserver", hosts=hosts)
    client_certificate, client_key = authority.issue("apiserver-kubelet", "kube-apiserver-kubelet", "system:masters")
    processes.start(
        cluster,
        "kube-apiserver",
        [
            kubernetes / "kube-apiserver", f"--etcd-servers={etcd_url}", f"--bind-address={address}", f"--secure-port={port}",
            f"--advertise-address={address}", f"--service-cluster-ip-range={SERVICE_RANGE}", "--allow-privileged=true",
            f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}", f"--client-ca-file={authority.path}",
            f"--kubelet-client-certificate={client_certificate}", f"--kubelet-client-key={client_key}",
            f"--kubelet-certificate-authority={authority.path}", "--kubelet-preferred-address-types=InternalIP",
            "--enable-aggregator-routing=true",  # no kube-proxy on the host: webhooks are reached at their pods' addresses
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={authority.service_account_key}",
            f"--service-account-key-file={authority.service_account_key}",
            # an Endpoints object may not name a loopback address
            *(["--endpoint-reconciler-type=none"] if address == "127.0.0.1" else []),
            *(extra_apiserver or []),
        ],
        logs,
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(authority.path))
    admin_certificate, admin_key = authority.issue("probe", "probe", "system:masters")
    context.load_cert_chain(admin_certificate, admin_key)
    wait_for("kube-apiserver", lambda: answers(f"{server}/readyz", context), 90, logs)
    admin = authority.kubeconfig("admin", server, "admin", "system:masters")
    if not controllers:
        return authority, admin
    processes.start(
        cluster,
        "kube-controller-manager",
        [
            kubernetes / "kube-controller-manager", f"--kubeconfig={admin}", "--leader-elect=false", f"--secure-port={free_port()}",
            "--use-service-account-credentials=false", f"--root-ca-file={authority.path}",
            f"--service-account-private-key-file={authority.service_account_key}",
            f"--controllers={controllers}", "--kube-api-qps=200", "--kube-api-burst=400", "--node-monitor-grace-period=20s",
        ],
        logs,
    )  # fmt: skip
    if (kubernetes / "kube-scheduler").exists():  # the oldest version is built without
        command: list[str | Path] = [
            kubernetes / "kube-scheduler",
            f"--kubeconfig={admin}",
            "--leader-elect=false",
            f"--secure-port={free_port()}",
        ]
        processes.start(cluster, "kube-scheduler", command, logs)
    return authority, admin
