"""What all manifests share: metadata, and a pod that satisfies the `restricted` Pod Security Standard.

Knows nothing of where a job stands.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from finetune_api import API_VERSION, KIND, names
from finetune_api.contract import DOCKER_CONFIG, S3_KEYS, Env, JobFile, ModelStorage, Mounts, Stage, progress_audience
from finetune_api.spec import FineTuneJobSpec, RunPolicy, SecretReference
from finetune_api.status import ModelInUse
from finetune_api.uris import parse_uri

from ..settings import Settings

Manifest = dict[str, Any]


@dataclass(frozen=True)
class JobRef:
    """The identity of a job and its parsed spec."""

    name: str
    namespace: str
    uid: str
    spec: FineTuneJobSpec = dataclasses.field(hash=False)
    models: tuple[ModelInUse, ...] = dataclasses.field(default=(), hash=False)
    """FineTunedModels that the spec refers to."""


@dataclass(frozen=True)
class Owner:
    """An object of another kind of ours that owns what is made for it."""

    kind: str
    name: str
    namespace: str
    uid: str


def metadata(job: JobRef, name: str, **labels: str) -> Manifest:
    """Object metadata with the job's labels and a controlling owner reference."""
    labels = {names.LABEL_JOB: names.job_label(job.name), names.LABEL_JOB_UID: job.uid, **labels}
    return _metadata(Owner(KIND, job.name, job.namespace, job.uid), name, labels)


def owned(owner: Owner, name: str, **labels: str) -> Manifest:
    """The same of what another kind owns."""
    return _metadata(owner, name, {names.LABEL_OWNER_UID: owner.uid, **labels})


def _metadata(owner: Owner, name: str, labels: dict[str, str]) -> Manifest:
    return {
        "name": name,
        "namespace": owner.namespace,
        "labels": {names.LABEL_MANAGED_BY: names.MANAGER, **labels},
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": owner.kind,
                "name": owner.name,
                "uid": owner.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def with_hash(manifest: Manifest) -> Manifest:
    """Note a digest of the manifest in an annotation: what is applied already is not applied again."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    manifest["metadata"]["annotations"] = {**manifest["metadata"].get("annotations", {}), names.ANNOTATION_HASH: digest}
    return manifest


def sources(spec: FineTuneJobSpec, models: Iterable[ModelInUse] = (), stage: Stage | None = None) -> list[str]:
    """Claims and ConfigMaps that stages (or one of them) read from, as `scheme://name`, in a stable order."""
    parsed = [parse_uri(uri) for uri in spec.source_uris]
    found = {f"{uri.scheme}://{uri.name}" for uri in parsed if uri.scheme in ("pvc", "configmap")}
    for model in models:
        # a version that training goes on from stays where it is, as any adapter on a claim; publish writes to its targets
        reads = stage is None or model.version is not None or (stage == "evaluate" and stage in _stages_of(spec, model))
        if reads and (claim := _claim(model)) is not None:
            found.add(claim)
    return sorted(found)


def targets(spec: FineTuneJobSpec, models: Iterable[ModelInUse] = ()) -> list[str]:
    """Claims that results are published to, as `pvc://name`, in a stable order."""
    found = {f"pvc://{uri.name}" for uri in map(parse_uri, (t.address for t in spec.publish)) if uri.scheme == "pvc"}
    return sorted(found | {claim for model in models if "publish" in _stages_of(spec, model) and (claim := _claim(model)) is not None})


def secrets(spec: FineTuneJobSpec, stage: Stage, models: Iterable[ModelInUse] = ()) -> dict[str, tuple[str, dict[str, str]]]:
    """Secrets that a stage needs: field -> (Secret name, its keys and the files they become)."""
    found: dict[str, tuple[str, dict[str, str]]] = {}

    def need(field: str, reference: SecretReference | None, uri: str = "") -> None:
        if reference is not None:
            found[field] = (reference.name, files_of(reference, uri))

    if stage == "prepare":
        distillation = spec.tuning.distillation
        need("model", spec.model.secret_ref, spec.model.uri)
        need("adapter", spec.tuning.continue_from_secret_ref, spec.tuning.continue_from or "")
        if distillation is not None:
            if distillation.teacher is not None:
                need("teacher", distillation.teacher.secret_ref, distillation.teacher.uri)
            need("endpoint", distillation.endpoint.secret_ref if distillation.endpoint is not None else None)
        for field, source in spec.dataset.sources.items():
            need(field, source.secret_ref, source.uri)
    if stage == "train":
        tracking = spec.tuning.tracking
        need("mlflow", tracking.mlflow.secret_ref if tracking.mlflow is not None else None)
        need("wandb", tracking.wandb.secret_ref if tracking.wandb is not None else None)
    if stage == "evaluate" and spec.evaluation is not None and spec.evaluation.judge is not None:
        need("judge", spec.evaluation.judge.secret_ref)
    if stage in ("check", "publish"):
        for index, target in enumerate(spec.publish):
            need(f"publish-{index}", target.secret_ref, target.address)
    for model in models:
        if model.secret and stage in _stages_of(spec, model):
            found[f"model-{model.name}"] = model.secret, {key: key for key in S3_KEYS}
    return found


def _stages_of(spec: FineTuneJobSpec, model: ModelInUse) -> set[Stage]:
    """Stages that reach a FineTunedModel's storage: its version is fetched once, its champion is asked beside the result."""
    stages: set[Stage] = {"prepare"} if model.version is not None else set()
    if any(target.model == model.name for target in spec.publish):
        stages |= {"check", "evaluate", "publish"}
    return stages


def _claim(model: ModelInUse) -> str | None:
    """The claim of its storage, as `pvc://name`."""
    uri = parse_uri(model.storage)
    return f"pvc://{uri.name}" if uri.scheme == "pvc" else None


def files_of(reference: SecretReference, uri: str) -> dict[str, str]:
    """Keys of a Secret, and the files that they become: by what the uri's scheme takes."""
    if uri.startswith("s3://"):
        return {key: key for key in S3_KEYS}
    return {DOCKER_CONFIG: DOCKER_CONFIG} if uri.startswith("oci://") else {reference.key: "token"}


def _folder(root: str, reference: str) -> str:
    scheme, name = reference.split("://")
    return f"{root}/{scheme}/{name}"


def job_file(job: JobRef) -> JobFile:
    """job.json: the spec with where this cluster mounts what it refers to."""
    spec = job.spec.model_copy(
        update={"run_policy": RunPolicy(hang_timeout=job.spec.run_policy.hang_timeout)}
    )  # the rest may change while the job runs
    return JobFile(
        name=job.name,
        namespace=job.namespace,
        uid=job.uid,
        spec=spec,
        sources={reference: _folder(Mounts.SOURCES, reference) for reference in sources(spec, job.models)},
        targets={reference: _folder(Mounts.TARGETS, reference) for reference in targets(spec, job.models)},
        secrets={field: f"{Mounts.SECRETS}/{field}" for stage in get_args(Stage) for field in secrets(spec, stage, job.models)},
        models={model.name: ModelStorage(storage=model.storage, s3_endpoint=model.s3_endpoint) for model in job.models},
    )


def workspace_claim(job: JobRef) -> str:
    """Name of the claim that holds the workspace: the user's, or the one the operator makes."""
    own = job.spec.workspace.persistent_volume_claim
    return own.claim_name if own is not None else names.workspace_name(job.name)


def net(settings: Settings) -> dict[str, str]:
    """How a stage reaches hubs and servers, as their libraries read it."""
    proxies = {"HTTP_PROXY": settings.http_proxy, "HTTPS_PROXY": settings.https_proxy}
    if any(proxies.values()):
        proxies["NO_PROXY"] = ",".join(filter(None, (settings.no_proxy, "localhost,127.0.0.1,.svc,.cluster.local")))
    found = {Env.HUB: settings.hub_endpoint, Env.S3: settings.s3_endpoint, **proxies}
    return {name: value for name, value in found.items() if value}


def pod_spec(
    job: JobRef,
    settings: Settings,
    stage: Stage,
    *,
    resources: Manifest,
    env: dict[str, str],
    shared_memory: str | None = None,
) -> Manifest:
    """The pod of a stage: non-root, read-only root file system, no service-account token for the API server."""
    volumes: list[Manifest] = [
        {"name": "job", "configMap": {"name": names.config_map_name(job.name)}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[Manifest] = [
        {"name": "job", "mountPath": Mounts.JOB, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]

    def mount(name: str, path: str, source: Manifest, *, read_only: bool) -> None:
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})})

    if stage != "check":  # it looks at targets alone
        mount("workspace", Mounts.WORKSPACE, {"persistentVolumeClaim": {"claimName": workspace_claim(job)}}, read_only=False)
    for index, reference in enumerate(sources(job.spec, job.models, stage) if stage != "check" else ()):
        scheme, name = reference.split("://")
        volume = {"persistentVolumeClaim": {"claimName": name, "readOnly": True}} if scheme == "pvc" else {"configMap": {"name": name}}
        if scheme == "pvc" or stage == "prepare":  # a ConfigMap's rows are in the workspace after prepare
            mount(f"source-{index}", _folder(Mounts.SOURCES, reference), volume, read_only=True)
    if stage in ("check", "publish"):
        for index, reference in enumerate(targets(job.spec, job.models)):
            claim = {"persistentVolumeClaim": {"claimName": reference.split("://")[1]}}
            mount(f"target-{index}", _folder(Mounts.TARGETS, reference), claim, read_only=False)
    for index, (field, (secret, keys)) in enumerate(secrets(job.spec, stage, job.models).items()):
        # the name of a FineTunedModel may be longer than that of a volume
        name = f"secret-model-{index}" if field.startswith("model-") else f"secret-{field}"
        mount(name, f"{Mounts.SECRETS}/{field}", secret_volume(secret, keys), read_only=True)
    if shared_memory is not None:
        mount("shared-memory", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}, read_only=False)
    if stage == "train" and settings.endpoint:
        mount("progress", Mounts.TOKEN, token_volume(progress_audience(job.namespace, job.name)), read_only=True)

    everything = {
        **({Env.ALLOW_CPU: "1"} if settings.allow_cpu else {}),
        **(
            {Env.ALLOWED_HOSTS: ",".join(settings.allowed_hosts)}
            if settings.allowed_hosts and stage in ("prepare", "check", "publish")
            else {}
        ),
        **env,
    }
    scheduling = job.spec.scheduling
    arguments = [stage, "--job", f"{Mounts.JOB}/job.json", "--workspace", "/tmp" if stage == "check" else Mounts.WORKSPACE]
    return {
        **restricted_pod(settings, arguments, env=everything, resources=resources, mounts=mounts, volumes=volumes),
        **({"nodeSelector": scheduling.node_selector} if scheduling.node_selector and stage in ("train", "evaluate") else {}),
        **(
            {"tolerations": [{k: v for k, v in t.to_wire().items() if v} for t in scheduling.tolerations]}
            if scheduling.tolerations and stage in ("train", "evaluate")
            else {}
        ),
        **(
            {"priorityClassName": scheduling.priority_class_name}
            if scheduling.priority_class_name and stage in ("train", "evaluate")
            else {}
        ),
    }


def secret_volume(secret: str, keys: dict[str, str]) -> Manifest:
    """Keys of a Secret, as the files that they become."""
    return {"secret": {"secretName": secret, "items": [{"key": key, "path": path} for key, path in keys.items()]}}


def token_volume(audience: str) -> Manifest:
    """A token of the pod's service account that is good for one audience alone."""
    token = {"audience": audience, "expirationSeconds": 3600, "path": "token"}
    return {"projected": {"sources": [{"serviceAccountToken": token}]}}


def pod_security(settings: Settings) -> Manifest:
    """As the `restricted` Pod Security Standard wants it of a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": settings.run_as_user,
        "runAsGroup": settings.run_as_user,
        "fsGroup": settings.run_as_user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    """And of a container, with a read-only root file system."""
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def restricted_pod(
    settings: Settings,
    arguments: list[str],
    *,
    env: dict[str, str],
    resources: Manifest,
    mounts: list[Manifest],
    volumes: list[Manifest],
) -> Manifest:
    """A pod of the trainer's image that ends: non-root, read-only root file system, no service-account token for the API server."""
    everything = {"HOME": "/tmp", **net(settings), **env}
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(settings),
        "containers": [
            {
                "name": "trainer",
                "image": settings.trainer_image,
                "imagePullPolicy": settings.image_pull_policy,
                "args": arguments,
                "env": [
                    {"name": Env.POD_NAME, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}},
                    *({"name": name, "value": value} for name, value in sorted(everything.items())),
                ],
                "resources": resources,
                "securityContext": container_security(),
                "terminationMessagePath": Mounts.TERMINATION_LOG,
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
        **({"imagePullSecrets": [{"name": n} for n in settings.image_pull_secrets]} if settings.image_pull_secrets else {}),
    }
