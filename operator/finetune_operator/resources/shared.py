"""Objects that all stages of a job share: the ConfigMap with job.json, and the workspace claim."""

from __future__ import annotations

from finetune_api import names
from finetune_api.spec import WorkspaceTemplate

from ..settings import Settings
from .common import JobRef, Manifest, job_file, metadata, with_hash


def config_map(job: JobRef, settings: Settings) -> Manifest:
    """job.json, and the certificate authority of the progress endpoint."""
    return with_hash(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(job, names.config_map_name(job.name)),
            "data": {"job.json": job_file(job).dumps(), **({"ca.crt": settings.ca_bundle} if settings.ca_bundle else {})},
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
