"""What a FineTunedModel owns: the Job of the stage `catalog`, and the ConfigMap with what it is to do. Knows nothing of when it is due."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import msgspec

from finetune_api import names
from finetune_api.contract import CATALOG, S3_KEYS, CatalogFile, Env, ModelStorage, Mounts, catalog_audience
from finetune_api.tuned_model import MODEL_KIND, FineTunedModelSpec
from finetune_api.uris import parse_uri
from finetune_api.versions import VersionState

from ..settings import Settings
from .common import Manifest, Owner, owned, restricted_pod, secret_volume, token_volume, with_hash
from .shared import isolation

_SECRET = "storage"
_RESOURCES = {"requests": {"cpu": "100m", "memory": "256Mi"}}
"""It reads and writes small files."""
_DEADLINE_SECONDS = 3600


def catalog_file(
    name: str, namespace: str, uid: str, spec: FineTunedModelSpec, states: Mapping[int, VersionState], remove: Sequence[int]
) -> CatalogFile:
    """model.json: what is to be done at the storage, with where this cluster mounts it."""
    uri = parse_uri(spec.storage)
    return CatalogFile(
        name=name,
        namespace=namespace,
        uid=uid,
        storage=ModelStorage(storage=spec.storage, s3_endpoint=spec.s3_endpoint),
        targets={f"pvc://{uri.name}": f"{Mounts.TARGETS}/pvc/{uri.name}"} if uri.scheme == "pvc" else {},
        secrets={_SECRET: f"{Mounts.SECRETS}/{_SECRET}"} if spec.secret_ref is not None else {},
        states=dict(states),
        remove=list(remove),
    )


def catalog_job_name(file: CatalogFile, spec: FineTunedModelSpec, retries: int) -> str:
    """Of the Job: the same for the same work at the same storage, another one for each try."""
    secret = spec.secret_ref.name if spec.secret_ref is not None else ""
    return names.catalog_name(file.name, hashlib.sha256(f"{file.dumps()}\0{secret}\0{retries}".encode()).hexdigest())


def catalog_config(file: CatalogFile, settings: Settings) -> Manifest:
    """The ConfigMap with model.json, and the authorities that it is to trust."""
    certificates = {"ca.crt": settings.ca_bundle, PurePath(Mounts.AUTHORITIES).name: settings.authorities}
    return with_hash(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": owned(_owner(file), names.catalog_config_name(file.name)),
            "data": {
                PurePath(Mounts.MODEL_FILE).name: msgspec.json.format(file.dumps(), indent=1),
                **{name: text for name, text in certificates.items() if text},
            },
        }
    )


def catalog_policy(file: CatalogFile, settings: Settings) -> Manifest | None:
    """The pods of the stage are reached by nobody else, as those of jobs. None where no NetworkPolicy is wanted."""
    if not settings.network_policies:
        return None
    return isolation(owned(_owner(file), names.catalog_config_name(file.name)), {names.LABEL_OWNER_UID: file.uid})


def catalog_job(file: CatalogFile, spec: FineTunedModelSpec, settings: Settings, retries: int) -> Manifest:
    """The Job. It never retries by itself: the operator does, with back-off."""
    volumes: list[Manifest] = [
        {"name": "model", "configMap": {"name": names.catalog_config_name(file.name)}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "progress", **token_volume(catalog_audience(file.namespace, file.name))},
    ]
    mounts: list[Manifest] = [
        {"name": "model", "mountPath": Mounts.JOB, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "progress", "mountPath": Mounts.TOKEN, "readOnly": True},
    ]
    for reference, folder in file.targets.items():
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": reference.removeprefix("pvc://")}})
        mounts.append({"name": "storage", "mountPath": folder})
    if spec.secret_ref is not None:
        volumes.append({"name": "secret", **secret_volume(spec.secret_ref.name, {key: key for key in S3_KEYS})})
        mounts.append({"name": "secret", "mountPath": file.secrets[_SECRET], "readOnly": True})
    pod = restricted_pod(
        settings,
        [CATALOG, "--model", Mounts.MODEL_FILE],
        env={Env.PROGRESS_URL: settings.endpoint},
        resources=_RESOURCES,
        mounts=mounts,
        volumes=volumes,
    )
    labels = {names.LABEL_STAGE: CATALOG}
    meta = owned(_owner(file), catalog_job_name(file, spec, retries), **labels)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": _DEADLINE_SECONDS,
            "template": {"metadata": {"labels": meta["labels"]}, "spec": pod},
        },
    }


def _owner(file: CatalogFile) -> Owner:
    return Owner(MODEL_KIND, file.name, file.namespace, file.uid)
