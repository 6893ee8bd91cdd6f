"""The gang: worker pods with stable names behind a headless Service. Knows nothing of which are there already."""

from __future__ import annotations

import json

from finetune_api import names
from finetune_api.contract import Env
from finetune_api.scalars import quantity
from finetune_api.spec import ComputeResources
from finetune_api.status import AdmissionStatus, Plan

from ..model.seal import seal
from ..settings import Settings
from .backends import hand_over
from .common import JobRef, Manifest, metadata, pod_spec, with_hash

MAIN_PORT = 29500


def service(job: JobRef) -> Manifest:
    """Gives every worker a DNS name, also before it is ready: rank 0 is looked for while it starts."""
    return with_hash(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(job, names.service_name(job.name)),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {names.LABEL_JOB_UID: job.uid, names.LABEL_STAGE: "train"},
                "ports": [{"name": "rendezvous", "port": MAIN_PORT, "protocol": "TCP", "targetPort": MAIN_PORT}],
            },
        }
    )


def worker(
    job: JobRef,
    settings: Settings,
    plan: Plan,
    rank: int,
    attempt: int,
    avoid: tuple[str, ...] = (),
    admission: AdmissionStatus | None = None,
) -> Manifest:
    """The pod of one node rank in one attempt, where it was admitted to, rather not on the nodes to avoid."""
    name = names.worker_name(job.name, rank)
    subdomain = names.service_name(job.name)
    spec = pod_spec(
        job,
        settings,
        "train",
        resources=_resources(job),
        env={
            Env.RANK: str(rank),
            Env.ATTEMPT: str(attempt),
            Env.PLAN: json.dumps(plan.to_wire(), sort_keys=True),
            Env.MAIN_ADDRESS: f"{names.worker_name(job.name, 0)}.{subdomain}.{job.namespace}.svc",
            Env.MAIN_PORT: str(MAIN_PORT),
            Env.GRACE: str(settings.termination_grace_seconds),
            **({Env.PROGRESS_URL: settings.endpoint} if settings.endpoint else {}),
            **_threads(job),
        },
        shared_memory=job.spec.resources.shared_memory,
    )
    spec.update(hostname=name, subdomain=subdomain, terminationGracePeriodSeconds=settings.termination_grace_seconds)
    if terms := _rather(rank, attempt, avoid, admission):  # preferred, not required: the scheduler knows volumes and zones, too
        spec["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": terms}}
    put_on(spec, admission)
    if admission is not None and admission.topology is not None:
        spec["nodeSelector"] = {**spec.get("nodeSelector", {}), admission.topology.key: admission.topology.value}
    spec["tolerations"] = [*spec.get("tolerations", []), *_while_unreachable(job, settings)]
    labels = {names.LABEL_STAGE: "train", names.LABEL_RANK: str(rank), names.LABEL_ATTEMPT: str(attempt)}
    meta = metadata(job, name, **labels)
    if admission is not None:
        kept = admission.model_copy(update={"planned_nodes": []})  # of a large gang they would be on each pod, of all pods
        text = json.dumps(kept.to_wire(), sort_keys=True)
        meta["annotations"] = {names.ANNOTATION_ADMISSION: text, names.ANNOTATION_SEAL: seal(settings.seal_key, job.uid, text)}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
    hand_over(pod, job, settings, attempt)
    return pod


def _rather(rank: int, attempt: int, avoid: tuple[str, ...], admission: AdmissionStatus | None) -> list[Manifest]:
    """The node that was planned for this pod, and none that jobs kept failing on. A field may be compared with one value at a time."""

    def term(operator: str, nodes: tuple[str, ...]) -> Manifest:
        fields = [{"key": "metadata.name", "operator": operator, "values": [node]} for node in nodes]
        return {"weight": 100, "preference": {"matchFields": fields}}

    terms = [term("NotIn", avoid)] if avoid else []
    if admission is not None and admission.attempt == attempt and rank < len(admission.planned_nodes):
        terms.append(term("In", (admission.planned_nodes[rank],)))
    return terms


def put_on(spec: Manifest, admission: AdmissionStatus | None) -> None:
    """Let a pod onto the nodes of the flavor that it was admitted to, and onto no others."""
    if admission is None:
        return
    if admission.node_labels:
        spec["nodeSelector"] = {**spec.get("nodeSelector", {}), **admission.node_labels}
    own = spec.get("tolerations", [])
    more = [t for t in ({k: v for k, v in t.to_wire().items() if v} for t in admission.tolerations) if t not in own]
    if more:
        spec["tolerations"] = [*own, *more]


def _while_unreachable(job: JobRef, settings: Settings) -> list[Manifest]:
    """How long a node may be away; the default of 5 minutes would leave the rest of the gang waiting for it."""
    taints = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    own = {t.key for t in job.spec.scheduling.tolerations}
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": settings.node_lost_seconds}
        for key in taints
        if key not in own
    ]


def _threads(job: JobRef) -> dict[str, str]:
    """Threads per process from the pod's CPUs: torch would otherwise start one per core of the node, in every pod."""
    wanted = job.spec.resources.limits.cpu or job.spec.resources.requests.cpu
    if wanted is None:
        return {}
    share = quantity(wanted) / max(1, job.spec.distribution.gpus_per_node)
    return {"OMP_NUM_THREADS": str(max(1, int(share)))}


def gpus(job: JobRef, count: int) -> dict[str, str]:
    """The extended resource for so many GPUs; empty for none."""
    return {job.spec.resources.gpu_resource_name: str(count)} if count else {}


def _resources(job: JobRef) -> Manifest:
    def amounts(of: ComputeResources) -> dict[str, str]:
        return {key: value for key, value in (("cpu", of.cpu), ("memory", of.memory)) if value is not None}

    extended = gpus(job, job.spec.distribution.gpus_per_node)
    requests = {**amounts(job.spec.resources.requests), **extended}
    limits = {**amounts(job.spec.resources.limits), **extended}
    return {**({"requests": requests} if requests else {}), **({"limits": limits} if limits else {})}
