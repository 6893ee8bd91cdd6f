"""replica.json, and the base that a replica serves: fetched as a job fetches its own, in the pod's init container."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_api.contract import VERSION_REFUSED, JobFile, StageResult
from finetune_api.serving import OrderedModel, ReplicaFile
from finetune_api.spec import FineTuneJobSpec

from ..job.context import Context
from ..job.files import write_text
from ..models.fetch import fetch_base_model, note_model
from ..process import redaction
from ..process.errors import UserError
from .checks import check_whole_numbers
from .storage import Refused, fetch_whole, storage_of

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


def fetch(file: ReplicaFile, models: str, version: OrderedModel | None = None) -> StageResult:
    """In the init container: find or download the base, and leave a link to it with its fingerprint. Can be run again.

    `version`: the whole model of a FineTunedModel that it is. Raises UserError or SourceUnavailable as prepare does.
    """
    context = context_of(file, models)
    folder = fetch_base_model(context) if version is None else _fetch_version(context, version, models)
    link = Path(models, BASE)
    link.unlink(missing_ok=True)
    link.symlink_to(folder, target_is_directory=True)
    reference = context.read_json(context.layout.reference("model"))
    noted = {**reference, **({"version": version.to_wire()} if version is not None else {})}
    write_text(Path(models, REFERENCE), json.dumps(noted, sort_keys=True) + "\n")
    return StageResult(reason="Fetched", message=f"{reference['uri']} is there, {reference['fingerprint']}")


def _fetch_version(context: Context, version: OrderedModel, models: str) -> str:
    """Whole, as published, and of numbers: before any engine sees it."""
    remote_code = context.spec.model.trust_remote_code
    try:
        folder = fetch_whole(storage_of(context, version), version, Path(models, "versions"), *(["*.py"] if remote_code else []))
        check_whole_numbers(folder, version.name)
        return note_model(context, "model", f"model://{version.name}", folder, remote_code=remote_code)
    except Refused as refused:
        raise UserError(VERSION_REFUSED, str(refused)) from None


def served_version(reference: dict[str, Any]) -> OrderedModel | None:
    """The whole model that the base is, as `fetch` has noted it."""
    return OrderedModel.model_validate(found) if (found := reference.get("version")) is not None else None
