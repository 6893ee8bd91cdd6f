"""replica.json, and the base that a replica serves: fetched as a job fetches its own, in the pod's init container."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_api.contract import JobFile, StageResult
from finetune_api.serving import ReplicaFile
from finetune_api.spec import FineTuneJobSpec

from ..job.context import Context
from ..job.files import write_text
from ..models.fetch import fetch_base_model
from ..process import redaction

BASE, REFERENCE = "base", "base.json"


def read_replica(path: str) -> ReplicaFile:
    """Read replica.json. What is secret of it is never said from here on."""
    file = ReplicaFile.model_validate(json.loads(Path(path).read_text()))
    redaction.add_secrets(file.secrets.values())
    return file


def context_of(file: ReplicaFile, models: str) -> Context:
    """What rooms below know a job by: here one that has a base alone, with its claims and Secrets."""
    spec = FineTuneJobSpec.model_construct(model=file.base)  # type: ignore[call-arg]  # it has no rows
    job = JobFile.model_construct(
        name=file.name, namespace=file.namespace, uid=file.uid, spec=spec, sources=file.sources, secrets=file.secrets
    )
    return Context(job, models)


def fetch(file: ReplicaFile, models: str) -> StageResult:
    """In the init container: find or download the base, and leave a link to it with its fingerprint. Can be run again.

    Raises UserError or SourceUnavailable as prepare does.
    """
    context = context_of(file, models)
    folder = fetch_base_model(context)
    link = Path(models, BASE)
    link.unlink(missing_ok=True)
    link.symlink_to(folder, target_is_directory=True)
    reference = context.read_json(context.layout.reference("model"))
    write_text(Path(models, REFERENCE), json.dumps(reference, sort_keys=True) + "\n")
    return StageResult(reason="Fetched", message=f"{file.base.uri} is there, {reference['fingerprint']}")
