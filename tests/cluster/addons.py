"""What a bare Kubernetes lacks: cluster DNS, and a provisioner of shared volumes.

Run as a process of its own: `python -m tests.cluster.addons KUBECONFIG ADDRESS VOLUMES`. Everything it knows it
reads from the API server twice a second; the cluster is small.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from dnslib import QTYPE, RCODE, RR, A
from dnslib.server import BaseResolver, DNSServer
from kubernetes import client, config

log = logging.getLogger("addons")
STORAGE_CLASS = "local-shared"
DOMAIN = "cluster.local"
Records = dict[str, list[str]]


class Resolver(BaseResolver):  # type: ignore[misc]
    """Answers for Services and for the host names behind headless ones."""

    def __init__(self) -> None:
        self.records: Records = {}

    def resolve(self, request: Any, handler: Any) -> Any:
        reply = request.reply()
        name = str(request.q.qname).rstrip(".").lower()
        addresses = self.records.get(name)
        if addresses is None:
            reply.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype in (QTYPE.A, QTYPE.ANY):
            for address in addresses:
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=1))
        return reply


def records(core: client.CoreV1Api) -> Records:
    """Names of all Services and of the pods behind headless ones."""
    found: Records = {}
    headless = set()
    for service in core.list_service_for_all_namespaces().items:
        name = f"{service.metadata.name}.{service.metadata.namespace}.svc.{DOMAIN}"
        if service.spec.cluster_ip in (None, "None", ""):
            headless.add((service.metadata.namespace, service.metadata.name))
        else:
            found[name] = [service.spec.cluster_ip]
    for endpoints in core.list_endpoints_for_all_namespaces().items:
        key = (endpoints.metadata.namespace, endpoints.metadata.name)
        if key not in headless:
            continue
        name = f"{key[1]}.{key[0]}.svc.{DOMAIN}"
        for subset in endpoints.subsets or []:
            for address in [*(subset.addresses or []), *(subset.not_ready_addresses or [])]:
                found.setdefault(name, []).append(address.ip)
                if address.hostname:
                    found.setdefault(f"{address.hostname}.{name}", []).append(address.ip)
    return found


def provision(core: client.CoreV1Api, volumes: Path) -> None:
    """A folder of the host, writable by all, for each claim that waits; gone again with the claim."""
    for claim in core.list_persistent_volume_claim_for_all_namespaces().items:
        if claim.status.phase != "Pending" or claim.spec.storage_class_name != STORAGE_CLASS or claim.spec.volume_name:
            continue
        name = f"pvc-{claim.metadata.uid}"
        folder = volumes / name
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        body = {
            "metadata": {"name": name},
            "spec": {
                "capacity": claim.spec.resources.requests,
                "accessModes": claim.spec.access_modes,
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": STORAGE_CLASS,
                "hostPath": {"path": str(folder)},
                "claimRef": {
                    "apiVersion": "v1",
                    "kind": "PersistentVolumeClaim",
                    "namespace": claim.metadata.namespace,
                    "name": claim.metadata.name,
                    "uid": claim.metadata.uid,
                },
            },
        }
        try:
            core.create_persistent_volume(body)
        except client.ApiException as failure:
            if failure.status != 409:
                raise
    for volume in core.list_persistent_volume().items:
        if volume.status.phase == "Released" and volume.spec.storage_class_name == STORAGE_CLASS:
            shutil.rmtree(volume.spec.host_path.path, ignore_errors=True)
            core.delete_persistent_volume(volume.metadata.name)


def main() -> None:
    """Serve until killed."""
    logging.basicConfig(level=logging.INFO)
    kubeconfig, address, volumes = sys.argv[1:4]
    config.load_kube_config(kubeconfig)
    core = client.CoreV1Api()
    resolver = Resolver()
    DNSServer(resolver, address=address, port=53).start_thread()
    DNSServer(resolver, address=address, port=53, tcp=True).start_thread()
    while True:
        try:
            resolver.records = records(core)
            provision(core, Path(volumes))
        except Exception as failure:  # the API server may be restarting: go on with what is known
            log.warning("%s", failure)
        time.sleep(0.5)


if __name__ == "__main__":
    main()
