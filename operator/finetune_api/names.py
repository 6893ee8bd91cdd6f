"""Names, labels and annotations of everything that belongs to a job. Deterministic, valid and unique."""

from __future__ import annotations

import hashlib
import re

from . import GROUP
from .contract import Stage

MANAGER = "finetune-operator"
MANAGED_BY = f"{GROUP}/{MANAGER}"
"""`spec.managedBy` of the jobs that are this operator's, as are those without"""
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_JOB = "finetune.dev/job"
LABEL_JOB_UID = "finetune.dev/job-uid"
LABEL_OWNER_UID = "finetune.dev/owner-uid"
"""On what a FineTunedModel or FineTuneEndpoint owns: whom its changes wake"""
LABEL_ENDPOINT = "finetune.dev/endpoint"
LABEL_STAGE = "finetune.dev/stage"
LABEL_ATTEMPT = "finetune.dev/attempt"
LABEL_RANK = "finetune.dev/rank"
ANNOTATION_HASH = "finetune.dev/applied-hash"
ANNOTATION_ADMISSION = "finetune.dev/admission"
"""On worker pods: what their gang was admitted to, should the job's status be lost"""
ANNOTATION_SEAL = "finetune.dev/admission-seal"
"""Beside it: that the operator wrote it, for this job. Whoever may edit pods cannot make one"""
ANNOTATION_VERSION = "finetune.dev/version"
"""On a replica's pod: NAME@VERSION of the whole model that is its base"""
FINALIZER = "finetune.dev/unload"
"""On a FineTuneEndpoint: its replicas let go of what they serve before it is gone"""
ANNOTATION_CREATED_BY = "finetune.dev/created-by"
"""Who created a job, by the webhook: limits per user count by it"""

#: DNS label (63) less the longest suffix, `-evaluate-9999`, and the random part that a Job gives its pods
_BASE_LIMIT = 43


def base_name(job_name: str) -> str:
    """The start of every child's name: a DNS-1035 label, unique among the jobs of a namespace.

    A name that has to be changed (dots, a leading digit, too long) gets a digest of the whole name, so two long
    names that begin alike stay apart.
    """
    if re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job_name) and len(job_name) <= _BASE_LIMIT:
        return job_name
    digest = hashlib.sha256(job_name.encode()).hexdigest()[:8]
    plain = job_name.replace(".", "-")
    prefix = plain if plain[:1].isalpha() else f"j{plain}"
    return f"{prefix[: _BASE_LIMIT - 9].rstrip('-')}-{digest}"


def job_label(job_name: str) -> str:
    """The value of the job label: the job's own name where it fits, else its base name."""
    return job_name if len(job_name) <= 63 else base_name(job_name)


def config_map_name(job_name: str) -> str:
    """ConfigMap that holds job.json."""
    return f"{base_name(job_name)}-job"


def catalog_config_name(model_name: str) -> str:
    """ConfigMap that holds a FineTunedModel's model.json."""
    return f"{base_name(model_name)}-catalog"


def catalog_name(model_name: str, digest: str) -> str:
    """Child Job of a FineTunedModel that does at its storage what the digest (hexadecimal) says."""
    return f"{base_name(model_name)}-catalog-{digest[:8]}"


def service_name(job_name: str) -> str:
    """Headless Service of the gang."""
    return f"{base_name(job_name)}-workers"


def workspace_name(job_name: str) -> str:
    """Claim that the operator makes when the job names none."""
    return f"{base_name(job_name)}-workspace"


def worker_name(job_name: str, rank: int) -> str:
    """Worker pod of a node rank; the same in every attempt, so that no rank can ever run twice."""
    return f"{base_name(job_name)}-worker-{rank}"


def group_name(job_name: str, attempt: int) -> str:
    """What another scheduler knows the gang of one attempt by: Kueue's pod group, Volcano's PodGroup."""
    return f"{base_name(job_name)}-attempt-{attempt}"


def stage_name(job_name: str, stage: Stage, retry: int) -> str:
    """Child Job of a single-pod stage."""
    return f"{base_name(job_name)}-{stage}-{retry}"


def endpoint_name(endpoint: str) -> str:
    """Deployment, Service, ConfigMap, PodDisruptionBudget and NetworkPolicy of a FineTuneEndpoint."""
    return f"{base_name(endpoint)}-endpoint"
