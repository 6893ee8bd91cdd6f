"""A gang in the terms of another scheduler of the cluster, which then decides when it may start (chart value queueing.backend).

Kueue takes groups of plain pods (https://kueue.sigs.k8s.io/docs/tasks/run/plain_pods/), Volcano a PodGroup
(https://volcano.sh/en/docs/podgroup/). Every attempt is a group of its own: a gang restarts as a whole.
Knows nothing of what that one answers.
"""

from __future__ import annotations

import math
from typing import Any

from finetune_api import names
from finetune_api.scalars import quantity
from finetune_api.spec import FineTuneJobSpec

from ..model.children import QUEUE_LABEL
from ..settings import Settings
from .common import JobRef, Manifest

GROUP_KINDS = {"kueue": ("Workload", "Workload/v1beta1"), "volcano": ("PodGroup",)}
"""Kinds in which a back-end says where a gang stands; the first that is there counts."""
_KUEUE = "kueue.x-k8s.io"
_VOLCANO = "scheduling.volcano.sh"
GROUP_LABEL = f"{_KUEUE}/pod-group-name"
JOB_UID_LABEL = f"{_KUEUE}/job-uid"
"""On the Workload that Kueue makes or takes for a Job"""
_GROUP_NAME = "scheduling.k8s.io/group-name"


def local_queue(spec: FineTuneJobSpec) -> str:
    """The back-end's queue: a LocalQueue of the namespace in Kueue, a Queue in Volcano."""
    return spec.scheduling.queue or "default"


def hand_over(pod: Manifest, job: JobRef, settings: Settings, attempt: int) -> None:
    """Make a worker pod a member of its gang's group, which starts whole."""
    meta, spec = pod["metadata"], pod["spec"]
    group = names.group_name(job.name, attempt)
    if settings.queueing_backend == "kueue":
        meta["labels"].update({QUEUE_LABEL: local_queue(job.spec), GROUP_LABEL: group})
        told = {
            f"{_KUEUE}/pod-group-total-count": str(job.spec.distribution.nodes),
            f"{_KUEUE}/pod-group-pod-index-label": names.LABEL_RANK,
            f"{_KUEUE}/retriable-in-group": "false",  # the operator starts another group instead
        }
        if job.spec.scheduling.topology_key is not None:
            told[f"{_KUEUE}/podset-required-topology"] = job.spec.scheduling.topology_key
        meta["annotations"] = {**meta.get("annotations", {}), **told}
        # Kueue's webhook sets it as well; where it does not look, nothing starts past the quota
        spec["schedulingGates"] = [{"name": f"{_KUEUE}/admission"}]
    elif settings.queueing_backend == "volcano":
        told = {_GROUP_NAME: group, f"{_VOLCANO}/queue-name": local_queue(job.spec)}
        meta["annotations"] = {**meta.get("annotations", {}), **told}
        spec["schedulerName"] = "volcano"


def hand_over_stage(manifest: Manifest, job: JobRef, settings: Settings) -> None:
    """Let the Job of a stage that asks for GPUs wait in the same queue."""
    if settings.queueing_backend == "kueue":
        manifest["metadata"]["labels"][QUEUE_LABEL] = local_queue(job.spec)
        manifest["spec"]["suspend"] = True
    elif settings.queueing_backend == "volcano":
        template = manifest["spec"]["template"]
        template["metadata"]["annotations"] = {f"{_VOLCANO}/queue-name": local_queue(job.spec)}
        template["spec"]["schedulerName"] = "volcano"


def pod_sets(manifest: Manifest) -> list[Manifest]:
    """What Kueue makes of a Job: it takes a Workload for its own only when the containers are the same."""
    return [{"name": "main", "count": 1, "template": manifest["spec"]["template"]}]


def kept_place(job: JobRef, manifest: Manifest, priority: int, served: str) -> Manifest:
    """Kueue's Workload of a stage that is still to come: inactive, it holds nothing but its place in line.

    It goes with the FineTuneJob. Kueue makes the stage's Job its controller when that names it (`take_place`).
    """
    meta = manifest["metadata"]
    owner = {key: value for key, value in meta["ownerReferences"][0].items() if key not in ("controller", "blockOwnerDeletion")}
    return {
        "apiVersion": f"{_KUEUE}/{served.partition('/')[2] or 'v1beta2'}",
        "kind": "Workload",
        "metadata": {**meta, "ownerReferences": [owner]},
        "spec": {"active": False, "queueName": local_queue(job.spec), "priority": priority, "podSets": pod_sets(manifest)},
    }


def take_place(manifest: Manifest, place: str) -> None:
    """Let a stage's Job be admitted by a Workload that is there already."""
    manifest["metadata"]["labels"][f"{_KUEUE}/prebuilt-workload-name"] = place


def pod_group(job: JobRef, attempt: int, nodes: int, first: tuple[str, str], worker: Manifest) -> Manifest:
    """Volcano's PodGroup of one attempt. It goes with the pod of rank 0 (name and UID): one without pods would reserve a place."""
    name, uid = first
    requests: dict[str, Any] = worker["spec"]["containers"][0]["resources"].get("requests", {})
    least = {resource: _times(amount, nodes) for resource, amount in requests.items()}
    priority = job.spec.scheduling.priority_class_name
    return {
        "apiVersion": f"{_VOLCANO}/v1beta1",
        "kind": "PodGroup",
        "metadata": {
            "name": names.group_name(job.name, attempt),
            "namespace": job.namespace,
            "labels": {k: worker["metadata"]["labels"][k] for k in (names.LABEL_MANAGED_BY, names.LABEL_JOB, names.LABEL_JOB_UID)},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid, "controller": True}],
        },
        "spec": {
            "minMember": nodes,
            "queue": local_queue(job.spec),
            **({"minResources": least} if least else {}),
            **({"priorityClassName": priority} if priority else {}),
        },
    }


def _times(amount: str, nodes: int) -> str:
    total = quantity(amount) * nodes
    return str(int(total)) if total == int(total) else f"{math.ceil(total * 1000)}m"
