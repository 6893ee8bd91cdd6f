"""Single-pod stages: a `batch/v1` Job that never retries by itself; the operator's own table decides about that.

Knows nothing of when it is due.
"""

from __future__ import annotations

import json

from finetune_api import names
from finetune_api.contract import Champion, Env, Stage
from finetune_api.status import AdmissionStatus

from ..settings import Settings
from .backends import hand_over_stage
from .common import JobRef, Manifest, metadata, pod_spec
from .gang import gpus, put_on

_CHECK = {"cpu": "100m", "memory": "256Mi"}
"""It reads a few small files."""


def stage_job(
    job: JobRef, settings: Settings, stage: Stage, retry: int, admission: AdmissionStatus | None = None, champion: Champion | None = None
) -> Manifest:
    """The Job of a single-pod stage. Only evaluate asks for a GPU, and only where training uses some.

    `champion`: of evaluate, what the result is compared with besides.
    """
    extended = gpus(job, min(1, job.spec.distribution.gpus_per_node)) if stage == "evaluate" else {}
    requests = {**(_CHECK if stage == "check" else {"cpu": settings.stage_cpu, "memory": settings.stage_memory}), **extended}
    template = metadata(job, "", **{names.LABEL_STAGE: stage})
    pod = pod_spec(
        job,
        settings,
        stage,
        resources={"requests": requests, **({"limits": extended} if extended else {})},
        env={Env.CHAMPION: json.dumps(champion.to_wire(), sort_keys=True)} if champion is not None else {},
        shared_memory=job.spec.resources.shared_memory if extended else None,
    )
    if extended:
        put_on(pod, admission)
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(job, names.stage_name(job.name, stage, retry), **{names.LABEL_STAGE: stage}),
        "spec": {
            "backoffLimit": 0,
            "template": {
                "metadata": {"labels": template["labels"]},
                "spec": pod,
            },
        },
    }
    if extended:
        hand_over_stage(manifest, job, settings)
    return manifest
