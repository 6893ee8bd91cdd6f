"""Objects for tests: jobs, pods and child Jobs as the API server would return them."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import API_VERSION, KIND, names
from finetune_api.contract import StageResult
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import parse_spec
from finetune_operator.resources.common import JobRef

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
UID = "0f0e0d0c-1111-2222-3333-444455556666"

MINIMAL: dict[str, Any] = {
    "model": {"uri": "pvc://models/tiny"},
    "dataset": {"train": {"uri": "configmap://rows/train.jsonl"}},
    "distribution": {"gpusPerNode": 0},
}
FULL: dict[str, Any] = {
    "model": {"uri": "hf://org/model@main", "secretRef": {"name": "hf-token"}},
    "dataset": {"train": {"uri": "hf://org/rows"}, "eval": {"splitFraction": 0.1}},
    "tuning": {"method": "lora", "lora": {"rank": 8}, "hyperparameters": {"globalBatchSize": 32}},
    "distribution": {"nodes": 2, "gpusPerNode": 4, "strategy": "deepspeed-zero2"},
    "resources": {"requests": {"cpu": "16", "memory": "200Gi"}, "sharedMemory": "64Gi"},
    "scheduling": {
        "priorityClassName": "batch",
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "evaluation": {"metrics": ["loss", "exact-match"], "gate": {"metric": "loss", "minImprovement": 0.02}},
    "publish": [{"uri": "pvc://published/support"}, {"uri": "hf://org/support", "secretRef": {"name": "hf-write"}}],
}


def merged(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A deep copy with top-level blocks replaced."""
    return {**copy.deepcopy(base), **changes}


def job(spec: dict[str, Any] | None = None, status: dict[str, Any] | None = None, name: str = "support", **meta: Any) -> dict[str, Any]:
    """A FineTuneJob."""
    raw: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": name,
            "namespace": "team-a",
            "uid": UID,
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": stamp(NOW),
            **meta,
        },
        "spec": copy.deepcopy(MINIMAL if spec is None else spec),
    }
    if status is not None:
        raw["status"] = status
    return raw


def ref(spec: dict[str, Any] | None = None, name: str = "support") -> JobRef:
    """Identity and parsed spec."""
    parsed: FineTuneJobSpec = parse_spec(MINIMAL if spec is None else spec)
    return JobRef(name, "team-a", UID, parsed)


def stamp(moment: datetime) -> str:
    """RFC 3339."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def after(seconds: float) -> datetime:
    """So many seconds after NOW."""
    return NOW + timedelta(seconds=seconds)


PLAN = {"worldSize": 1, "perDeviceBatchSize": 4, "gradientAccumulation": 4, "strategy": "ddp", "totalSteps": 10}
PREPARED = StageResult(
    reason="DataReady",
    message="100 rows",
    result={
        "base": {"uri": "pvc://models/tiny", "fingerprint": "f"},
        "dataset": {"train": 90, "eval": 10, "tokens": 1000, "format": "messages", "digest": "sha256:00"},
        "plan": PLAN,
    },
)
CHECKED = StageResult(reason="TargetsReady", message="pvc://published/support")
TRAINED = StageResult(reason="Trained", message="10 steps", result={"steps": 10, "loss": 0.5, "checkpointStep": 10})
COMPARED = StageResult(
    reason="Compared",
    message="loss Base 2, Tuned 1",
    result={
        "arms": [{"name": "Base", "metrics": {"loss": 2.0}}, {"name": "Tuned", "metrics": {"loss": 1.0}}],
        "examples": 20,
        "prompts": 20,
        "comparedWith": "Base",
        "improvement": 0.5,
        "gate": "Passed",
    },
)
PUBLISHED = StageResult(
    reason="Published",
    message="published",
    result={"artifacts": [{"uri": "pvc://published/support", "digest": "sha256:11", "bytes": 10}]},
)
RESULTS = {"prepare": PREPARED, "check": CHECKED, "train": TRAINED, "evaluate": COMPARED, "publish": PUBLISHED}


def container_status(state: dict[str, Any]) -> list[dict[str, Any]]:
    """One container's status."""
    return [{"name": "trainer", "image": "i", "imageID": "", "ready": "running" in state, "restartCount": 0, "state": state}]


def ended(code: int, message: str = "", *, reason: str = "", at: datetime = NOW) -> dict[str, Any]:
    """The status of a pod whose container has ended."""
    terminated = {
        "exitCode": code,
        "reason": reason or ("Completed" if code == 0 else "Error"),
        "message": message,
        "finishedAt": stamp(at),
        "startedAt": stamp(at),
    }
    return {"phase": "Succeeded" if code == 0 else "Failed", "containerStatuses": container_status({"terminated": terminated})}


def label_job_uid(raw: dict[str, Any]) -> str:
    """The label that wakes a job."""
    return str(raw["metadata"]["labels"][names.LABEL_JOB_UID])
