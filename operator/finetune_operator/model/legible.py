"""PURE: what everything else relies on of an object. The server checks types, but not those that an older release or another version wrote.

What cannot be read is left out, so that one such object fails alone: a job derives it again, and all others go on.
Knows nothing of what it is read for.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune_api import names
from finetune_api.lenient import read_status, rewritten
from finetune_api.status import FineTuneJobStatus

from .children import job_view, pod_view
from .job import ChildJobView, PodView
from .objects import CHILD_KINDS, RECONCILED, Object

_TEXTS = ("namespace", "resourceVersion", "creationTimestamp", "deletionTimestamp")


def identified(kind: str, raw: Any) -> Object | None:
    """The object with metadata that can be relied on; None without name, namespace and UID, by which everything is found."""
    meta = raw.get("metadata") if isinstance(raw, dict) else None
    needed = ("name", "uid", "namespace") if kind in RECONCILED or kind in CHILD_KINDS else ("name",)
    if not isinstance(meta, dict) or not all(isinstance(meta.get(field), str) and meta[field] for field in needed):
        return None
    good = {field: value for field, value in meta.items() if _is_legible(field, value)}
    return raw if len(good) == len(meta) else {**raw, "metadata": good}


def _is_legible(field: str, value: Any) -> bool:
    if value is None:
        return False
    if field in ("labels", "annotations"):
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if field == "ownerReferences":
        return isinstance(value, list) and all(isinstance(owner, dict) for owner in value)
    if field == "generation":
        return type(value) is int
    return field not in _TEXTS or isinstance(value, str)


def legible_job(raw: Object) -> Object:
    """A FineTuneJob whose spec and status are objects, and whose status the model can read: the rest of it is left out."""
    spec, status = raw.get("spec"), raw.get("status")
    if spec is not None and not isinstance(spec, dict):
        raw = {**raw, "spec": None}
    if status is None:
        return raw
    try:
        FineTuneJobStatus.model_validate(status)
    except ValidationError as failure:
        if not all(_is_harmless(error) for error in failure.errors(include_url=False, include_context=False)):
            read = read_status(status)
            return {**raw, "status": rewritten(status, read, read)}
    return raw


def legible_object(raw: Object) -> Object:
    """An object of another kind, whose spec and status are objects. Whoever reads them does so leniently (finetune_api/lenient.py)."""
    wrong = {field: None for field in ("spec", "status") if raw.get(field) is not None and not isinstance(raw[field], dict)}
    return {**raw, **wrong} if wrong else raw


def _is_harmless(error: ErrorDetails) -> bool:
    """Whether what is wrong there misleads nobody who reads the status as it stands: a field is missing, or has a word of another release."""
    return error["type"] in ("missing", "extra_forbidden") or (error["type"] == "literal_error" and isinstance(error["input"], str))


def child_view(kind: str, raw: Object) -> PodView | ChildJobView | str:
    """What is kept of a child: of what is applied, its hash. One of another shape is there, and says nothing, not even that it has ended."""
    if kind not in ("Pod", "Job"):
        return str((raw["metadata"].get("annotations") or {}).get(names.ANNOTATION_HASH, ""))
    view = pod_view if kind == "Pod" else job_view
    try:
        if isinstance(raw.get("spec"), dict | None) and isinstance(raw.get("status"), dict | None):
            return view(raw)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    return view({**raw, "spec": None, "status": None})
