"""The real Kueue: in a cluster with nodes from its own chart, beside a bare control plane as a process of this machine.

Beside a bare control plane its webhooks are called by URL, with a certificate of the cluster's authority.
"""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import helm_python as helm
import yaml

from . import binaries, images, processes
from .certificates import Authority
from .control_plane import answers, free_port, wait_for
from .helm import rendered
from .shell import step

if TYPE_CHECKING:
    from .kind import KindCluster
    from .local import LocalCluster

RELEASE, NAMESPACE = "kueue", "kueue-system"
GROUP, VERSION = "kueue.x-k8s.io", "v1beta2"
_OWN_NAMESPACES = ["kube-system", NAMESPACE, "finetune-system"]
_CONFIGURATION: dict[str, Any] = {
    "apiVersion": "config.kueue.x-k8s.io/v1beta2",
    "kind": "Configuration",
    "health": {"healthProbeBindAddress": ":8081"},
    "metrics": {"bindAddress": ":8443"},
    "webhook": {"port": 9443},
    "leaderElection": {"leaderElect": False},
    "clientConnection": {"qps": 50, "burst": 100},
    "integrations": {"frameworks": ["batch/job", "pod"]},
    "managedJobsNamespaceSelector": {
        "matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": _OWN_NAMESPACES}]
    },
}


def _folder() -> Path:
    return binaries.ensure("kueue")


def image() -> images.Image:
    """An image of one layer: the static binary."""
    reference = f"localhost/kueue:{binaries.version('kueue')}"
    return images.of_program(reference, _folder() / "kueue", "/manager")


def _values(configuration: dict[str, Any]) -> dict[str, Any]:
    repository, _, tag = image().reference.rpartition(":")
    manager = {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
    }
    return {
        "controllerManager": {"manager": manager, "readinessProbe": {"initialDelaySeconds": 1, "periodSeconds": 1}},
        "managerConfig": {"controllerManagerConfigYaml": yaml.safe_dump(configuration)},
    }


def install(cluster: LocalCluster | KindCluster) -> None:
    """Install it from its chart and wait until it is ready, its webhooks included: it makes their certificates itself."""
    cluster.load(image())
    with (
        step(f"installing Kueue {binaries.version('kueue')}"),
        helm.Config(kubeconfig_path=cluster.kubeconfig, namespace=NAMESPACE) as config,
    ):
        if RELEASE not in {release["name"] for release in config.list()}:
            chart, values = str(_folder() / "chart"), _values(_CONFIGURATION)
            config.install(chart, RELEASE, values, namespace=NAMESPACE, create_namespace=True, wait="legacy", timeout=300)
        wait_for("Kueue's webhooks", lambda: _takes(cluster), 120)


def uninstall(cluster: LocalCluster | KindCluster) -> None:
    """Remove it with its definitions, and so with everything that was defined by them."""
    # with its finalizers gone first: nobody takes them off once it is away, and its definitions would be waited for in vain
    cluster.kubectl(
        "delete", "workloads,localqueues,clusterqueues,resourceflavors", "--all", "--all-namespaces", "--timeout=60s", check=False
    )
    with helm.Config(kubeconfig_path=cluster.kubeconfig, namespace=NAMESPACE) as config, contextlib.suppress(helm.HelmError):
        config.uninstall(RELEASE, wait="legacy", timeout=20)  # what is slow to go hinders nobody


def _takes(cluster: LocalCluster | KindCluster) -> bool:
    probe = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "ResourceFlavor", "metadata": {"name": "probe"}}
    words = ("apply", "--dry-run=server", "-f", "-")
    return "created" in cluster.kubectl(*words, input=json.dumps(probe), check=False)


def start(cluster: LocalCluster) -> None:
    """Start it beside a bare control plane and wait until it answers. `LocalCluster.down` ends it."""
    state = cluster.state / "kueue"
    state.mkdir()
    authority = Authority(state / "pki")
    certificate, key = authority.issue("webhooks", "kueue", hosts=["127.0.0.1"])
    served = state / "etc" / "kueue" / "metrics" / "certs"  # where it looks for those of its metrics, whatever it is told
    served.mkdir(parents=True)
    (served / "tls.crt").write_bytes(certificate.read_bytes())
    (served / "tls.key").write_bytes(key.read_bytes())
    port, health = free_port(), free_port()
    configuration = {
        **_CONFIGURATION,
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"port": port, "host": "127.0.0.1", "certDir": str(served)},
        "internalCertManagement": {"enable": False},
        "featureGates": {"VisibilityOnDemand": False},
    }
    (state / "config.yaml").write_text(yaml.safe_dump(configuration))
    wanted = ("CustomResourceDefinition", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration")
    documents = [
        document
        for document in rendered(_values(configuration), _folder() / "chart", name=RELEASE, namespace=NAMESPACE)
        if document["kind"] in wanted
    ]
    trust = base64.b64encode(authority.path.read_bytes()).decode()
    for document in documents:
        _call_by_url(document, f"https://127.0.0.1:{port}", trust)
    (state / "crds.yaml").write_text(yaml.safe_dump_all(d for d in documents if d["kind"] == wanted[0]))
    (state / "webhooks.yaml").write_text(yaml.safe_dump_all(d for d in documents if d["kind"] != wanted[0]))
    with step(f"starting Kueue {binaries.version('kueue')} beside the control plane"):
        cluster.define(state / "crds.yaml")
        cluster.kubectl("create", "namespace", NAMESPACE)
        env = {"KUBECONFIG": str(cluster.kubeconfig), "POD_NAMESPACE": NAMESPACE}
        with_etc = f'mount -t overlay overlay -o lowerdir={state / "etc"}:/etc /etc && exec "$@"'
        manager: list[str | Path] = [_folder() / "kueue", f"--config={state / 'config.yaml'}", "--zap-log-level=2"]
        processes.start(cluster.name, "kueue", ["unshare", "--mount", "sh", "-c", with_etc, "sh", *manager], cluster.state / "logs", env)
        wait_for("Kueue", lambda: answers(f"http://127.0.0.1:{health}/readyz"), 60, cluster.state / "logs")
        cluster.kubectl("apply", "-f", str(state / "webhooks.yaml"))
        wait_for("Kueue's webhooks", lambda: _takes(cluster), 60, cluster.state / "logs")


def _call_by_url(document: Any, base: str, trust: str) -> None:
    """Let every clientConfig of a document name a URL in place of a Service."""
    if isinstance(document, list):
        for item in document:
            _call_by_url(item, base, trust)
    elif isinstance(document, dict):
        if "service" in (config := document.get("clientConfig") or {}):
            document["clientConfig"] = {"url": f"{base}{config['service'].get('path', '')}", "caBundle": trust}
        for value in document.values():
            _call_by_url(value, base, trust)


def flavor(name: str) -> dict[str, Any]:
    """A ResourceFlavor."""
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "ResourceFlavor", "metadata": {"name": name}}


def cluster_queue(name: str, flavor_name: str, quota: dict[str, int | str]) -> dict[str, Any]:
    """A ClusterQueue for all namespaces, in which a higher priority preempts a lower one."""
    resources = [{"name": resource, "nominalQuota": amount} for resource, amount in quota.items()]
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "ClusterQueue",
        "metadata": {"name": name},
        "spec": {
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [{"coveredResources": list(quota), "flavors": [{"name": flavor_name, "resources": resources}]}],
        },
    }


def local_queue(name: str, namespace: str, cluster_queue_name: str) -> dict[str, Any]:
    """A LocalQueue."""
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "LocalQueue", "metadata": metadata, "spec": {"clusterQueue": cluster_queue_name}}
