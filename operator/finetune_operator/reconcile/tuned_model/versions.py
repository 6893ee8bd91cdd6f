"""Versions, composed of what the status knows, what jobs have published, and what the records at the storage say.

Knows nothing of champions, nor of what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from finetune_api.lenient import read_status
from finetune_api.spec import WHOLE_MODEL_METHODS
from finetune_api.status import Artifact, FineTuneJobStatus
from finetune_api.tuned_model import FineTunedModelStatus, ModelVersion
from finetune_api.versions import MOST_NUMBER, VersionPaths, VersionRecord

from ...model.objects import Object, as_object
from ...model.tuned_model import version_named
from ...model.workload import has_ended

_MOST_SETTINGS = 128


def published(jobs: Iterable[Object], model: str, storage: str) -> dict[int, Object]:
    """Jobs by the number of the version of the model that each has published to this storage."""
    found = {}
    for job in jobs:
        for raw in _items(as_object(job.get("status")).get("artifacts")):
            number = raw.get("version")
            if type(number) is not int or not 1 <= number <= MOST_NUMBER or raw.get("model") != model:
                continue
            if raw.get("uri") == f"{storage}/{VersionPaths.artifact(number)}":
                found[number] = job
    return found


def new_from_jobs(status: FineTunedModelStatus, jobs: Mapping[int, Object], model: str, *, synced: bool) -> list[ModelVersion]:
    """Versions that jobs have published and that are not on record.

    `synced`: the storage's records have been read. Before that a job that has ended says nothing new: its version was on record
    once, and may have been removed since.
    """
    known = {version.number for version in status.versions} | {*status.storage.removing, *status.storage.removed}
    return [
        version
        for number, job in sorted(jobs.items())
        if number not in known and (synced or not has_ended(job)) and (version := version_of_job(job, model, number)) is not None
    ]


def version_of_job(job: Object, model: str, number: int) -> ModelVersion | None:
    """What a job says of the version that it has published."""
    status: FineTuneJobStatus = read_status(job.get("status"))
    artifact = next((a for a in status.artifacts if (a.model, a.version) == (model, number)), None)
    if artifact is None:
        return None
    spec = as_object(job.get("spec"))
    tuning = as_object(spec.get("tuning"))
    return ModelVersion(
        number=number,
        job=job["metadata"]["name"],
        job_uid=job["metadata"]["uid"],
        digest=artifact.digest,
        bytes=artifact.bytes,
        form="Model" if tuning.get("method") in WHOLE_MODEL_METHODS else "Adapter",
        rank=artifact.rank or None,
        merged=tuning.get("method") not in WHOLE_MODEL_METHODS and as_object(spec.get("output")).get("merged") is True,
        base=status.base,
        data_digest=status.dataset.digest if status.dataset is not None else "",
        parent=_parent(status, tuning, model),
        settings=flat(tuning),
        evaluation=status.evaluation,
        created_at=_published_at(status, artifact),
    )


def _parent(status: FineTuneJobStatus, tuning: Object, model: str) -> int | None:
    uri = tuning.get("continueFrom")
    try:
        continued = version_named(uri if isinstance(uri, str) else None)
    except ValueError:
        return None
    used = next((m.version for m in status.models if m.name == model), None)
    return used if continued is not None and continued[0] == model else None


def _published_at(status: FineTuneJobStatus, artifact: Artifact) -> str | None:
    condition = status.condition("Published")
    return condition.last_transition_time if condition is not None and condition.status == "True" else None


def version_of_record(record: VersionRecord) -> ModelVersion:
    """A version as its record tells it: the object was made again, or its status was lost."""
    return ModelVersion(
        number=record.number,
        state=record.state,
        job=record.job.name,
        job_uid=record.job.uid,
        digest=record.digest,
        bytes=record.bytes,
        form=record.form,
        rank=record.rank,
        merged=record.merged,
        base=record.base,
        data_digest=record.data_digest,
        parent=record.parent,
        settings=flat(record.tuning),
        evaluation=record.evaluation,
        created_at=record.created_at,
    )


def flat(tuning: Mapping[str, Any]) -> dict[str, str]:
    """Settings by path, such as lora.rank, in order; what is unset is left out."""
    found = dict(sorted(_flat(tuning, "")))
    return dict(list(found.items())[:_MOST_SETTINGS])


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}".lstrip("."))
    elif value is not None:
        yield path, value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _items(value: Any) -> list[Object]:
    return [as_object(item) for item in value] if isinstance(value, list) else []
