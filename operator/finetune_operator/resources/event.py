"""Kubernetes Events about the operator's objects. Knows nothing of when they are posted."""

from __future__ import annotations

import os
import time

from finetune_api import names

from ..model.objects import Object


def event_manifest(job: Object, type_: str, reason: str, message: str, name: str, now: float | None = None) -> Object:
    """A core/v1 Event about a job. Its name is fixed by what it tells, so telling it twice is telling it once."""
    meta = job["metadata"]
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": meta["namespace"]},
        "involvedObject": {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
            "resourceVersion": meta.get("resourceVersion", ""),
        },
        "type": type_,
        "reason": reason,
        "message": message,
        "source": {"component": names.MANAGER},
        "reportingComponent": names.MANAGER,
        "reportingInstance": os.environ.get("HOSTNAME", names.MANAGER)[:128],
        "action": reason,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
