"""What a FineTuneEndpoint consists of in the cluster: replicas behind a Service, and what keeps them up and apart; or the agent of
replicas that somebody else runs. Pure.

A Deployment: replicas are asked by their pods' addresses, so they need no names of their own; a new template brings a new pod up before an
old one goes, so that capacity is not lost; and none has anything of its own to keep. Knows nothing of where the endpoint stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import msgspec

from finetune_api import names
from finetune_api.contract import S3_KEYS, Env, Mounts
from finetune_api.endpoint import ENDPOINT_KIND, EndpointAdmission, FineTuneEndpointSpec
from finetune_api.serving import AGENT_PORT, USER_PORT, OrderedModel, ReplicaFile, ReplicaPaths
from finetune_api.spec import ComputeResources
from finetune_api.uris import parse_uri

from ..model.children import QUEUE_LABEL
from ..model.endpoint import ModelLine
from ..settings import Settings
from .common import Manifest, Owner, container_security, files_of, net, owned, pod_security, secret_volume, with_hash
from .proxy import proxy_config
from .replica import agent, engine, fetch, proxy
from .shared import outside

_FILE, _PROXY, _AUTHORITIES = (PurePath(path).name for path in (ReplicaPaths.FILE, ReplicaPaths.PROXY, Mounts.AUTHORITIES))
_DRAIN_SECONDS = 15
"""Between a pod's leaving its Service and the end of its containers: streams go on meanwhile."""


@dataclass(frozen=True)
class EndpointRef:
    """The identity of an endpoint and its parsed spec."""

    name: str
    namespace: str
    uid: str
    spec: FineTuneEndpointSpec = dataclasses.field(hash=False)
    replicas: int | None = None
    """That may run; None: all that the spec asks for."""
    admission: EndpointAdmission | None = dataclasses.field(default=None, hash=False)
    """Which nodes of its FineTuneQueue they are for."""
    whole: OrderedModel | None = dataclasses.field(default=None, hash=False)
    """The whole model that is its base."""


def selector(endpoint: EndpointRef) -> dict[str, str]:
    """Labels of its pods."""
    return {names.LABEL_ENDPOINT: names.job_label(endpoint.name), names.LABEL_OWNER_UID: endpoint.uid}


def metadata(endpoint: EndpointRef, name: str) -> Manifest:
    """Object metadata with the endpoint's labels and a controlling owner reference."""
    owner = Owner(ENDPOINT_KIND, endpoint.name, endpoint.namespace, endpoint.uid)
    return owned(owner, name, **{names.LABEL_ENDPOINT: names.job_label(endpoint.name)})


def manifests(endpoint: EndpointRef, lines: Sequence[ModelLine], settings: Settings, identity: str) -> list[Manifest]:
    """All of them, with their digests. `lines`: the models that it serves, its base's too. `identity`: the Secret with the replicas' certificate."""
    made = [config_map(endpoint, lines, settings)]
    if endpoint.spec.external is None:  # else its one pod is the agent of what somebody else runs
        made += [service(endpoint), disruption_budget(endpoint)]
    if settings.network_policies:
        made.append(network_policy(endpoint, settings))
    # last: its pods mount the rest
    return [with_hash(manifest) for manifest in (*made, deployment(endpoint, lines, settings, identity))]


def claims(endpoint: EndpointRef, lines: Sequence[ModelLine]) -> list[str]:
    """Claims that the base and the models lie in, as `pvc://name`, in a stable order."""
    parsed = [parse_uri(uri) for uri in (endpoint.spec.base.uri, *(line.spec.storage for line in lines))]
    return sorted({f"pvc://{uri.name}" for uri in parsed if uri.scheme == "pvc"})


def secrets(endpoint: EndpointRef, lines: Sequence[ModelLine]) -> dict[str, tuple[str, dict[str, str]]]:
    """Secrets that the agent needs: field -> (Secret name, its keys and the files they become)."""
    base, found = endpoint.spec.base, dict[str, tuple[str, dict[str, str]]]()
    if base.secret_ref is not None:
        found["model"] = (base.secret_ref.name, files_of(base.secret_ref, base.uri))
    for line in lines:
        if line.spec.secret_ref is not None:
            found[f"model-{line.name}"] = (line.spec.secret_ref.name, {key: key for key in S3_KEYS})
    return found


def folder(claim: str) -> str:
    """Where a claim is mounted."""
    return f"{Mounts.SOURCES}/{claim.replace('://', '/')}"


def config_map(endpoint: EndpointRef, lines: Sequence[ModelLine], settings: Settings) -> Manifest:
    """replica.json, the proxy's settings, and the authorities that an administrator trusts."""
    file = ReplicaFile(
        name=endpoint.name,
        namespace=endpoint.namespace,
        uid=endpoint.uid,
        base=endpoint.spec.base,
        max_lora_rank=endpoint.spec.max_lora_rank,
        sources={claim: folder(claim) for claim in claims(endpoint, lines)},
        secrets={field: f"{Mounts.SECRETS}/{field}" for field in secrets(endpoint, lines)},
    )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(endpoint, names.endpoint_name(endpoint.name)),
        "data": {
            _FILE: msgspec.json.format(file.dumps(), indent=1),
            _PROXY: proxy_config(users=endpoint.spec.external is None),
            **({_AUTHORITIES: settings.authorities} if settings.authorities else {}),
        },
    }


def service(endpoint: EndpointRef) -> Manifest:
    """What users of the namespace ask, where they do not come by the gateway."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(endpoint, names.endpoint_name(endpoint.name)),
        "spec": {
            "selector": selector(endpoint),
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": USER_PORT, "appProtocol": "http"}],
        },
    }


def disruption_budget(endpoint: EndpointRef) -> Manifest:
    """Nodes are drained of one replica at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(endpoint, names.endpoint_name(endpoint.name)),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector(endpoint)}, "unhealthyPodEvictionPolicy": "AlwaysAllow"},
    }


def network_policy(endpoint: EndpointRef, settings: Settings) -> Manifest:
    """Users' port from the namespace and the gateway, the agent's from the operator alone; out to all but the cloud's metadata.

    The agent of external replicas has no users' port.
    """

    def peer(labels: tuple[str, ...]) -> Manifest:
        pods = dict(label.split("=", 1) for label in labels)
        home = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.namespace}}}
        return {**home, **({"podSelector": {"matchLabels": pods}} if pods else {})}

    users = {"from": [{"podSelector": {}}, peer(settings.gateway_labels)], "ports": [{"port": USER_PORT, "protocol": "TCP"}]}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(endpoint, names.endpoint_name(endpoint.name)),
        "spec": {
            "podSelector": {"matchLabels": selector(endpoint)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                *([users] if endpoint.spec.external is None else []),
                {"from": [peer(settings.operator_labels)], "ports": [{"port": AGENT_PORT, "protocol": "TCP"}]},
            ],
            "egress": outside(),
        },
    }


def deployment(endpoint: EndpointRef, lines: Sequence[ModelLine], settings: Settings, identity: str) -> Manifest:
    """The replicas, or the one agent of those that somebody else runs: two of them would load everything twice."""
    spec = endpoint.spec
    rolls = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    meta = metadata(endpoint, names.endpoint_name(endpoint.name))
    # its files are read when a container starts: another base, rank or way to the agent is another template
    files = with_hash(config_map(endpoint, lines, settings))["metadata"]["annotations"]
    version = {names.ANNOTATION_VERSION: endpoint.whole.name} if endpoint.whole is not None else {}
    template = {
        "metadata": {"labels": dict(meta["labels"]), "annotations": {**files, **version}},
        "spec": _pod(endpoint, lines, settings, identity),
    }
    _hand_over(meta, template, spec, settings)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": 1 if spec.external is not None else spec.replicas if endpoint.replicas is None else endpoint.replicas,
            "selector": {"matchLabels": selector(endpoint)},
            "strategy": rolls if spec.external is None else {"type": "Recreate"},
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": 3600,  # large bases take their time
            "template": template,
        },
    }


def served_names(endpoint: EndpointRef) -> list[str]:
    """Of the engine's base: those of the version that it is, and the endpoint's. Answers bear the first one."""
    version = [endpoint.whole.name, *endpoint.whole.aliases] if endpoint.whole is not None else []
    return list(dict.fromkeys([*version, endpoint.name]))


def _pod(endpoint: EndpointRef, lines: Sequence[ModelLine], settings: Settings, identity: str) -> Manifest:
    spec, name = endpoint.spec, names.endpoint_name(endpoint.name)
    sources, keys = _sources(endpoint, lines), _keys(endpoint, lines)

    def files(volume: str, *keys: str) -> Manifest:
        return {"name": volume, "configMap": {"name": name, "items": [{"key": key, "path": key} for key in keys]}}

    def at(volume: str, path: str, *, read_only: bool = True) -> Manifest:
        return {"name": volume, "mountPath": path, **({"readOnly": True} if read_only else {})}

    tmp, data = at("tmp", "/tmp", read_only=False), [at(volume["name"], path) for volume, path in sources]
    own = [tmp, at("models", ReplicaPaths.MODELS, read_only=False), at("settings", Mounts.JOB), *data]
    own += [at(volume["name"], path) for volume, path in keys]
    reads = [tmp, at("shared-memory", "/dev/shm", read_only=False), at("models", ReplicaPaths.MODELS), *data]
    stands = [tmp, at("proxy", ReplicaPaths.PROXY.rpartition("/")[0]), at("tls", ReplicaPaths.TLS)]
    hosts = {Env.ALLOWED_HOSTS: ",".join(settings.allowed_hosts)} if settings.allowed_hosts else {}
    env = {"HOME": "/tmp", **net(settings), **hosts}
    whole = endpoint.whole
    serves = [engine(served_names(endpoint), spec, settings, _resources(spec), reads), agent(settings, env, own), proxy(settings, stands)]
    asks = [agent(settings, env, own, external=True), proxy(settings, stands, users=False)]
    shared_memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": spec.resources.shared_memory}}
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.termination_grace_seconds + _DRAIN_SECONDS,
        "securityContext": pod_security(settings),
        "initContainers": [fetch(settings, env, own, whole)],
        "containers": asks if spec.external is not None else [_drained(container) for container in serves],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "models", "emptyDir": {}},
            *([shared_memory] if spec.external is None else []),
            files("settings", _FILE, *([_AUTHORITIES] if settings.authorities else [])),
            files("proxy", _PROXY),
            {"name": "tls", "secret": {"secretName": identity, "defaultMode": 0o440}},
            *(volume for volume, _ in (*sources, *keys)),
        ],
        "topologySpreadConstraints": [_spread(endpoint, key) for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")],
    }
    for container in (*pod["initContainers"], *pod["containers"]):
        container["securityContext"] = container_security()
        container["terminationMessagePolicy"] = "FallbackToLogsOnError"
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in settings.image_pull_secrets]
    _place(pod, spec, endpoint.admission)
    return pod


def _sources(endpoint: EndpointRef, lines: Sequence[ModelLine]) -> list[tuple[Manifest, str]]:
    """A volume for each claim, and where it is mounted."""
    found = []
    for index, claim in enumerate(claims(endpoint, lines)):
        volume = {"persistentVolumeClaim": {"claimName": claim.split("://")[1], "readOnly": True}}
        found.append(({"name": f"source-{index}", **volume}, folder(claim)))
    return found


def _keys(endpoint: EndpointRef, lines: Sequence[ModelLine]) -> list[tuple[Manifest, str]]:
    """The same of each Secret."""
    found = []
    for index, (field, (secret, files)) in enumerate(secrets(endpoint, lines).items()):
        found.append(({"name": f"secret-{index}", **secret_volume(secret, files)}, f"{Mounts.SECRETS}/{field}"))
    return found


def _spread(endpoint: EndpointRef, key: str) -> Manifest:
    chosen = {"labelSelector": {"matchLabels": selector(endpoint)}, "matchLabelKeys": ["pod-template-hash"]}
    return {"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "ScheduleAnyway", **chosen}


def _drained(container: Manifest) -> Manifest:
    return {**container, "lifecycle": {"preStop": {"sleep": {"seconds": _DRAIN_SECONDS}}}}


def _place(pod: Manifest, spec: FineTuneEndpointSpec, admission: EndpointAdmission | None) -> None:
    scheduling = spec.scheduling
    if selector := {**scheduling.node_selector, **(admission.node_labels if admission is not None else {})}:
        pod["nodeSelector"] = selector
    if tolerations := [*scheduling.tolerations, *(admission.tolerations if admission is not None else [])]:
        found = [{k: v for k, v in t.to_wire().items() if v} for t in tolerations]
        pod["tolerations"] = [toleration for n, toleration in enumerate(found) if toleration not in found[:n]]
    if scheduling.priority_class_name:
        pod["priorityClassName"] = scheduling.priority_class_name


def _hand_over(meta: Manifest, template: Manifest, spec: FineTuneEndpointSpec, settings: Settings) -> None:
    """Another scheduler's terms: Kueue counts a Deployment's pods towards the queue of its label, Volcano the pods it schedules."""
    if settings.queueing_backend == "kueue" and spec.scheduling.queue:
        meta["labels"] = {**meta["labels"], QUEUE_LABEL: spec.scheduling.queue}
    elif settings.queueing_backend == "volcano":
        template["spec"]["schedulerName"] = "volcano"
        if spec.scheduling.queue:
            template["metadata"]["annotations"]["scheduling.volcano.sh/queue-name"] = spec.scheduling.queue


def _resources(spec: FineTuneEndpointSpec) -> Manifest:
    """Of the engine: the others need next to nothing."""

    def amounts(of: ComputeResources) -> dict[str, str]:
        return {key: value for key, value in (("cpu", of.cpu), ("memory", of.memory)) if value is not None}

    gpus = {spec.resources.gpu_resource_name: str(spec.gpus_per_replica)} if spec.gpus_per_replica else {}
    found = {"requests": {**amounts(spec.resources.requests), **gpus}, "limits": {**amounts(spec.resources.limits), **gpus}}
    return {name: values for name, values in found.items() if values}
