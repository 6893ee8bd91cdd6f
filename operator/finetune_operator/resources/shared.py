"""Objects that all stages of a job share: the ConfigMap with job.json, the workspace claim, and the NetworkPolicy. Knows nothing of which are there."""

from __future__ import annotations

from functools import lru_cache
from pathlib import PurePath

import msgspec

from finetune_api import names
from finetune_api.contract import Mounts
from finetune_api.spec import WorkspaceTemplate

from ..settings import Settings
from .common import JobRef, Manifest, job_file, metadata, with_hash


@lru_cache(maxsize=64)
def shared(job: JobRef, settings: Settings) -> tuple[Manifest, ...]:
    """All of them. For reading only: whoever has asked for their digests may ask for them next."""
    manifests = network_policy(job, settings), config_map(job, settings), workspace(job)
    return tuple(manifest for manifest in manifests if manifest is not None)


@lru_cache(maxsize=16384)
def digests(job: JobRef, settings: Settings) -> dict[tuple[str, str], str]:
    """What each of them is when it is as it should be, by (kind, name): asked at every pass over a job. For reading only."""
    return {
        (manifest["kind"], manifest["metadata"]["name"]): manifest["metadata"]["annotations"][names.ANNOTATION_HASH]
        for manifest in shared(job, settings)
    }


def config_map(job: JobRef, settings: Settings) -> Manifest:
    """job.json, the certificate authority of the progress endpoint, and those that an administrator trusts."""
    certificates = {"ca.crt": settings.ca_bundle, PurePath(Mounts.AUTHORITIES).name: settings.authorities}
    return with_hash(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(job, names.config_map_name(job.name)),
            "data": {
                "job.json": msgspec.json.format(job_file(job).dumps(), indent=1),
                **{name: text for name, text in certificates.items() if text},
            },
        }
    )


def workspace(job: JobRef) -> Manifest | None:
    """The claim that the operator makes, or None when the job brings its own."""
    if job.spec.workspace.persistent_volume_claim is not None:
        return None
    template = job.spec.workspace.template or WorkspaceTemplate()
    return with_hash(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": metadata(job, names.workspace_name(job.name)),
            "spec": {
                "accessModes": [template.access_mode],
                "resources": {"requests": {"storage": template.storage}},
                **({"storageClassName": template.storage_class_name} if template.storage_class_name else {}),
            },
        }
    )


_METADATA = ("169.254.0.0/16", "fd00:ec2::254/128")
"""Link-local addresses, where clouds hand out the node's credentials."""


def network_policy(job: JobRef, settings: Settings) -> Manifest | None:
    """The pods of a job are reached by each other alone, and reach everything but the cloud's metadata. None where none is wanted."""
    if not settings.network_policies:
        return None
    return isolation(metadata(job, names.service_name(job.name)), {names.LABEL_JOB_UID: job.uid})


def outside() -> list[Manifest]:
    """Egress rules: everything but the cloud's metadata."""
    everywhere = [{"ipBlock": {"cidr": cidr, "except": [bad]}} for cidr, bad in zip(("0.0.0.0/0", "::/0"), _METADATA, strict=True)]
    dns = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]  # a node's own cache has a link-local address, too
    return [{"to": everywhere}, {"ports": dns}]


def isolation(meta: Manifest, labels: dict[str, str]) -> Manifest:
    """The NetworkPolicy of the pods with these labels."""
    own = {"matchLabels": labels}
    everywhere, dns = outside()
    return with_hash(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": meta,
            "spec": {
                "podSelector": own,
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": [{"podSelector": own}]}],
                "egress": [everywhere, {"to": [{"podSelector": own}]}, dns],
            },
        }
    )
